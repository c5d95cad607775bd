"""Aggregates of a measure over updates and runs: bands over training, and one row per group."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from landscape.analysis.columns import normalized
from landscape.analysis.labels import group_keys
from landscape.analysis.measures import has_inputs, measured
from landscape.errors import LandscapeError
from landscape.names import MEASURES


def envelope(
    frame: pd.DataFrame, x: str = "step", by: str | Sequence[str] = "run", bins: int = 1000, measure: str = "loss"
) -> pd.DataFrame:
    """Return the band of every group over the training run.

    The distinct values of ``x``, sorted and the same for all groups, are divided into at most ``bins`` bins, and the
    rows of a group in a bin become one point. Over those of its updates ``u`` whose values ``m_k(u)`` are all finite::

        <measure>_min = min_u min_k m_k(u),    <measure>_max = max_u max_k m_k(u)

    so no extreme is lost, and the runs of a group are joined in one band.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        x: ``"step"`` or ``"epoch"``.
        by: Columns whose values define the groups; ``"band"`` stands for :func:`band_labels`.
        bins: Maximum number of points per group.
        measure: A measure of :func:`measured`.

    Returns:
        One row per group and bin, with the columns ``by`` and: ``x`` (smallest in the bin), ``<measure>_min`` and
        ``<measure>_max`` (NaN if no update is finite), ``updates`` (number of rows) and ``not_finite`` (number of rows
        with a NaN or infinite value). Measures with a line have one more column, ``<measure>``: the mean of its finite
        values. Runs that did not record what the measure requires have no rows.

    Raises:
        LandscapeError: A column is missing, ``x`` is NaN in a row, the measure does not exist, or no run recorded what
            it requires.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 1, 2], "loss": [3.0, 2.0, 1.0], "loss_min": [2.0, 1.0, 0.5],
        ...                       "loss_max": [4.0, 5.0, np.inf]})
        >>> envelope(frame, bins=2)[["step", "loss", "loss_min", "loss_max", "updates", "not_finite"]]
           step  loss  loss_min  loss_max  updates  not_finite
        0     0   2.5       1.0       5.0        2           0
        1     2   1.0       NaN       NaN        1           1
    """
    frame = normalized(frame, (x, "loss") if measure == "loss" else (x,))
    keys = group_keys(frame, by, x)
    if pd.isna(frame[x].to_numpy()).any():
        raise LandscapeError(f"x={x!r}: missing or NaN in some rows. Use another x, such as step.")
    frame = measured(frame, measure)
    names, finite = [measure, f"{measure}_min", f"{measure}_max"], is_finite(frame, measure)
    rows = keys.assign(
        x=frame[x],
        bin=bins_of(frame[x].to_numpy(), bins),
        line=frame[measure].where(np.isfinite) if MEASURES[measure].line else np.nan,
        low=frame[names[1]].where(finite),
        high=frame[names[2]].where(finite),
        not_finite=~finite,
    )
    groups = pd.DataFrame(rows[has_measure(frame, measure)]).groupby(
        [*keys.columns, "bin"], observed=True, dropna=False
    )
    joined = groups.agg(
        x=("x", "min"),
        line=("line", "mean"),
        low=("low", "min"),
        high=("high", "max"),
        updates=("x", "size"),
        not_finite=("not_finite", "sum"),
    )
    joined = joined if MEASURES[measure].line else joined.drop(columns="line")
    columns = dict(zip(["x", "line", "low", "high"], [x, *names], strict=True))
    return joined.droplevel("bin").reset_index().rename(columns=columns)


def bins_of(x: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each row."""
    values, position = np.unique(x, return_inverse=True)
    return position * min(bins, len(values)) // max(len(values), 1)


def summarize(frame: pd.DataFrame, by: str | Sequence[str] = "run", measure: str = "loss") -> pd.DataFrame:
    """Return the mean and median roughness of every group.

    The size of an update is the range of its losses, ``max_k L_k - min_k L_k``, for ``loss``; the value itself for a
    measure with one value; the smallest cosine for ``cosine``; and the largest magnitude, ``max_k |m_k|``, for the
    others. Mean and median are over the updates of a group whose values are all finite.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        by: Columns whose values define the groups, such as ``("band", "epoch")``. ``"band"`` stands for
            :func:`band_labels`, and ``"epoch"`` is the number of completed epochs, so the first epoch is 0.
        measure: A measure of :func:`measured`.

    Returns:
        One row per group, with the columns ``by`` and: ``updates`` (number of probed updates), ``seconds`` (time of all
        probes), ``mean_loss`` (mean of the finite training losses), ``first_not_finite`` (step of the first update with
        a NaN or infinite value, or missing), ``not_finite`` (number of these updates), and ``median_range`` and
        ``mean_range`` (for another measure ``median_<measure>`` and ``mean_<measure>``). A mean of no values is NaN.
        Updates of runs that did not record what the measure requires are not counted in ``updates``.

    Raises:
        LandscapeError: A column is missing, the measure does not exist, or no run recorded what it requires.

    Examples:
        >>> frame = pd.DataFrame({"run": ["a", "a", "b"], "step": [0, 1, 0], "loss": [3.0, 2.0, 3.0], "seconds": 0.5,
        ...                       "loss_min": [2.0, 1.0, 2.0], "loss_max": [4.0, 5.0, np.inf]})
        >>> summarize(frame)[["run", "updates", "not_finite", "mean_range", "seconds"]]
          run  updates  not_finite  mean_range  seconds
        0   a        2           0         3.0      1.0
        1   b        1           1         NaN      0.5
    """
    frame = normalized(frame, ("step", "loss", "seconds"))
    keys = group_keys(frame, by, "step", "loss", "seconds")
    if "epoch" in keys:
        keys["epoch"] = np.floor(keys["epoch"]).astype("Int64")
    frame = measured(frame, measure)
    known, finite = has_measure(frame, measure), is_finite(frame, measure)
    loss = frame["loss"].where(np.isfinite(frame["loss"]))
    rows = keys.assign(
        _known=known,
        _not_finite=known & ~finite,
        _first=frame["step"].astype("Int64").where(known & ~finite),
        _size=size_of(frame, measure).where(finite),
        _loss=loss,
        _seconds=frame["seconds"],
    )
    return rows.groupby(list(keys.columns), observed=True, dropna=False, as_index=False).agg(
        # In a narrow terminal pandas elides columns in the middle, so the sizes come last.
        updates=("_known", "sum"),
        seconds=("_seconds", "sum"),
        mean_loss=("_loss", "mean"),
        first_not_finite=("_first", "min"),
        not_finite=("_not_finite", "sum"),
        **{f"{average}_{size_name(measure)}": ("_size", average) for average in ("median", "mean")},
    )


def size_name(measure: str) -> str:
    """Return the suffix of the column ``mean_range``."""
    return measure if MEASURES[measure].has_origin else "range"


def size_of(frame: pd.DataFrame, measure: str) -> pd.Series:
    """Return the size of each update, as :func:`summarize` defines it.

    Args:
        frame: Frame returned by ``measured(frame, measure)``.
        measure: A measure of :func:`measured`.
    """
    info = MEASURES[measure]
    low, high = (frame[f"{measure}_{end}"].to_numpy(float, na_value=np.nan) for end in ("min", "max"))
    if not info.has_origin:
        sizes = high - low
    elif not info.band or info.smoother == "higher":
        sizes = low
    else:
        sizes = np.maximum(np.abs(low), np.abs(high))
    return pd.Series(sizes, frame.index)


def is_finite(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Return True for each row whose values are finite.

    Args:
        frame: Frame returned by ``measured(frame, measure)``.
        measure: A measure of :func:`measured`.

    Returns:
        bool, (rows,): the K values of the row are finite, and so is its line if the measure has one.
    """
    # Minimum or maximum is NaN or infinite if one of the K values is.
    columns = [f"{measure}_min", f"{measure}_max", *([measure] if MEASURES[measure].line else [])]
    return np.logical_and.reduce([np.isfinite(frame[column].to_numpy()) for column in columns])


def has_measure(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Return True for each row whose run has the measure.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        measure: A measure of :func:`measured`.

    Returns:
        bool, (rows,): at least one update of the row's run and band has the columns that the measure requires.
    """
    known = has_inputs(frame, measure)
    if known.all():
        return known
    keys = group_keys(frame, ("run", "band")).assign(known=known)
    return keys.groupby(["run", "band"], observed=True, dropna=False)["known"].transform("any").to_numpy()
