"""Figure 1: an (M, C, F) block for each norm, with the values that are normalized together in colour."""

from collections.abc import Mapping

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from landscape.plots import LandscapeFigure, footnote

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
