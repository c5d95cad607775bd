"""Figure 1: values that are normalized together."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from landscape.errors import LandscapeError
from landscape.names import NORMS
from landscape.norms.registry import REGISTRY, make_norm
from landscape.paper.figure1 import (
    FIRST,
    LATER,
    UNREACHED,
    dependence,
    figure1_blocks,
    normalization_steps,
    plot_blocks,
)
from landscape.plotting.figure import save_figure

SHAPE, PLACES = (8, 6, 3), [(0, 0, 0), (3, 4, 1), (7, 5, 2)]
OPTIONS = {"groups": 4, "channel_groups": 3}


def in_one_slice(name, a, b):
    """Return True if two values of a batch of SHAPE share a slice in the equations of a norm."""
    sample, channel = a[0] == b[0], a[1] == b[1]
    group, channel_group = a[0] // 2 == b[0] // 2, a[1] // 2 == b[1] // 2
    return {
        "none": a == b,
        "batch": channel,
        "layer": sample,
        "instance": sample and channel,
        "group": sample and channel_group,
        "ghost": group and channel,
        "ghost-ws": group and channel,
        "ghost-mean": channel,  # The variance is that of the batch.
        "batch-group": group and channel_group,
        "seq": group and channel_group,
        "seq-ws": group and channel_group,
        "seq-reversed": group and channel_group,
    }[name]


def slices(name, at):
    return torch.tensor([in_one_slice(name, at, place) for place in np.ndindex(SHAPE)]).view(SHAPE)


def options_of(name):
    return {option: value for option, value in OPTIONS.items() if option in REGISTRY[name][1]}


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("name", NORMS)
def test_dependence_equations(name, at):
    norm = make_norm(name, **options_of(name))(6).double()
    assert torch.equal(dependence(norm, SHAPE, at), slices(name, at))


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("name", NORMS)
def test_dependence_derivative(name, at):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    norm = make_norm(name, **options_of(name))(6).double()
    derivatives = torch.autograd.functional.jacobian(norm, x)
    assert isinstance(derivatives, torch.Tensor)
    assert torch.equal(dependence(norm, SHAPE, at), derivatives[(..., *at)].abs() > 1e-12)


def test_dependence_any_function():
    moved = dependence(lambda x: x.roll(1, 0), (4, 2), (3, 1))
    assert moved.nonzero().tolist() == [[0, 1]]
    norm = make_norm("ghost", groups=4, layout="interleaved")(2).double()
    assert dependence(norm, (8, 2, 3, 5), (1, 0, 2, 4)).nonzero()[:, 0].unique().tolist() == [1, 5]


@pytest.mark.parametrize("name", NORMS)
def test_normalization_steps(name):
    first = {"seq": "group", "seq-ws": "group", "seq-reversed": "ghost"}.get(name, name)
    expected = slices(name, PLACES[1]).long() * 2
    expected[slices(first, PLACES[1])] = 1
    assert torch.equal(normalization_steps(name, SHAPE, PLACES[1], **options_of(name)), expected)


@pytest.mark.parametrize("at", [(0, 0), (0, 0, 3), (-1, 0, 0)])
def test_dependence_invalid_index(at):
    with pytest.raises(LandscapeError, match=r"at=\(.*no value in a batch of shape \(8, 6, 3\)"):
        dependence(lambda x: x, SHAPE, at)


def test_normalization_steps_invalid_groups():
    with pytest.raises(LandscapeError, match="channel_groups=4 on 6 channels"):
        normalization_steps("seq", SHAPE, (0, 0, 0), groups=2, channel_groups=4)


def squares_of(axes):
    """Return the colours of the small squares by their centres."""
    faces = [
        artist for artist in axes.collections if isinstance(artist, PolyCollection) and len(artist.get_paths()) > 1
    ]
    return {
        tuple(np.round(path.vertices[:4].mean(0), 6)): colour[:3]
        for face in faces
        for path, colour in zip(face.get_paths(), face.get_facecolor(), strict=True)
    }


def test_plot_blocks():
    blocks = {title: steps.numpy() for title, steps in figure1_blocks().items()}
    figure = plot_blocks(blocks)
    assert [axes.get_title() for axes in figure.axes] == list(blocks)
    assert list(blocks)[3:] == ["GroupNorm (G_C=2)", "GhostNorm (G=3)", "SeqNorm (G_C=2, G_M=3)"]
    right, left, down = np.array([3**0.5 / 2, 0.5]), np.array([-(3**0.5) / 2, 0.5]), np.array([0, -1])
    for axes, steps in zip(figure.axes, blocks.values(), strict=True):
        squares = squares_of(axes)
        assert len(squares) == 6 * 6 + 6 * 4 + 6 * 4
        for m, c in np.ndindex(6, 6):  # the top, where colours have full brightness
            colour = squares[tuple(np.round((m + 0.5) * right + (c + 0.5) * left, 6))]
            np.testing.assert_allclose(colour, (UNREACHED, FIRST, LATER)[steps[m, c, 0]])
        for m, f in np.ndindex(6, 4):
            red, _, blue = squares[tuple(np.round((m + 0.5) * right + (f + 0.5) * down, 6))]
            assert (red < 0.9 * blue) == bool(steps[m, 0, f])
        for c, f in np.ndindex(6, 4):
            red, _, blue = squares[tuple(np.round((c + 0.5) * left + (f + 0.5) * down, 6))]
            assert (red < 0.9 * blue) == bool(steps[0, c, f])


def test_colours_in_grey():
    greys = [np.dot(colour, [0.2126, 0.7152, 0.0722]) for colour in (FIRST, LATER, UNREACHED)]
    assert np.diff(greys).min() > 0.1


def test_plot_blocks_empty_panels(tmp_path):
    figure = plot_blocks({"BatchNorm": normalization_steps("batch", (2, 2, 1), (0, 0, 0)).numpy()})
    assert [bool(axes.collections) for axes in figure.axes] == [True, False, False]
    save_figure(figure, tmp_path / "one.png")


def test_normalization_steps_options():
    options = {"groups": 2, "channel_groups": 2, "layout": "interleaved"}
    reached = normalization_steps("seq-reversed", (6, 4, 2), (0, 0, 0), **options)
    assert (reached == 1)[:, 0].all(1).tolist() == [True, False] * 3  # Every second sample is in the group.
    assert not (reached == 1)[:, 1:].any()
