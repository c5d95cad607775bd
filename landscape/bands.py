"""What a panel shows: the points of its bands, the scale of its axis, and whether one band would hide another."""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.scale import SymmetricalLogTransform

from landscape.errors import UserError
from landscape.measures import envelope
from landscape.vocabulary import MEASURES, MeasureName

POINTS = 1000
"""Most points of a band: about as many as a page has pixels."""


class Band(NamedTuple):
    """The points of one band; NaN interrupts the drawing. Where a measure has no line, the line is NaN throughout."""

    x: np.ndarray
    line: np.ndarray
    low: np.ndarray
    high: np.ndarray


Bands = dict[str, Band]


class Scale(NamedTuple):
    """The scale of an axis; a symmetric logarithmic one is linear between ``-linear`` and ``linear``."""

    name: str
    linear: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """What matplotlib's scale of this name asks for."""
        return {"linthresh": self.linear} if self.name == "symlog" else {}

    def seen(self, values: np.ndarray) -> np.ndarray:
        """Where values are on the axis, up to a factor."""
        if self.name == "symlog":
            return SymmetricalLogTransform(10, self.linear, 1).transform(values)
        return np.log(values) if self.name == "log" else values


class View(NamedTuple):
    """The bands of one measure and the scale that they are drawn on."""

    measure: MeasureName
    bands: Bands
    scale: Scale
    top: float | None = None
    """Where the axis ends, if that is below the largest value."""


def view_of(frame: pd.DataFrame, x: str, measure: str, scale: str) -> View:
    """The bands of a measure over ``x``, with NaN where a value of an update is NaN or infinite.

    Args:
        frame: Rows with a column ``band``.
        x: ``"step"`` or ``"epoch"``.
        measure: A measure of :func:`landscape.smoothness.measured`.
        scale: ``"log"``, ``"symlog"`` or ``"linear"``, or ``"auto"``, which is linear for up to a decade.

    Raises:
        UserError: A value has no place on a logarithmic axis, or the measure cannot be had from the frame.
    """
    name = MEASURES[measure]
    points = envelope(frame, x, by="band", bins=POINTS, measure=measure)
    edges = [f"{measure}_min", f"{measure}_max"]
    points.loc[points["not_finite"] > 0, edges] = np.nan
    points["line"] = points[measure] if name.line else np.nan
    columns = [x, "line", *(edges if name.band else ["line", "line"])]
    bands = {str(label): Band(*band[columns].to_numpy().T) for label, band in points.groupby("band", observed=True)}
    values = np.concatenate([part for band in bands.values() for part in (band.line, band.low, band.high)])
    values = values[np.isfinite(values)]
    return View(name, bands, _scale(values, measure, scale), _top(values))


def _top(values: np.ndarray) -> float | None:
    """Ten times what nineteen of twenty values are below, where some go far beyond: a divergence flattens all else."""
    if not len(values) or (usual := np.quantile(np.abs(values), 0.95)) == 0 or values.max() <= 100 * usual:
        return None
    return float(10 * usual)


def _scale(values: np.ndarray, measure: str, scale: str) -> Scale:
    smallest = values.min(initial=np.inf)
    if scale == "log" and smallest <= 0:
        raise UserError(
            f"A {measure} of {smallest:.4g} has no place on a logarithmic axis; choose scale linear or symlog."
        )
    scale = _fitting(values, smallest, MEASURES[measure].has_origin) if scale == "auto" else scale
    return Scale(scale, _small(values)) if scale == "symlog" else Scale(scale)


def _fitting(values: np.ndarray, smallest: float, has_origin: bool) -> str:
    if smallest > 0:
        return "log" if values.max(initial=0) > 10 * smallest else "linear"
    return "symlog" if has_origin and np.abs(values).max() > 100 * _small(values) else "linear"


def _small(values: np.ndarray) -> float:
    """The power of ten that nineteen of twenty values are beyond, on either side of 0."""
    sizes = np.abs(values[values != 0])
    return 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.05))) if len(sizes) else 1.0


def largest_first(view: View) -> Bands:
    """The order of drawing: small bands lie over large ones."""
    heights = {label: np.nansum(_height(band.low, band.high, view.scale)) for label, band in _visible(view).items()}
    return dict(sorted(view.bands.items(), key=lambda item: -heights[item[0]]))


def hides(view: View) -> bool:
    """Whether a band would lie with more than two thirds of its area under a smaller one."""
    seen = _visible(view)
    drawn = [seen[label] for label in largest_first(view)]
    return any(_covered(large, small, view.scale) > 2 / 3 for large, small in combinations(drawn, 2))


def _visible(view: View) -> Bands:
    """The bands as far as the axis goes."""
    if view.top is None:
        return view.bands
    return {label: Band(band.x, *(part.clip(max=view.top) for part in band[1:])) for label, band in view.bands.items()}


def _height(low: np.ndarray, high: np.ndarray, scale: Scale) -> np.ndarray:
    return scale.seen(high) - scale.seen(low)


def _covered(large: Band, small: Band, scale: Scale) -> float:
    _, i, j = np.intersect1d(large.x, small.x, return_indices=True)
    low, high = np.maximum(large.low[i], small.low[j]), np.minimum(large.high[i], small.high[j])
    area = np.nansum(_height(large.low[i], large.high[i], scale))
    return np.nansum(_height(low, high, scale).clip(0)) / area if area else 0.0
