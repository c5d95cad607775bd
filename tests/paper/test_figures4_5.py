"""Runs and tables of figures 4 and 5."""

from dataclasses import replace

import pandas as pd
import pytest

from landscape import RECIPES, read_traces, train
from landscape.paper.figures4_5 import COMPARISONS, comparison, roughness

RUNS = comparison(replace(RECIPES["digits"], epochs=2), (16,), (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces")
    for run in RUNS:
        train(run, out, device="cpu")
    return out


def test_comparisons():
    figure4, figure5 = COMPARISONS["4", "paper"], COMPARISONS["5", "paper"]
    assert [(run.norm, run.norm_options.get("groups")) for run in figure5] == [
        ("none", None),
        ("batch", None),
        ("ghost", 16),
        ("ghost", 128),
    ]
    assert {(run.dataset, run.model, run.batch_size) for run in figure5} == {("cifar10", "resnet56", 512)}
    assert {(run.dataset, run.model) for run in figure4} == {("mnist", "simplenet")}
    assert len({run.run_name for run in figure4}) == 20
    for runs in COMPARISONS.values():
        least = min(run.batch_size // (run.norm_options.get("groups") or 1) for run in runs)
        assert least == 4  # samples in a group


def test_roughness(folder):
    frame, epochs = read_traces(folder), read_traces(folder, table="epochs")
    table = roughness(frame, epochs)
    assert list(table.columns) == ["No normalization", "BatchNorm", "GhostNorm (G=16)"]
    assert list(table.index) == ["epoch 1", "epoch 2", "all, mean", "all, median", "not finite", "test accuracy"]
    own = frame[frame["norm"] == "ghost"]
    ranges = own["loss_max"] - own["loss_min"]
    expected = pd.Series(
        {
            "epoch 1": ranges[own["epoch"] < 1].mean(),
            "epoch 2": ranges[own["epoch"] >= 1].mean(),
            "all, mean": ranges.mean(),
            "all, median": ranges.median(),
            "not finite": 0.0,
            "test accuracy": epochs.query("norm == 'ghost' and epoch == 2")["test_accuracy"].mean(),
        }
    )
    pd.testing.assert_series_equal(table["GhostNorm (G=16)"], expected, check_names=False)
