"""Section 2.2: rank changes of activations."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from landscape.errors import LandscapeError
from landscape.norms.functional import ghost_norm
from landscape.norms.registry import make_norm
from landscape.paper.rank_changes import (
    VALUES,
    activations,
    plot_orders,
    quartiles,
    rank_changes,
    rank_changes_by_groups,
    rank_changes_by_layer,
    ranking,
)
from landscape.plotting.figure import save_figure
from landscape.training.models import ResNet, SimpleNet
from landscape.training.presets import RECIPES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rank_changes_by_loop(before, after):
    """Return the share of pairs with opposite orders, pair by pair."""
    channels = zip(*(values.movedim(1, 0).flatten(1).tolist() for values in (before, after)), strict=True)
    return torch.tensor(
        [
            sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in combinations(range(len(a)), 2)) / comb(len(a), 2)
            for a, b in channels
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (16, 4), (37, 2), (9, 2, 5), (4, 2, 3, 3)])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_changes(shape, ties, dtype):
    before, after = torch.randn(2, *shape, dtype=dtype).mul(2)
    if ties:
        before, after = before.round(), after.round()
    torch.testing.assert_close(rank_changes(before, after), rank_changes_by_loop(before, after), rtol=0, atol=1e-12)


def test_rank_changes_kendall():
    before = torch.randn(300, 4, dtype=torch.float64)
    after = before + torch.linspace(0, 3, 4) * torch.randn(300, 4)
    taus = [kendalltau(*pair).statistic for pair in zip(before.T.numpy(), after.T.numpy(), strict=True)]
    np.testing.assert_allclose(rank_changes(before, after), (1 - np.array(taus)) / 2, rtol=1e-12)


def test_rank_changes_extremes():
    values = torch.randn(50, 3)
    torch.testing.assert_close(rank_changes(values, values.exp()), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(rank_changes(values, -values), torch.ones(3, dtype=torch.float64))
    assert rank_changes(torch.randn(2000, 8), torch.randn(2000, 8)).sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3), r"\(4, 2\) and \(4, 3\)"),
        (torch.zeros(4), torch.zeros(4), r"\(M, C\) or \(M, C, ...\)"),
        (torch.zeros(1, 2), torch.zeros(1, 2), "at least 2 values"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "at least 2 values"),
        (torch.tensor([[1.0], [torch.nan]]), torch.zeros(2, 1), "NaN or infinite"),
        (torch.zeros(2, 1), torch.tensor([[1.0], [torch.inf]]), "NaN or infinite"),
    ],
)
def test_rank_changes_invalid(before, after, message):
    with pytest.raises(LandscapeError, match=message):
        rank_changes(before, after)


def model_and_inputs():
    model = SimpleNet(12, 3, make_norm("batch"))
    return model, torch.randn(16, 12)


def test_activations():
    model, inputs = model_and_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = activations(model.eval(), inputs, ["layers.2", "layers.5"])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    first = inputs @ model.layers[1].weight.T + model.layers[1].bias
    hidden = ((first - first.mean(0)) / (first.var(0, correction=0) + 1e-5).sqrt()).relu()
    second = hidden @ model.layers[4].weight.T + model.layers[4].bias
    torch.testing.assert_close(found, {"layers.2": first, "layers.5": second}, rtol=1e-4, atol=1e-5)


def test_activations_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True))
    torch.testing.assert_close(activations(model, torch.tensor([-1.0]), ["0"]), {"0": torch.tensor([-1.0])})


@pytest.mark.parametrize("shape", [(32, 3), (8, 3, 2, 2)])
def test_rank_changes_by_groups(shape):
    values = torch.randn(shape) * 3 + 1
    table = rank_changes_by_groups(values, [1, 2, 4]).pivot(index="channel", columns="groups", values="share")
    for groups in (1, 2, 4):
        # The layer has a scale; here it is positive.
        expected = rank_changes_by_loop(
            values.double(), ghost_norm(values.double(), groups, torch.tensor([2.0, 1.0, 3.0]))
        )
        np.testing.assert_allclose(table[groups], expected, atol=1e-12)
    assert (table[1] == 0).all()
    assert (table[4] > table[2]).all()
    assert (table[2] > 0).all()


def test_rank_changes_by_groups_rounding():
    values = (1000 + torch.randperm(512) * 2.0**-14)[:, None]  # neighbours in float32
    expected = rank_changes_by_loop(values.double(), ghost_norm(values.double(), 32)).item()
    assert rank_changes_by_groups(values, [1, 32])["share"].tolist() == [0.0, pytest.approx(expected, abs=1e-12)]


def test_rank_changes_negative_scale():
    values = torch.randn(32, 3, dtype=torch.float64)
    upright, reversed_ = (ghost_norm(values, 4, torch.full((3,), sign)) for sign in (1.0, -1.0))
    torch.testing.assert_close(rank_changes(values, upright), 1 - rank_changes(values, reversed_))


def test_rank_changes_by_groups_sample():
    values = torch.randn(64, 2, 16, 16)
    every = rank_changes(values.double(), ghost_norm(values.double(), 16))
    some = rank_changes_by_groups(values, [16])["share"]
    assert values[:, 0].numel() > VALUES
    np.testing.assert_allclose(some, every, atol=0.01)


@pytest.fixture(scope="module")
def digits():
    return ranking(replace(RECIPES["digits"], epochs=2), device="cpu")


def test_ranking(digits):
    assert sorted(digits["updates"].unique()) == [0, 22]
    assert list(digits["layer"].unique()) == ["norm 1 of 2", "norm 2 of 2"]
    assert list(digits["groups"].unique()) == [1, 2, 4, 8, 16, 32]  # 128 samples, 4 in each of 32 groups
    assert digits.groupby("layer")["channel"].nunique().tolist() == [512, 300]
    assert set(digits.loc[digits["groups"] == 1, "share"]) == {0.0}
    medians = digits.groupby(["updates", "layer", "groups"])["share"].median().unstack()
    assert (medians.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
    states = digits.set_index(["layer", "groups", "channel", "updates"])["share"].unstack()
    assert (states[0] != states[22]).any()


def test_ranking_ignores_norm(digits):
    again = ranking(replace(RECIPES["digits"], epochs=2, norm="ghost", groups=4), device="cpu")
    pd.testing.assert_frame_equal(again, digits)


def test_rank_changes_by_layer():
    model = ResNet(20, 1, 3, make_norm("batch"))
    frame = rank_changes_by_layer(model, torch.randn(8, 1, 8, 8))
    assert list(frame["layer"].unique()) == ["norm 1 of 19", "norm 10 of 19", "norm 19 of 19"]
    assert frame.groupby("layer")["channel"].nunique().tolist() == [16, 32, 64]


def test_quartiles():
    frame = pd.DataFrame({"layer": "a", "groups": [1] * 5 + [2] * 5, "share": [0.0] * 5 + [0.1, 0.2, 0.3, 0.4, 0.5]})
    expected = pd.DataFrame({"low": [0.0, 20.0], "median": [0.0, 30.0], "high": [0.0, 40.0]})
    np.testing.assert_allclose(quartiles(frame), expected)


def test_plot_orders(digits, tmp_path):
    figure = plot_orders(pd.concat([digits, digits.assign(dataset="mnist")]))
    assert [axes.get_title("left") for axes in figure.axes] == [
        "SimpleNet on digits, initial weights",
        "SimpleNet on MNIST, initial weights",
        "SimpleNet on digits, after 22 updates",
        "SimpleNet on MNIST, after 22 updates",
    ]
    for axes, updates in zip(figure.axes, (0, 0, 22, 22), strict=True):
        shares = quartiles(digits[digits["updates"] == updates])
        names = [text.get_text() for text in axes.texts]
        assert names == ["norm 1 of 2", "norm 2 of 2"]
        for line, band, name in zip(axes.lines, axes.collections, names, strict=True):
            np.testing.assert_allclose(line.get_xydata(), shares.loc[name, "median"].reset_index())
            corners = band.get_paths()[0].vertices
            for edge in ("low", "high"):
                assert set(shares.loc[name, edge]) <= set(corners[:, 1])
    save_figure(figure, tmp_path / "orders.png")
    assert "for a batch of 128 training samples" in " ".join(figure.get_supxlabel().split())


def test_plot_orders_labels(digits):
    figure = plot_orders(digits)
    figure.draw_without_rendering()
    for axes in figure.axes:
        one, two = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert one.y1 <= two.y0 + 1
