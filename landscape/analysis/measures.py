"""What each update says of the landscape around it: the measures of smoothness, row by row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa

from landscape.errors import LandscapeError
from landscape.names import MEASURES, check_measure

REMEDIES = {
    "gradient_distances": "record with `landscape probe --gradients` or LandscapeProbe(..., gradients=True)",
    "slope": "traces have it from format version 2 on, so record the run anew",
}
"""What to do where a column that a measure needs is missing; by the first of these columns."""


def measured(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The frame with a measure of every update, taken over the points ``theta - eta_k d`` of the update's ray.

    With the loss ``L``, the gradient ``g`` at ``theta`` and the direction ``d``, at the K step sizes ``eta_k``:

    - ``loss``: ``L(theta - eta_k d)``.
    - ``predictiveness``: ``|grad L(theta - eta_k d) - g|``, the gradient predictiveness.
    - ``beta``: ``max_k |grad L(theta - eta_k d) - g| / (|eta_k| |d|)``, the effective beta-smoothness.
    - ``gap``: ``gap_k = L(theta - eta_k d) - (L(theta) - eta_k <g, d>)``, from the linear prediction to the loss.
    - ``curvature``: ``2 gap_k / (eta_k |d|)^2``, the mean of the second derivative by distance between ``theta`` and
      the point, weighted towards ``theta``. Where the loss is quadratic with Hessian ``H`` it is ``d'Hd / |d|^2``.

    The first three are those of Santurkar et al. 2018, section 3.1; the last two need no gradients along the ray. Step
    size 0 moves nothing, so ``beta`` and ``curvature`` leave it out. Losses of single precision are exact to some 1e-7
    of their size: where a step is short, this is seen in ``gap``, and in ``curvature`` divided by the squared distance.

    Args:
        frame: Rows of ``read_traces`` or ``TraceWriter.frame``.
        measure: ``"loss"``, ``"predictiveness"``, ``"beta"``, ``"gap"`` or ``"curvature"``.

    Returns:
        The frame with ``<measure>_min`` and ``<measure>_max`` of the K values: NaN if one of them is, or if there are
        none. With ``beta``, which is a maximum already, both are the column ``beta``. What is there is kept.

    Raises:
        LandscapeError: There is no such measure, no row holds what it needs, or a row has not one value per step size.
    """
    check_measure(measure)
    needs = MEASURES[measure].needs
    if needs and not has_inputs(frame, measure).any():
        raise LandscapeError(
            f"The measure {measure} needs {' and '.join(needs)}, which all rows lack (missing or NaN); "
            f"{REMEDIES[needs[0]]}, or choose another measure, such as loss."
        )
    low, high = f"{measure}_min", f"{measure}_max"
    if low in frame and high in frame:
        return frame
    rays = _Rays.of(frame, MEASURES[measure].along, MEASURES[measure].at_zero)
    with np.errstate(all="ignore"):  # inf - inf and 0 / 0 are NaN, and that is what is to be known of them
        smallest, largest = rays.extremes(_FORMULAS[measure](rays))
    if measure == "beta":
        return frame.assign(beta=largest, beta_min=largest, beta_max=largest)
    return frame.assign(**{low: smallest, high: largest})


def flatten_lists(frame: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as all values, one after the other, and their number in each row; a missing list has none."""
    lists = (
        pa.Table.from_pandas(frame[[name]], preserve_index=False)
        .column(0)
        .combine_chunks()
        .cast(pa.list_(pa.float64()))
    )
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(zero_copy_only=False), counts


def has_inputs(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether each row holds what the measure needs; bool (rows,)."""
    held = np.ones(len(frame), bool)
    for name in MEASURES[measure].needs:
        held &= frame[name].notna().to_numpy() if name in frame else False
    return held


@dataclass(frozen=True)
class _Rays:
    """The points of all rays, one after the other, as arrays (P,)."""

    frame: pd.DataFrame
    row: np.ndarray
    """Position of the row that a point belongs to, ascending."""
    eta: np.ndarray
    value: np.ndarray
    """Loss or distance of gradients at the point."""

    @classmethod
    def of(cls, frame: pd.DataFrame, along: str, at_zero: bool) -> Self:
        """The points of the rows that have values, without those at step size 0 unless ``at_zero``."""
        (value, counts), (eta, expected) = flatten_lists(frame, along), flatten_lists(frame, "step_sizes")
        if (wrong := np.flatnonzero((counts > 0) & (counts != expected))).size:
            raise LandscapeError(
                f"Row {wrong[0]} has {counts[wrong[0]]} {along} at {expected[wrong[0]]} step sizes; "
                "give rows of read_traces or LandscapeProbe.frame."
            )
        row, eta = np.repeat(np.arange(len(frame)), counts), eta[np.repeat(counts > 0, expected)]
        kept = slice(None) if at_zero else eta != 0
        return cls(frame, row[kept], eta[kept], value[kept])

    def each(self, name: str) -> np.ndarray:
        """A column's value for every point."""
        return self.frame[name].to_numpy(float, na_value=np.nan)[self.row]

    def extremes(self, values: np.ndarray) -> np.ndarray:
        """Smallest and largest of the values of each row, (2, rows); NaN if one of them is, or if there are none."""
        extremes = np.full((2, len(self.frame)), np.nan)
        if len(values):
            first = np.flatnonzero(np.diff(self.row, prepend=-1))
            extremes[0, self.row[first]] = np.minimum.reduceat(values, first)
            extremes[1, self.row[first]] = np.maximum.reduceat(values, first)
        return extremes


def _as_recorded(rays: _Rays) -> np.ndarray:
    return rays.value


def _beta(rays: _Rays) -> np.ndarray:
    return rays.value / np.abs(rays.eta * rays.each("direction_norm"))


def _gap(rays: _Rays) -> np.ndarray:
    return rays.value - (rays.each("loss") - rays.eta * rays.each("slope"))


def _curvature(rays: _Rays) -> np.ndarray:
    return 2 * _gap(rays) / (rays.eta * rays.each("direction_norm")) ** 2


_FORMULAS: dict[str, Callable[[_Rays], np.ndarray]] = {
    "loss": _as_recorded,
    "predictiveness": _as_recorded,
    "beta": _beta,
    "gap": _gap,
    "curvature": _curvature,
}
