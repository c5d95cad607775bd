"""Colours and line styles of norms, the same in every figure."""

from collections.abc import Collection
from math import log2

import seaborn as sns
from matplotlib.colors import to_rgb

from landscape.names import NORMS

Colour = tuple[float, ...]

# From dark to light: none, GhostNorm by its groups, BatchNorm. So the norms of the paper differ in grey, too.
SHADES = {
    "none": ("#1f1f3d",),
    "batch": ("#f7c95c",),
    "ghost": ("#7cc4ec", "#0a4f91"),
    "seq": ("#a4d9a0", "#10632c"),
    "group": ("#eaa5cf", "#8a1c63"),
    "layer": ("#c9432b",),
    "instance": ("#7a5c43",),
}
"""Colour of a norm; for norms with groups that of 1 group and that of 256 or more."""
LAST = 8.0
"""Power of 2 from which on more groups do not change the colour."""
LINES = ("-", (0, (7, 1.5)), (0, (2.5, 1)), (0, (7, 1.5, 1.5, 1.5)))
"""Line styles of bands that share a panel, in the order of drawing."""


def colours_of(labels: Collection[str]) -> dict[str, Colour]:
    """Return the colour of each band, whatever else is drawn.

    A norm has its own hue, darker with more groups. Bands of one norm that differ in other settings are lighter from
    one to the next. Bands without a known norm have colours from light to dark.

    Args:
        labels: Labels of :func:`landscape.analysis.labels.band_labels`.

    Examples:
        >>> few, many = ["BatchNorm", "GhostNorm (G=16)"], ["GhostNorm (G=16)", "GhostNorm (G=128)", "No normalization"]
        >>> colours_of(few)["GhostNorm (G=16)"] == colours_of(many)["GhostNorm (G=16)"]
        True
    """
    known = {label: colour for label in labels if (colour := _of_norm(label))}
    unknown = [label for label in labels if label not in known]
    colours = known | dict(zip(unknown, sns.color_palette("plasma_r", len(unknown)), strict=True))
    seen: dict[Colour, int] = {}
    for label, colour in known.items():
        lighter = 0.22 * min(seen.get(colour, 0), 3)
        colours[label] = tuple(part + lighter * (1 - part) for part in colour)
        seen[colour] = seen.get(colour, 0) + 1
    return {label: colours[label] for label in labels}


def _of_norm(label: str) -> Colour | None:
    """Return the colour of a label's norm and groups."""
    titled = [key for key, info in NORMS.items() if label.startswith(info.title)]
    norm = max(titled, key=lambda key: len(NORMS[key].title), default="")  # SeqNorm is also a part of SeqNorm reversed.
    if norm not in SHADES:
        return None
    ends = [to_rgb(shade) for shade in SHADES[norm]]
    part = min(log2(_groups(label)) / LAST, 1.0)
    return tuple(first + part * (last - first) for first, last in zip(ends[0], ends[-1], strict=True))


def _groups(label: str) -> int:
    """Return the number of groups in a label."""
    parts = label.partition("(")[2].partition(")")[0].replace(",", " ").split()
    numbers = [part.partition("=")[2] for part in parts if part.startswith("G") and "=" in part]
    return max(1, int(numbers[-1])) if numbers and numbers[-1].isdigit() else 1
