"""Measures of smoothness of the loss landscape, update by update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa

from landscape.analysis.columns import normalized
from landscape.errors import LandscapeError
from landscape.names import MEASURES, check_measure

REMEDIES = {
    "gradient_distances": "Record with `landscape probe --gradients` or LandscapeProbe(..., gradients=True)",
    "slope": "Record the run again, because traces have it from format version 2 on",
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

    Units: ``loss`` and ``gap`` are in units of the loss, ``predictiveness`` is loss / parameter, ``beta`` and
    ``curvature`` are loss / parameter^2. The norms are l2 norms over all parameters.

    The first 3 are defined in Santurkar et al. 2018 (arXiv:1805.11604), section 3.1. The last 2 require no gradients
    along the ray. ``beta`` and ``curvature`` omit step size 0, where they are undefined. Losses in single precision
    have relative errors of about 1e-7. On short steps this error is visible in ``gap``, and in ``curvature`` it is
    divided by the squared distance.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        measure: ``"loss"``, ``"predictiveness"``, ``"beta"``, ``"gap"`` or ``"curvature"``.

    Returns:
        The frame with two more columns, ``<measure>_min`` and ``<measure>_max``: minimum and maximum of the K values,
        or NaN if a value is NaN or there is none. For ``beta``, both equal a third column ``beta``. A frame that has
        the two columns is returned unchanged.

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
    with np.errstate(all="ignore"):  # inf - inf and 0 / 0 are NaN on purpose.
        smallest, largest = rays.extremes(_FORMULAS[measure](rays))
    if measure == "beta":
        return frame.assign(beta=largest, beta_min=largest, beta_max=largest)
    return frame.assign(**{low: smallest, high: largest})


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
        held &= frame[name].notna().to_numpy() if name in frame else False
    return held


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

    def each(self, name: str) -> np.ndarray:
        """Return the value of a column for every point."""
        return self.frame[name].to_numpy(float, na_value=np.nan)[self.row]

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


_FORMULAS: dict[str, Callable[[_Rays], np.ndarray]] = {
    "loss": _recorded,
    "predictiveness": _recorded,
    "beta": _beta,
    "gap": _gap,
    "curvature": _curvature,
}
