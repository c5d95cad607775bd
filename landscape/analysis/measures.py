"""Measures of smoothness of the loss landscape, update by update."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa

from landscape.analysis.columns import normalized
from landscape.analysis.curve import Curves
from landscape.errors import LandscapeError
from landscape.names import MEASURES, NEGATIVE, check_measure

REMEDIES = {
    "gradient_distances": "Record with `landscape probe --gradients` or LandscapeProbe(..., gradients=True)",
    "gradient_cosines": "Record with `landscape probe --gradients` or LandscapeProbe(..., gradients=True)",
    "slope": "Record the run again, because traces have it from format version 2 on",
    "direction_norm": "Record the run again, because traces have it from format version 2 on",
    NEGATIVE: "Record with `landscape probe --step-sizes=-0.2,0.2,0.4` or "
    "LandscapeProbe(..., step_sizes=[-0.2, 0.2, 0.4])",
}
"""Remedy by the first missing column that a measure requires."""


def measured(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the frame with a measure of every update.

    A measure is computed along the ray ``theta - eta_k d`` of the update, at the K step sizes ``eta_k``. With the loss
    ``L``, its gradient ``g`` at ``theta`` and the direction ``d``, the K values are:

    - ``loss``: ``L(theta - eta_k d)``.
    - ``predictiveness``: ``|grad L(theta - eta_k d) - g|``, the gradient predictiveness.
    - ``beta``: ``max_k |grad L(theta - eta_k d) - g| / (|eta_k| |d|)``, the effective beta-smoothness (1 value).
    - ``gap``: ``gap_k = L(theta - eta_k d) - (L(theta) - eta_k <g, d>)``, the error of the linear prediction.
    - ``curvature``: ``2 gap_k / (eta_k |d|)^2``. This is a weighted mean of the second derivative of ``L`` by distance
      between ``theta`` and the point, with more weight near ``theta``. If ``L`` is quadratic with Hessian ``H``, it is
      ``d'Hd / |d|^2``.
    - ``cosine``: cosine between ``grad L(theta - eta_k d)`` and ``g``.

    The others are one value per update. With ``s = <g, d>``, the range ``R = max_k L_k - min_k L_k`` and
    ``gap(eta) = L(theta - eta d) - L(theta) + eta s``, read from the curve through the points
    (:class:`landscape.analysis.curve.Curves`):

    - ``range``: ``R``.
    - ``relative_range``: ``R / ((max_k eta_k - min_k eta_k) |s|)``; 1 on a linear loss.
    - ``lost_share``: ``gap(lr) / (lr s)``, the share of the promised decrease that is lost at the learning rate; 0 on a
      linear loss, 1 where the loss does not fall (for gradient descent, sharpness 2 / lr: the edge of stability).
    - ``sharpness``: ``2 gap(lr) / (lr |d|)^2``.
    - ``batch_sharpness``: ``d'Hd / |d|^2``, the limit of ``2 gap(eta) / (eta |d|)^2`` for ``eta -> 0``.
    - ``optimal_step``: ``argmin_eta L(theta - eta d)`` for ``0 <= eta <= max_k eta_k``.
    - ``critical_step``: smallest ``eta > 0`` with ``L(theta - eta d) >= L(theta)``.
    - ``critical_sharpness``: ``2 / critical_step``.
    - ``lipschitz``: ``max_{i != j} |L_i - L_j| / (|eta_i - eta_j| |d|)``, with ``L(theta)`` at 0 among the points.
    - ``misfit``: root mean square of ``L_k - (L(theta) - eta_k s + c eta_k^2)`` with the best ``c``, divided by ``R``.
    - ``sam_sharpness``: ``L(theta + rho d / |d|) - L(theta)`` with ``rho = |d| max_k(-eta_k)``, at the most negative
      step size. Along the gradient it is the sharpness that one step of sharpness-aware minimization sees, at the
      radius ``rho`` (Foret et al. 2021, arXiv:2010.01412).

    Points at negative step sizes lie uphill, and are not of the band: the measures with K values, ``range``,
    ``relative_range``, ``lipschitz`` and ``misfit`` leave them out unless a row has no others. The curve passes through
    them, too, so ``batch_sharpness`` with the nearest points at ``eta`` and ``-eta`` is the two-sided
    ``(L(theta - eta d) - 2 L(theta) + L(theta + eta d)) / (eta |d|)^2``, of which the slope is no part.

    Units: ``loss`` and ``gap`` are in units of the loss, ``predictiveness`` is loss / parameter, ``beta``,
    ``curvature``, ``sharpness`` and ``batch_sharpness`` are loss / parameter^2, ``range`` and ``sam_sharpness`` are in
    units of the loss, ``lipschitz`` is loss / parameter, ``optimal_step`` and ``critical_step`` have the unit of the
    learning rate and ``critical_sharpness`` its inverse; the others have none. The norms are l2 norms over all
    parameters.

    The first 3 are defined in Santurkar et al. 2018 (arXiv:1805.11604), section 3.1. ``beta`` and ``curvature`` omit
    step size 0, where they are undefined. Losses in single precision have relative errors of about 1e-7. On short steps
    this error is visible in ``gap``, and in ``curvature`` it is divided by the squared distance.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        measure: Name of one of them.

    Returns:
        The frame with two more columns, ``<measure>_min`` and ``<measure>_max``: minimum and maximum of the K values,
        or NaN if a value is NaN or there is none. For a measure with one value, both equal a third column
        ``<measure>``, which is NaN if one of the losses is not finite (except ``beta``), or the learning rate is 0 or
        beyond the largest step size. ``optimal_step``, ``critical_step`` and ``critical_sharpness`` have one more
        column, ``<measure>_inside``: False where the step size lies beyond the largest one, which is then the value of
        the step (right-censored), and missing where it is NaN. A frame that has the columns is returned unchanged.

    Raises:
        LandscapeError: The measure does not exist, no row has the columns that it requires, or a row has not exactly
            one value per step size.

    Examples:
        The ray of ``L(theta) = theta^2`` at ``theta = 1``, with ``g = d = 2`` and second derivative 2:

        >>> frame = pd.DataFrame({"loss": [1.0], "slope": [4.0], "direction_norm": [2.0], "step_sizes": [[0.25, 0.5]],
        ...                       "losses": [[0.25, 0.0]], "gradient_distances": [[1.0, 2.0]]})
        >>> measured(frame, "gap")[["gap_min", "gap_max"]].values.tolist()
        [[0.25, 1.0]]
        >>> measured(frame, "curvature")[["curvature_min", "curvature_max"]].values.tolist()
        [[2.0, 2.0]]
        >>> float(measured(frame, "beta")["beta"][0])
        2.0
    """
    check_measure(measure)
    frame = normalized(frame)
    needs = MEASURES[measure].needs
    if needs and not has_inputs(frame, measure).any():
        raise LandscapeError(
            f"measure={measure!r}: requires {' and '.join(needs)}, missing or NaN in all rows. "
            f"{REMEDIES[needs[0]]}, or use another measure, such as loss."
        )
    low, high = f"{measure}_min", f"{measure}_max"
    if low in frame and high in frame:
        return frame
    normalized(frame, ("step_sizes", MEASURES[measure].along, *(("loss",) if "slope" in needs else ())))
    rays = _Rays.of(frame, MEASURES[measure].along, MEASURES[measure].at_zero)
    rays = rays if measure in _TWO_SIDED else rays.forward()
    with np.errstate(all="ignore"):  # inf - inf and 0 / 0 are NaN on purpose.
        if measure in _UPDATES:
            return frame.assign(**_scalar(measure, *_UPDATES[measure](rays)))
        smallest, largest = rays.extremes(_POINTS[measure](rays))
    return frame.assign(**({low: smallest, high: largest} if measure != "beta" else _scalar(measure, largest)))


def _scalar(measure: str, value: np.ndarray, inside: np.ndarray | None = None) -> dict[str, Any]:
    """Return the columns of one value per update."""
    columns: dict[str, Any] = dict.fromkeys((measure, f"{measure}_min", f"{measure}_max"), value)
    if inside is not None:
        columns[f"{measure}_inside"] = pd.arrays.BooleanArray(inside, np.isnan(value))
    return columns


def flatten_lists(frame: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated values of lists, and their counts.

    Args:
        frame: Frame with the column.
        name: Name of the column; its values are lists, arrays or missing.

    Returns:
        The values, (P,), and the number of values in each row, (rows,), which is 0 for a missing list.
    """
    lists = (
        pa.Table.from_pandas(frame[[name]], preserve_index=False)
        .column(0)
        .combine_chunks()
        .cast(pa.list_(pa.float64()))
    )
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(zero_copy_only=False), counts


def has_inputs(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Return True for each row with the required columns.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        measure: A measure of :func:`measured`.

    Returns:
        bool, (rows,).
    """
    held = np.ones(len(frame), bool)
    for name in MEASURES[measure].needs:
        if name == NEGATIVE:
            held &= _has_negative(frame)
        else:
            held &= frame[name].notna().to_numpy() if name in frame else False
    return held


def _has_negative(frame: pd.DataFrame) -> np.ndarray:
    eta, counts = flatten_lists(frame, "step_sizes") if "step_sizes" in frame else ([], np.zeros(len(frame), int))
    return np.bincount(np.repeat(np.arange(len(frame)), counts)[np.asarray(eta) < 0], minlength=len(frame)) > 0


@dataclass(frozen=True)
class _Rays:
    """Points of all rays, concatenated into arrays (P,)."""

    frame: pd.DataFrame
    row: np.ndarray
    """Position of the row of each point, ascending."""
    eta: np.ndarray
    value: np.ndarray
    """Loss, or distance of gradients, at each point."""

    @classmethod
    def of(cls, frame: pd.DataFrame, along: str, at_zero: bool) -> Self:
        """Return the points of the rows that have values.

        Args:
            frame: Rows with ``step_sizes`` and the column ``along``.
            along: Column of lists with one value per step size.
            at_zero: Keep the points at step size 0.
        """
        (value, counts), (eta, expected) = flatten_lists(frame, along), flatten_lists(frame, "step_sizes")
        if (wrong := np.flatnonzero((counts > 0) & (counts != expected))).size:
            raise LandscapeError(
                f"Row {wrong[0]} has {counts[wrong[0]]} {along} at {expected[wrong[0]]} step sizes: must have one "
                "value per step size. Use rows of read_traces or LandscapeProbe.frame."
            )
        row, eta = np.repeat(np.arange(len(frame)), counts), eta[np.repeat(counts > 0, expected)]
        kept = slice(None) if at_zero else eta != 0
        return cls(frame, row[kept], eta[kept], value[kept])

    def forward(self) -> Self:
        """Return the points that do not lie uphill.

        A row without such a point keeps all.
        """
        ahead = self.eta >= 0
        kept = ahead | (np.bincount(self.row[ahead], minlength=len(self.frame)) == 0)[self.row]
        return replace(self, row=self.row[kept], eta=self.eta[kept], value=self.value[kept])

    def searched(self) -> Self:
        """Return the points, with those of a search.

        That for the critical step goes on below a loss that is not finite, which is left out.
        """
        if "critical_losses" not in self.frame:
            return self
        more = _Rays.of(self.frame.assign(step_sizes=self.frame["critical_step_sizes"]), "critical_losses", True)
        kept = np.isfinite(more.value)
        pairs = ((self.row, more.row), (self.eta, more.eta), (self.value, more.value))
        row, eta, value = (np.concatenate([own, of[kept]]) for own, of in pairs)
        return replace(self, row=row, eta=eta, value=value)

    def each(self, name: str) -> np.ndarray:
        """Return the value of a column for every point."""
        return self.column(name)[self.row]

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column, (rows,)."""
        return self.frame[name].to_numpy(float, na_value=np.nan)

    def curves(self) -> Curves:
        """Return the curves through the points."""
        return Curves.through(self.row, self.eta, self.value, self.column("loss"), self.column("slope"))

    def extremes(self, values: np.ndarray) -> np.ndarray:
        """Return minimum and maximum of each row, (2, rows).

        Both are NaN for a row with a NaN or without values.
        """
        extremes = np.full((2, len(self.frame)), np.nan)
        if len(values):
            first = np.flatnonzero(np.diff(self.row, prepend=-1))
            extremes[0, self.row[first]] = np.minimum.reduceat(values, first)
            extremes[1, self.row[first]] = np.maximum.reduceat(values, first)
        return extremes


def _recorded(rays: _Rays) -> np.ndarray:
    return rays.value


def _beta(rays: _Rays) -> np.ndarray:
    return rays.value / np.abs(rays.eta * rays.each("direction_norm"))


def _gap(rays: _Rays) -> np.ndarray:
    return rays.value - (rays.each("loss") - rays.eta * rays.each("slope"))


def _curvature(rays: _Rays) -> np.ndarray:
    return 2 * _gap(rays) / (rays.eta * rays.each("direction_norm")) ** 2


_POINTS: dict[str, Callable[[_Rays], np.ndarray]] = {
    "loss": _recorded,
    "predictiveness": _recorded,
    "beta": _beta,
    "gap": _gap,
    "curvature": _curvature,
    "cosine": _recorded,
}
"""Formulas with a value for each point."""


def _range(rays: _Rays) -> tuple[np.ndarray]:
    low, high = rays.extremes(rays.value)
    return (high - low,)


def _relative_range(rays: _Rays) -> tuple[np.ndarray]:
    low, high = rays.extremes(rays.eta)
    return (_range(rays)[0] / ((high - low) * np.abs(rays.column("slope"))),)


def _lost_share(rays: _Rays) -> tuple[np.ndarray]:
    lr = rays.column("lr")
    return (rays.curves().q_at(lr) * lr / rays.column("slope"),)


def _sharpness(rays: _Rays) -> tuple[np.ndarray]:
    return (2 * rays.curves().q_at(rays.column("lr")) / rays.column("direction_norm") ** 2,)


def _batch_sharpness(rays: _Rays) -> tuple[np.ndarray]:
    return (2 * rays.curves().limit / rays.column("direction_norm") ** 2,)


def _optimal_step(rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    return rays.curves().optimal_step()


def _critical_step(rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    return rays.searched().curves().critical_step()


def _critical_sharpness(rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    step, inside = _critical_step(rays)
    return 2 / step, inside


def _lipschitz(rays: _Rays) -> tuple[np.ndarray]:
    # The largest slope of a chord is that of two neighbours.
    rows = np.arange(len(rays.frame))
    row = np.concatenate([rays.row, rows])
    eta = np.concatenate([rays.eta, np.zeros(len(rows))])
    value = np.concatenate([rays.value, rays.column("loss")])
    order = np.lexsort((eta, row))
    row, eta, value = row[order], eta[order], value[order]
    chord = (row[1:] == row[:-1]) & (eta[1:] != eta[:-1])
    steepness = np.abs(np.diff(value)[chord]) / np.diff(eta)[chord]
    largest = _Rays(rays.frame, row[1:][chord], eta[1:][chord], steepness).extremes(steepness)[1]
    lowest, highest = rays.extremes(rays.value)
    known = np.isfinite(lowest) & np.isfinite(highest)
    return (np.where(known, largest / rays.column("direction_norm"), np.nan),)


def _misfit(rays: _Rays) -> tuple[np.ndarray]:
    gap, square, rows = _gap(rays), rays.eta**2, len(rays.frame)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(rays.row, values, rows)

    best = total(gap * square) / total(square**2)
    residual = np.sqrt(total((gap - best[rays.row] * square) ** 2) / total(np.ones(len(gap))))
    several = total((rays.eta != 0).astype(float)) > 1  # A parabola fits a single point.
    return (np.where(several, residual / _range(rays)[0], np.nan),)


def _sam_sharpness(rays: _Rays) -> tuple[np.ndarray]:
    farthest = rays.extremes(rays.eta)[0]
    at = (rays.eta < 0) & (rays.eta == farthest[rays.row])
    rise = np.full(len(rays.frame), np.nan)
    rise[rays.row[at]] = (rays.value - rays.each("loss"))[at]
    return (np.where(np.isfinite(rise), rise, np.nan),)


_UPDATES: dict[str, Callable[[_Rays], tuple[np.ndarray] | tuple[np.ndarray, np.ndarray]]] = {
    "range": _range,
    "relative_range": _relative_range,
    "lost_share": _lost_share,
    "sharpness": _sharpness,
    "batch_sharpness": _batch_sharpness,
    "optimal_step": _optimal_step,
    "critical_step": _critical_step,
    "critical_sharpness": _critical_sharpness,
    "lipschitz": _lipschitz,
    "misfit": _misfit,
    "sam_sharpness": _sam_sharpness,
}
"""Formulas with one value for each update, and whether it is inside the step sizes."""
_TWO_SIDED = {
    *("lost_share", "sharpness", "batch_sharpness", "optimal_step", "critical_step", "critical_sharpness"),
    "sam_sharpness",
}
"""Measures that read points at negative step sizes, too."""
