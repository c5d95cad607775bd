"""Data of a panel: points and gaps of its bands, the axis, and the order of drawing."""

from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.scale import SymmetricalLogTransform

from landscape.analysis.measures import measured
from landscape.analysis.summary import bins_of, envelope, has_measure, is_finite
from landscape.errors import LandscapeError
from landscape.names import MEASURES, MeasureInfo

POINTS = 1000
"""Maximum number of points of a band: about the width of a page in pixels."""


QUARTILE_BINS = 60
"""Maximum number of bins of :func:`quartiles_over_training`."""
SHARE_LIMIT = 3.0
"""Largest magnitude that its axis shows."""


class Band(NamedTuple):
    """Points of one band, as arrays (P,).

    NaN is a gap. The line of a measure without a line is NaN everywhere.
    """

    x: np.ndarray
    line: np.ndarray
    low: np.ndarray
    high: np.ndarray


Bands = dict[str, Band]


class NonFiniteMarks(NamedTuple):
    """Positions over ``x`` of the updates that are not finite."""

    spans: np.ndarray
    """Start and end of each interval whose points all have such an update, (S, 2)."""
    first: np.ndarray
    """First such update of each run."""


class Scale(NamedTuple):
    """Scale of an axis; ``"symlog"`` is linear within ``±linear``."""

    name: str
    linear: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of matplotlib's scale."""
        return {"linthresh": self.linear} if self.name == "symlog" else {}

    def axis_position(self, values: np.ndarray) -> np.ndarray:
        """Return positions of values along the axis, in any unit."""
        if self.name == "symlog":
            return SymmetricalLogTransform(10, self.linear, 1).transform(values)
        return np.log(values) if self.name == "log" else values


class PanelData(NamedTuple):
    """Bands of one measure, and their axis."""

    measure: MeasureInfo
    bands: Bands
    scale: Scale
    limit: float | None
    """Largest magnitude on the axis, where bands are clipped; None if nothing is clipped."""
    marks: dict[str, NonFiniteMarks]
    """Marks by label, for bands with updates that are not finite."""
    interrupted: bool
    """True if a band has a gap because rows are missing."""


def panel_data(frame: pd.DataFrame, x: str, measure: str, scale: str) -> PanelData:
    """Return the bands of a measure over the training run.

    They have NaN at points without a finite update, and between two points if rows are missing there.

    Args:
        frame: Rows with a column ``band``.
        x: ``"step"`` or ``"epoch"``.
        measure: A measure of :func:`landscape.measured`.
        scale: ``"log"``, ``"symlog"``, ``"linear"`` or ``"auto"``, as for :func:`landscape.plot_landscape`.

    Raises:
        LandscapeError: A value is 0 or less and the scale is ``"log"``, or the frame does not have what the measure
            requires.
    """
    name, frame = MEASURES[measure], measured(frame, measure)
    points = envelope(frame, x, by="band", bins=POINTS, measure=measure)
    points["line"] = points[measure] if name.line else np.nan
    columns = [x, "line", *((f"{measure}_min", f"{measure}_max") if name.band else ("line", "line"))]
    rows = pd.DataFrame(frame[["band", x]]).assign(run=frame.get("run", ""), finite=is_finite(frame, measure))
    rows = pd.DataFrame(rows[has_measure(frame, measure)])
    bands, ends = {}, gap_ends(rows, x)
    for label, band in points.groupby("band", observed=True):
        bands[str(label)] = _insert_gaps(Band(*band[columns].to_numpy(float).T), ends[str(label)])
    fitting = _scale(_values(bands), measure, scale)
    if limit := _limit(bands, fitting):
        bands = _clipped(bands, limit)
    interrupted = sum(len(band.x) for band in bands.values()) > len(points)
    return PanelData(name, bands, fitting, limit, _marks(points, rows, x), interrupted)


def quartiles_over_training(frame: pd.DataFrame, x: str, measure: str) -> PanelData:
    """Return median and quartiles of a measure, in few bins.

    A bin has equally many of the updates, and all seeds. The median is the line and the quartiles are the band. There
    is no band where no update has a finite value, as of lost shares if every step size is below the learning rate.

    Args:
        frame: Rows with a column ``band``.
        x: ``"step"`` or ``"epoch"``.
        measure: A measure of :func:`landscape.measured` with a line and no band.
    """
    frame = measured(frame, measure)
    finite = has_measure(frame, measure) & is_finite(frame, measure)
    rows = pd.DataFrame(frame[["band", x, measure]]).assign(bin=bins_of(frame[x].to_numpy(), QUARTILE_BINS))[finite]
    bands = {}
    for label, band in rows.groupby("band", observed=True):
        bins = band.groupby("bin")
        columns = [bins[x].mean(), *(bins[measure].quantile(share) for share in (0.5, 0.25, 0.75))]
        bands[str(label)] = Band(*(column.to_numpy(float) for column in columns))
    title = measure.replace("_", " ")
    info = replace(MEASURES[measure], title=title, band="first to third quartile", line="median")
    values = _values(bands)
    limit = SHARE_LIMIT if len(values) and np.abs(values).max() > SHARE_LIMIT else None
    if limit:
        bands = _clipped(bands, limit)
    return PanelData(info, bands, Scale("linear"), limit, {}, False)


def gap_ends(rows: pd.DataFrame, x: str) -> dict[str, np.ndarray]:
    """Return the ``x`` of the first row after each gap.

    A gap of a band is an interval in which rows of all its runs are missing. Updates are probed at regular distances
    or, if a time budget decides, at irregular ones. So rows of a run are missing between two neighbours if their
    distance is an outlier among the distances of that run: beyond Tukey's outer fence, which is 3 interquartile ranges
    above the upper quartile. For example, after updates 0, 10, 20, 30 and 40 the next row is expected at 50, and if it
    is 100, a gap ends at 100. If another run of the band has rows from 40 to 100, the band has no gap.

    Args:
        rows: Rows with the columns ``band``, ``run`` and ``x``, in any order.
        x: Name of the column.

    Returns:
        An ascending array for each label.
    """
    rows = pd.DataFrame(rows[["band", "run", x]]).sort_values(["band", "run", x])
    run = rows.groupby(["band", "run"], observed=True, sort=False).ngroup()
    distance = rows[x].groupby(run).diff()
    low, high = (distance.groupby(run).quantile(share, interpolation="lower") for share in (0.25, 0.75))
    # Equal distances have an interquartile range of 0 and differ by rounding errors.
    fence = np.maximum(high + 3 * (high - low), 1.5 * high)
    begins = (distance.isna() | (distance > run.map(fence))).to_numpy()
    stretches = rows[begins].assign(end=rows[x].to_numpy()[np.append(begins[1:], True)])
    ends = {}
    for label, band in stretches.sort_values(x).groupby("band", observed=True):
        start, covered = band[x].to_numpy(), np.maximum.accumulate(band["end"].to_numpy())
        ends[str(label)] = start[1:][start[1:] > covered[:-1]]
    return ends


def _insert_gaps(band: Band, ends: np.ndarray) -> Band:
    """Insert a NaN in the middle of each gap."""
    before = np.unique(np.searchsorted(band.x, ends))
    before = before[before < len(band.x)]
    between = (band.x[before - 1] + band.x[before]) / 2
    return Band(np.insert(band.x, before, between), *(np.insert(part, before, np.nan) for part in band[1:]))


def _marks(points: pd.DataFrame, rows: pd.DataFrame, x: str) -> dict[str, NonFiniteMarks]:
    first = rows[~rows["finite"]].groupby(["band", "run"], observed=True, as_index=False).agg(x=(x, "min"))
    marks = {}
    for label, band in points.groupby("band", observed=True):
        lost = band["not_finite"].to_numpy() > 0
        if lost.any():
            of_band = np.asarray(first["band"] == label)
            marks[str(label)] = NonFiniteMarks(_spans(band[x].to_numpy(), lost), np.asarray(first["x"])[of_band])
    return marks


def _spans(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return start and end of each sequence of chosen points."""
    middle = (x[1:] + x[:-1]) / 2  # A point extends halfway to its neighbours.
    change = np.flatnonzero(np.diff(np.pad(chosen, 1).astype(int)))
    return np.concatenate([x[:1], middle, x[-1:]])[change].reshape(-1, 2)


def _clipped(bands: Bands, limit: float) -> Bands:
    return {label: Band(band.x, *(part.clip(-limit, limit) for part in band[1:])) for label, band in bands.items()}


def _values(bands: Bands) -> np.ndarray:
    values = np.concatenate([np.empty(0), *(part for band in bands.values() for part in band[1:])])
    return values[np.isfinite(values)]


def _limit(bands: Bands, scale: Scale) -> float | None:
    """Return the end of an axis with outliers.

    Without a limit, one divergence would flatten all bands. The limit is about 10 times the usual magnitude, and None
    unless a value exceeds 100 times the usual one. Usual is the 95 % quantile; in case more than 5 % of the values
    explode, it is bounded by the first values of the bands and the median (100 times these on a logarithmic axis).
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
            f"scale='log': the {measure} must be positive, but is {smallest:.4g} in places. Use 'linear' or 'symlog'."
        )
    scale = _fitting(values, smallest, MEASURES[measure].has_origin) if scale == "auto" else scale
    return Scale(scale, _small(values)) if scale == "symlog" else Scale(scale)


def _fitting(values: np.ndarray, smallest: float, has_origin: bool) -> str:
    if smallest > 0:
        return "log" if values.max(initial=0) > 10 * smallest else "linear"
    return "symlog" if has_origin and np.abs(values).max() > 100 * _small(values) else "linear"


def _small(values: np.ndarray) -> float:
    """Return a power of 10 below 95 % of magnitudes."""
    sizes = np.abs(values[values != 0])
    return 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.05))) if len(sizes) else 1.0


def draw_order(view: PanelData) -> Bands:
    """Return the bands, largest area on the axis first."""
    heights = {label: np.nansum(_height(band.low, band.high, view.scale)) for label, band in view.bands.items()}
    return dict(sorted(view.bands.items(), key=lambda item: -heights[item[0]]))


def bands_overlap(view: PanelData) -> bool:
    """Return True if a band covers 2/3 of another."""
    drawn = draw_order(view).values()
    return any(_covered(large, small, view.scale) > 2 / 3 for large, small in combinations(drawn, 2))


def _height(low: np.ndarray, high: np.ndarray, scale: Scale) -> np.ndarray:
    return scale.axis_position(high) - scale.axis_position(low)


def _covered(large: Band, small: Band, scale: Scale) -> float:
    _, i, j = np.intersect1d(large.x, small.x, return_indices=True)
    low, high = np.maximum(large.low[i], small.low[j]), np.minimum(large.high[i], small.high[j])
    area = np.nansum(_height(large.low[i], large.high[i], scale))
    return np.nansum(_height(low, high, scale).clip(0)) / area if area else 0.0
