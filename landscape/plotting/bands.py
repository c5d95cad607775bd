"""What a panel shows: the points of its bands, where they break off, its axis, and whether one band hides another."""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.scale import SymmetricalLogTransform

from landscape.analysis.measures import measured
from landscape.analysis.summary import envelope, has_measure, is_finite
from landscape.errors import LandscapeError
from landscape.names import MEASURES, MeasureInfo

POINTS = 1000
"""Most points of a band: about as many as a page has pixels."""


class Band(NamedTuple):
    """The points of one band; NaN interrupts the drawing. Where a measure has no line, the line is NaN throughout."""

    x: np.ndarray
    line: np.ndarray
    low: np.ndarray
    high: np.ndarray


Bands = dict[str, Band]


class NonFiniteMarks(NamedTuple):
    """Where a band has updates that are not finite, over ``x``."""

    spans: np.ndarray
    """From where to where each of its points has such an update, (S, 2)."""
    first: np.ndarray
    """The first such update of each run that has any."""


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


class PanelData(NamedTuple):
    """The bands of one measure and the axis that they are drawn on."""

    measure: MeasureInfo
    bands: Bands
    scale: Scale
    limit: float | None
    """Where the axis ends, on either side of 0, if not beyond all values; bands are clipped there."""
    marks: dict[str, NonFiniteMarks]
    """Of the bands that have updates that are not finite."""
    interrupted: bool
    """Whether a band is broken where rows are missing."""


def panel_data(frame: pd.DataFrame, x: str, measure: str, scale: str) -> PanelData:
    """The bands of a measure over ``x``, with NaN where no update is finite and where rows are missing.

    Args:
        frame: Rows with a column ``band``.
        x: ``"step"`` or ``"epoch"``.
        measure: A measure of :func:`landscape.analysis.measures.measured`.
        scale: ``"log"``, ``"symlog"`` or ``"linear"``, or ``"auto"``, which is linear for up to a decade.

    Raises:
        LandscapeError: A value has no place on a logarithmic axis, or the measure cannot be had from the frame.
    """
    name, frame = MEASURES[measure], measured(frame, measure)
    points = envelope(frame, x, by="band", bins=POINTS, measure=measure)
    points["line"] = points[measure] if name.line else np.nan
    columns = [x, "line", *((f"{measure}_min", f"{measure}_max") if name.band else ("line", "line"))]
    rows = pd.DataFrame(frame[["band", x]]).assign(run=frame.get("run", ""), finite=is_finite(frame, measure))
    rows = pd.DataFrame(rows[has_measure(frame, measure)])
    bands, resumed = {}, _gap_ends(rows, x)
    for label, band in points.groupby("band", observed=True):
        bands[str(label)] = _insert_gaps(Band(*band[columns].to_numpy(float).T), resumed[str(label)])
    fitting = _scale(_values(bands), measure, scale)
    if limit := _limit(bands, fitting):
        bands = {label: Band(band.x, *(part.clip(-limit, limit) for part in band[1:])) for label, band in bands.items()}
    interrupted = sum(len(band.x) for band in bands.values()) > len(points)
    return PanelData(name, bands, fitting, limit, _marks(points, rows, x), interrupted)


def _gap_ends(rows: pd.DataFrame, x: str) -> dict[str, np.ndarray]:
    """For each band the values of ``x`` where its record goes on, after some where none of its runs has rows.

    Updates are probed at regular distances, or at irregular ones where time decides. Rows are missing where a distance
    is far out of those of its run: beyond Tukey's outer fence, three interquartile ranges above the upper quartile.
    """
    rows = pd.DataFrame(rows[["band", "run", x]]).sort_values(["band", "run", x])
    run = rows.groupby(["band", "run"], observed=True, sort=False).ngroup()
    distance = rows[x].groupby(run).diff()
    low, high = (distance.groupby(run).quantile(share, interpolation="lower") for share in (0.25, 0.75))
    # Equal distances have no range, and differ by rounding.
    fence = np.maximum(high + 3 * (high - low), 1.5 * high)
    begins = (distance.isna() | (distance > run.map(fence))).to_numpy()
    stretches = rows[begins].assign(end=rows[x].to_numpy()[np.append(begins[1:], True)])
    resumed = {}
    for label, band in stretches.sort_values(x).groupby("band", observed=True):
        start, reached = band[x].to_numpy(), np.maximum.accumulate(band["end"].to_numpy())
        resumed[str(label)] = start[1:][start[1:] > reached[:-1]]
    return resumed


def _insert_gaps(band: Band, resumed: np.ndarray) -> Band:
    """The band with NaN before the points where its record goes on."""
    before = np.unique(np.searchsorted(band.x, resumed))
    before = before[before < len(band.x)]
    between = (band.x[before - 1] + band.x[before]) / 2
    return Band(np.insert(band.x, before, between), *(np.insert(part, before, np.nan) for part in band[1:]))


def _marks(points: pd.DataFrame, rows: pd.DataFrame, x: str) -> dict[str, NonFiniteMarks]:
    """The marks of the bands that have updates that are not finite: their points, and the rows that they join."""
    first = rows[~rows["finite"]].groupby(["band", "run"], observed=True, as_index=False).agg(x=(x, "min"))
    marks = {}
    for label, band in points.groupby("band", observed=True):
        lost = band["not_finite"].to_numpy() > 0
        if lost.any():
            of_band = np.asarray(first["band"] == label)
            marks[str(label)] = NonFiniteMarks(_spans(band[x].to_numpy(), lost), np.asarray(first["x"])[of_band])
    return marks


def _spans(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """From where to where neighbouring points are all chosen; a point reaches halfway to the next."""
    middle = (x[1:] + x[:-1]) / 2
    change = np.flatnonzero(np.diff(np.pad(chosen, 1).astype(int)))
    return np.concatenate([x[:1], middle, x[-1:]])[change].reshape(-1, 2)


def _values(bands: Bands) -> np.ndarray:
    values = np.concatenate([part for band in bands.values() for part in band[1:]])
    return values[np.isfinite(values)]


def _limit(bands: Bands, scale: Scale) -> float | None:
    """About ten times what is usual, where some values go far beyond: a divergence flattens all else.

    Usual is what nineteen of twenty values are below. Where more than one of twenty explodes, it is what the axis can
    show beside the values that runs begin with and beside the median.
    """
    values = _values(bands)
    sizes, starts = np.abs(values), [part[np.isfinite(part)][:1] for band in bands.values() for part in band[1:]]
    if not len(values):
        return None
    begin = max(np.median(sizes), np.abs(np.concatenate(starts)).max())
    usual = min(np.quantile(sizes, 0.95), begin if scale.name == "linear" else 100 * begin)
    return float(f"{10 * usual:.0e}") if 0 < 100 * usual < sizes.max() else None


def _scale(values: np.ndarray, measure: str, scale: str) -> Scale:
    smallest = values.min(initial=np.inf)
    if scale == "log" and smallest <= 0:
        raise LandscapeError(
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


def draw_order(view: PanelData) -> Bands:
    """The order of drawing: small bands lie over large ones."""
    heights = {label: np.nansum(_height(band.low, band.high, view.scale)) for label, band in view.bands.items()}
    return dict(sorted(view.bands.items(), key=lambda item: -heights[item[0]]))


def bands_overlap(view: PanelData) -> bool:
    """Whether a band would lie with more than two thirds of its area under a smaller one."""
    drawn = draw_order(view).values()
    return any(_covered(large, small, view.scale) > 2 / 3 for large, small in combinations(drawn, 2))


def _height(low: np.ndarray, high: np.ndarray, scale: Scale) -> np.ndarray:
    return scale.seen(high) - scale.seen(low)


def _covered(large: Band, small: Band, scale: Scale) -> float:
    _, i, j = np.intersect1d(large.x, small.x, return_indices=True)
    low, high = np.maximum(large.low[i], small.low[j]), np.minimum(large.high[i], small.high[j])
    area = np.nansum(_height(large.low[i], large.high[i], scale))
    return np.nansum(_height(low, high, scale).clip(0)) / area if area else 0.0
