"""Figure 1: the values of a batch that each norm normalizes together, found by changing one value."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from landscape.analysis.labels import band_labels
from landscape.errors import LandscapeError
from landscape.norms.registry import REGISTRY, make_norm
from landscape.plotting.figure import LandscapeFigure, figure_style, footnote

FIGURE_1: tuple[tuple[str, dict[str, int]], ...] = (
    ("batch", {}),
    ("layer", {}),
    ("instance", {}),
    ("group", {"channel_groups": 2}),
    ("ghost", {"groups": 3}),
    ("seq", {"channel_groups": 2, "groups": 3}),
)
"""Norms of the figure, with their options."""
BLOCK = (6, 6, 4)
"""M, C and F of the figure."""
STEPS = {"seq": ("group", "seq"), "seq-ws": ("group", "seq-ws"), "seq-reversed": ("ghost", "seq-reversed")}
"""Norms of two steps: the norm of the first step, and the whole norm."""

AXES = np.array([[np.sqrt(0.75), 0.5], [-np.sqrt(0.75), 0.5], [0.0, -1.0]])
"""Directions of M, C and F in the drawing, from the nearest corner: right, left and down."""
BRIGHTNESS = (0.82, 0.91, 1.0)
"""Brightness of the faces M = 0 (left), C = 0 (right) and F = 0 (top)."""
UNREACHED, FIRST, LATER = (0.98, 0.98, 0.98), (0.20, 0.45, 0.75), (0.55, 0.76, 0.95)
CAPTION = (
    "A batch of M samples with C channels and F positions each. Colours mark the outputs of a norm that change if the "
    "outlined input value changes: these values are normalized together. SeqNorm normalizes twice: the change reaches "
    "the dark values in its GroupNorm and the light values in its GhostNorm."
)


def figure1_blocks() -> dict[str, Tensor]:
    """Return the blocks of the paper's figure 1.

    Returns:
        :func:`normalization_steps` from the value (0, 0, 0), int64 (6, 6, 4), by the title of each norm.

    Examples:
        >>> blocks = figure1_blocks()
        >>> list(blocks)[3:]
        ['GroupNorm (G_C=2)', 'GhostNorm (G=3)', 'SeqNorm (G_C=2, G_M=3)']
        >>> blocks["GhostNorm (G=3)"][:, 0, 0].tolist()
        [1, 1, 0, 0, 0, 0]
    """
    titles = band_labels(pd.DataFrame([{"norm": name, **options} for name, options in FIGURE_1]))
    blocks = [normalization_steps(name, BLOCK, (0, 0, 0), **options) for name, options in FIGURE_1]
    return dict(zip(titles, blocks, strict=True))


def normalization_steps(norm: str, shape: Sequence[int], at: Sequence[int], **options: Any) -> Tensor:
    """Return after which step a change has reached each output.

    Args:
        norm: Name of a norm, as for :func:`landscape.make_norm`. The norms in `STEPS` have two steps, others one.
        shape: Shape of the input: M samples, C channels, F positions in the remaining dimensions.
        at: Indices of the input value that is changed.
        **options: Options of the norm, as for :func:`landscape.make_norm`.

    Returns:
        int64, ``shape``: 1 or 2, or 0 for outputs that do not change.

    Raises:
        LandscapeError: The norm does not exist, its options do not match the input, or there is no value at ``at``.

    Examples:
        >>> normalization_steps("seq", (4, 2, 2), (0, 0, 0), groups=2, channel_groups=1)[..., 0].tolist()
        [[1, 1], [2, 2], [0, 0], [0, 0]]
    """
    steps = STEPS.get(norm, (norm,))
    reached = torch.zeros(tuple(shape), dtype=torch.int64)
    # The first step is evaluated last, to overwrite the number of the second step.
    for number, name in reversed(list(enumerate(steps, 1))):
        own = {option: value for option, value in options.items() if name == norm or option in REGISTRY[name][1]}
        reached[dependence(make_norm(name, **own)(shape[1]).double(), shape, at)] = number
    return reached


def dependence(norm: Callable[[Tensor], Tensor], shape: Sequence[int], at: Sequence[int]) -> Tensor:
    """Return True for outputs that depend on one input value.

    For a norm, these are the values that are normalized together with it, the slices in Wu & He 2018
    (arXiv:1803.08494), figure 2, and Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), figure 1. They are found without
    the equations of the norm, by changing the value.

    Args:
        norm: Function from float64 (M, C, ...) to the same shape, such as a float64 module in training mode. It is
            called twice, so running statistics change.
        shape: Shape of the input: M samples, C channels, F positions in the remaining dimensions.
        at: Indices of the input value that is changed.

    Returns:
        bool, ``shape``.

    Raises:
        LandscapeError: There is no value at ``at``.

    Examples:
        >>> dependence(make_norm("batch")(2).double(), (3, 2), (0, 1)).tolist()
        [[False, True], [False, True], [False, True]]
    """
    if len(at) != len(shape) or not all(0 <= index < size for index, size in zip(at, shape, strict=True)):
        raise LandscapeError(
            f"at={tuple(at)}: no value in a batch of shape {tuple(shape)}. Use one index in range per dimension."
        )
    x = torch.randn(prod(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).reshape(tuple(shape))
    changed = x.clone()
    changed[tuple(at)] += 1
    with torch.no_grad():
        return norm(x) != norm(changed)


def plot_blocks(blocks: Mapping[str, np.ndarray]) -> Figure:
    """Draw blocks in perspective, each in a panel.

    The nearest corner of a block is its value (0, 0, 0), as in Wu & He 2018 (arXiv:1803.08494), figure 2, and
    Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), figure 1.

    Args:
        blocks: Results of :func:`normalization_steps` from the value (0, 0, 0), int (M, C, F), by title.

    Returns:
        A figure, 8 inches wide, with 3 panels in a row.

    Examples:
        >>> figure = plot_blocks({"BatchNorm": normalization_steps("batch", (2, 2, 1), (0, 0, 0)).numpy()})
        >>> figure.axes[0].get_title()
        'BatchNorm'
    """
    rows = -(-len(blocks) // 3)
    with figure_style():
        figure = LandscapeFigure(figsize=(8, 0.8 + 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, (title, steps) in zip(panels, blocks.items(), strict=False):
            _draw_block(axes, np.asarray(steps))
            axes.set_title(title)
        footnote(figure, CAPTION)
    return figure


def _draw_block(axes: Axes, steps: np.ndarray) -> None:
    """Draw the 3 visible faces, their outlines and labels."""
    for hidden, brightness in enumerate(BRIGHTNESS):
        face = steps.take(0, axis=hidden)
        squares = [_square(place, hidden) for place in np.ndindex(face.shape)]
        colours = [brightness * np.array((UNREACHED, FIRST, LATER)[min(step, 2)]) for step in face.ravel()]
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
        x, y = middle @ AXES + shift
        axes.text(x, y, words, rotation=turn, ha="center", va="center", fontsize="small")
    axes.set_aspect("equal")
    axes.autoscale_view()


def _square(place: tuple[int, ...], hidden: int) -> np.ndarray:
    """Return the corners of a drawn value, (4, 2).

    Args:
        place: Position of the value on its face, in the 2 dimensions other than ``hidden``.
        hidden: Dimension whose index is 0 on the face.
    """
    corners = np.add(place, [(0, 0), (1, 0), (1, 1), (0, 1)])
    return np.insert(corners, hidden, 0, axis=1) @ AXES
