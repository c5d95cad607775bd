"""Measures joined over updates and runs: a frame in, a smaller frame out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from landscape.analysis.labels import group_keys
from landscape.analysis.measures import has_inputs, measured
from landscape.errors import LandscapeError
from landscape.names import MEASURES


def envelope(
    frame: pd.DataFrame, x: str = "step", by: str | Sequence[str] = "run", bins: int = 1000, measure: str = "loss"
) -> pd.DataFrame:
    """The band of every group over ``x``, in at most ``bins`` points and without losing an extreme.

    Neighbouring values of ``x`` share a bin, the same one in all groups; up to ``bins`` distinct values each have their
    own. All runs of a group are joined: the band spans the smallest to the largest of them. Updates with a value that
    is NaN or infinite are counted and left out of the band, and runs that did not record what the measure needs
    (:func:`recorded`) of everything.

    Args:
        frame: Rows of ``read_traces`` or ``TraceWriter.frame``.
        x: ``"step"`` or ``"epoch"``.
        by: Columns whose values make the groups; ``"band"`` stands for ``band_labels(frame)``.
        bins: Most points per group.
        measure: What the band is of: a measure of :func:`landscape.analysis.measures.measured`.

    Returns:
        One row per group and bin: ``x`` (the bin's first), ``<measure>_min`` and ``<measure>_max`` (smallest and
        largest value of the updates that are :func:`finite`, NaN without one), ``updates`` (rows joined) and
        ``not_finite`` (those of them that are not). The measures ``loss`` and ``beta`` have a line, too: in a column of
        that name, the mean over what is finite.

    Raises:
        LandscapeError: A column is missing, ``x`` was not recorded, or there is no such measure or nothing that it needs.
    """
    keys = group_keys(frame, by, x)
    if pd.isna(frame[x].to_numpy()).any():
        raise LandscapeError(f"The trace does not know the {x} of every update; choose another x, such as step.")
    frame = measured(frame, measure)
    names, whole = [measure, f"{measure}_min", f"{measure}_max"], is_finite(frame, measure)
    rows = keys.assign(
        x=frame[x],
        bin=_bins(frame[x].to_numpy(), bins),
        line=frame[measure].where(np.isfinite) if MEASURES[measure].line else np.nan,
        low=frame[names[1]].where(whole),
        high=frame[names[2]].where(whole),
        not_finite=~whole,
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


def _bins(x: np.ndarray, bins: int) -> np.ndarray:
    values, position = np.unique(x, return_inverse=True)
    return position * min(bins, len(values)) // max(len(values), 1)


def summarize(frame: pd.DataFrame, by: str | Sequence[str] = "run", measure: str = "loss") -> pd.DataFrame:
    """How rough the landscape was: for each update one number, averaged over the updates of a group.

    For ``loss`` that number is the range of the probed losses, ``loss_max - loss_min``; for every other measure it is
    the value of the largest magnitude among those at the K step sizes, without its sign.

    Args:
        frame: Rows of ``read_traces`` or ``TraceWriter.frame``.
        by: Columns whose values make the groups, such as ``("band", "epoch")``: ``band`` stands for
            ``band_labels(frame)``, and ``epoch`` counts the passes completed, so that the first one is 0.
        measure: A measure of :func:`landscape.analysis.measures.measured`.

    Returns:
        One row per group: ``updates`` probed, ``not_finite`` (those that are not :func:`finite`), ``first_not_finite``
        (the step of the first of them, missing if there is none), ``mean_range`` and ``median_range`` over the other
        updates (``mean_beta`` and ``median_beta`` for ``beta``, and so on), ``mean_loss`` over the finite training
        losses, and the ``seconds`` that probing took. A mean over nothing is NaN. Updates of runs that did not record
        what the measure needs (:func:`recorded`) are not counted.

    Raises:
        LandscapeError: A column is missing, or there is no such measure or nothing that it needs.
    """
    keys = group_keys(frame, by, "step", "loss", "seconds")
    if "epoch" in keys:
        keys["epoch"] = np.floor(keys["epoch"]).astype("Int64")
    frame = measured(frame, measure)
    known, whole = has_measure(frame, measure), is_finite(frame, measure)
    loss = frame["loss"].where(np.isfinite(frame["loss"]))
    rows = keys.assign(
        _known=known,
        _not_finite=known & ~whole,
        _first=frame["step"].astype("Int64").where(known & ~whole),
        _size=_size(frame, measure).where(whole),
        _loss=loss,
        _seconds=frame["seconds"],
    )
    return rows.groupby(list(keys.columns), observed=True, dropna=False, as_index=False).agg(
        updates=("_known", "sum"),
        not_finite=("_not_finite", "sum"),
        first_not_finite=("_first", "min"),
        **{f"{average}_{size_name(measure)}": ("_size", average) for average in ("mean", "median")},
        mean_loss=("_loss", "mean"),
        seconds=("_seconds", "sum"),
    )


def size_name(measure: str) -> str:
    """What ``summarize`` averages, as in its column ``mean_range``."""
    return measure if MEASURES[measure].has_origin else "range"


def _size(frame: pd.DataFrame, measure: str) -> pd.Series:
    low, high = frame[f"{measure}_min"], frame[f"{measure}_max"]
    return pd.Series(np.maximum(low.abs(), high.abs()) if MEASURES[measure].has_origin else high - low)


def is_finite(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether all that the measure says of each update is finite, the line as well as the K values; bool (rows,).

    Args:
        frame: Rows with the columns of :func:`landscape.analysis.measures.measured`.
        measure: Its measure.
    """
    # The extremes are NaN or infinite if one of the K values is.
    columns = [f"{measure}_min", f"{measure}_max", *([measure] if MEASURES[measure].line else [])]
    return np.logical_and.reduce([np.isfinite(frame[column].to_numpy()) for column in columns])


def has_measure(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether each row is of a run that recorded what the measure needs, at any of its updates; bool (rows,)."""
    known = has_inputs(frame, measure)
    if known.all():
        return known
    keys = group_keys(frame, ("run", "band")).assign(known=known)
    return keys.groupby(["run", "band"], observed=True, dropna=False)["known"].transform("any").to_numpy()
