"""Which values of a batch a norm normalizes together, found by changing one of them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from landscape.analysis.labels import band_labels
from landscape.errors import LandscapeError
from landscape.norms.registry import REGISTRY, make_norm
from landscape.plotting.figure import LandscapeFigure, footnote

STEPS = {"seq": ("group", "seq"), "seq-ws": ("group", "seq-ws"), "seq-reversed": ("ghost", "seq-reversed")}
"""Norms of more than one step: the norm that the first step is, then that of all steps."""

FIGURE_1: tuple[tuple[str, dict[str, int]], ...] = (
    ("batch", {}),
    ("layer", {}),
    ("instance", {}),
    ("group", {"channel_groups": 2}),
    ("ghost", {"groups": 3}),
    ("seq", {"channel_groups": 2, "groups": 3}),
)
"""The norms of the paper's figure 1."""
BLOCK = (6, 6, 4)
"""M, C and F in figure 1: small enough to see every value."""


def dependence(norm: Callable[[Tensor], Tensor], shape: Sequence[int], at: Sequence[int]) -> Tensor:
    """Which outputs of a norm change when one value of its input does: those that are normalized together with it.

    These are the slices of Wu & He 2018 (arXiv:1803.08494), figure 2, and of Dimitriou & Arandjelovic 2020
    (arXiv:2007.08554), figure 1, without knowing their equations.

    Args:
        norm: From float64 (M, C, ...) to the same shape, such as a module in training mode and float64. It is called
            twice, so running statistics move.
        shape: Of the input: M samples, C channels, F positions in the remaining dimensions.
        at: Indices of the value that is changed.

    Returns:
        bool, of that shape.

    Raises:
        LandscapeError: There is no such value.
    """
    if len(at) != len(shape) or not all(0 <= index < size for index, size in zip(at, shape, strict=True)):
        raise LandscapeError(
            f"There is no value at {tuple(at)} in a batch of shape {tuple(shape)}; give an index for each."
        )
    x = torch.randn(prod(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).reshape(tuple(shape))
    changed = x.clone()
    changed[tuple(at)] += 1
    with torch.no_grad():
        return norm(x) != norm(changed)


def normalization_steps(norm: str, shape: Sequence[int], at: Sequence[int], **options: Any) -> Tensor:
    """After how many of a norm's steps a change of one value has reached each output.

    Args:
        norm: One of `landscape.names.NORMS`. All take one step but those in `STEPS`.
        shape: As for `dependence`.
        at: Likewise.
        **options: Keywords of the norm, as for :func:`landscape.make_norm`.

    Returns:
        int64, of that shape; 0 where the change never comes to.

    Raises:
        LandscapeError: As for :func:`landscape.make_norm`, for the norm on such an input and for `dependence`.
    """
    steps = STEPS.get(norm, (norm,))
    reached = torch.zeros(tuple(shape), dtype=torch.int64)
    for number, name in reversed(list(enumerate(steps, 1))):  # the first step last, as it is what counts
        own = {option: value for option, value in options.items() if name == norm or option in REGISTRY[name][1]}
        reached[dependence(make_norm(name, **own)(shape[1]).double(), shape, at)] = number
    return reached


def figure1_blocks() -> dict[str, Tensor]:
    """What the paper's figure 1 shows: `normalization_steps` from the value (0, 0, 0), by the title of each norm."""
    titles = band_labels(pd.DataFrame([{"norm": name, **options} for name, options in FIGURE_1]))
    blocks = starmap(lambda name, options: normalization_steps(name, BLOCK, (0, 0, 0), **options), FIGURE_1)
    return dict(zip(titles, blocks, strict=True))


ACROSS = np.array([[np.sqrt(0.75), 0.5], [-np.sqrt(0.75), 0.5], [0.0, -1.0]])
"""Where M, C and F point to on the page, from the corner that is nearest: right, left and down."""
LIGHT = (0.82, 0.91, 1.0)
"""Brightness of the faces M = 0, C = 0 and F = 0; of the left, the right and the upper one."""
UNREACHED, FIRST, LATER = (0.98, 0.98, 0.98), (0.20, 0.45, 0.75), (0.55, 0.76, 0.95)
CAPTION = (
    "A batch of M samples with C channels and F positions in each. Coloured: the outputs of the norm that change when "
    "the input value with the thick outline does, that is, the values that are normalized together with it; found by "
    "changing it. SeqNorm normalizes twice: GroupNorm takes the change to the dark values, GhostNorm from there to the "
    "light ones."
)


def plot_blocks(blocks: Mapping[str, np.ndarray]) -> Figure:
    """Draw blocks as they are seen from the corner of their value (0, 0, 0), each in a panel.

    After figure 2 of Wu & He 2018 (arXiv:1803.08494) and figure 1 of Dimitriou & Arandjelovic 2020 (arXiv:2007.08554).

    Args:
        blocks: By title, int (M, C, F): after how many steps a change of the value (0, 0, 0) is there, 0 for never.

    Returns:
        A figure, 8 inches wide, with three panels in a row.
    """
    rows = -(-len(blocks) // 3)
    with sns.axes_style("white"), sns.plotting_context("paper"):
        figure = LandscapeFigure(figsize=(8, 0.8 + 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, (title, steps) in zip(panels, blocks.items(), strict=False):
            _draw(axes, np.asarray(steps))
            axes.set_title(title)
        footnote(figure, CAPTION)
    return figure


def _draw(axes: Axes, steps: np.ndarray) -> None:
    """The three faces of a block that are in sight, the value (0, 0, 0), and what each dimension is."""
    for hidden, light in enumerate(LIGHT):
        seen = steps.take(0, axis=hidden)
        squares = [_square(place, hidden) for place in np.ndindex(seen.shape)]
        colours = [light * np.array(_colour(step)) for step in seen.ravel()]
        axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors="0.2", linewidths=0.4))
        corner = PolyCollection([_square((0, 0), hidden)], facecolors="none", edgecolors="black", linewidths=1.8)
        corner.set(zorder=3, joinstyle="round")
        axes.add_collection(corner)
    samples, channels, positions = np.diag(steps.shape)
    for words, middle, shift, turn in (
        ("M samples", samples / 2 + positions, (0.25, -0.45), 30),
        ("C channels", channels / 2 + positions, (-0.25, -0.45), -30),
        ("F positions", channels + positions / 2, (-0.5, 0.0), 90),
    ):
        x, y = middle @ ACROSS + shift
        axes.text(x, y, words, rotation=turn, ha="center", va="center", fontsize="small")
    axes.set_aspect("equal")
    axes.autoscale_view()


def _square(place: tuple[int, ...], hidden: int) -> np.ndarray:
    """Corners (4, 2) on the page of a value's side; ``place`` is where it is in the two dimensions of the face."""
    corners = np.add(place, [(0, 0), (1, 0), (1, 1), (0, 1)])
    return np.insert(corners, hidden, 0, axis=1) @ ACROSS


def _colour(step: int) -> tuple[float, float, float]:
    return (UNREACHED, FIRST)[step] if step < 2 else LATER
