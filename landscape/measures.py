"""Measures joined over updates and runs: a frame in, a smaller frame out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.errors import UserError
from landscape.printing import short
from landscape.smoothness import holds, measured
from landscape.vocabulary import MEASURES, NORMS, NormName

SETTINGS = ("dataset", "model", "batch_size", "base_lr", "direction")
"""Facts that join a band's label when runs differ in them."""


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
        measure: What the band is of: a measure of :func:`landscape.smoothness.measured`.

    Returns:
        One row per group and bin: ``x`` (the bin's first), ``<measure>_min`` and ``<measure>_max`` (smallest and
        largest value of the updates that are :func:`finite`, NaN without one), ``updates`` (rows joined) and
        ``not_finite`` (those of them that are not). The measures ``loss`` and ``beta`` have a line, too: in a column of
        that name, the mean over what is finite.

    Raises:
        UserError: A column is missing, ``x`` was not recorded, or there is no such measure or nothing that it needs.
    """
    keys = _keys(frame, by, x)
    if pd.isna(frame[x].to_numpy()).any():
        raise UserError(f"The trace does not know the {x} of every update; choose another x, such as step.")
    frame = measured(frame, measure)
    names, whole = [measure, f"{measure}_min", f"{measure}_max"], finite(frame, measure)
    rows = keys.assign(
        x=frame[x],
        bin=_bins(frame[x].to_numpy(), bins),
        line=frame[measure].where(np.isfinite) if MEASURES[measure].line else np.nan,
        low=frame[names[1]].where(whole),
        high=frame[names[2]].where(whole),
        not_finite=~whole,
    )
    groups = pd.DataFrame(rows[recorded(frame, measure)]).groupby([*keys.columns, "bin"], observed=True, dropna=False)
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
        measure: A measure of :func:`landscape.smoothness.measured`.

    Returns:
        One row per group: ``updates`` probed, ``not_finite`` (those that are not :func:`finite`), ``first_not_finite``
        (the step of the first of them, missing if there is none), ``mean_range`` and ``median_range`` over the other
        updates (``mean_beta`` and ``median_beta`` for ``beta``, and so on), ``mean_loss`` over the finite training
        losses, and the ``seconds`` that probing took. A mean over nothing is NaN. Updates of runs that did not record
        what the measure needs (:func:`recorded`) are not counted.

    Raises:
        UserError: A column is missing, or there is no such measure or nothing that it needs.
    """
    keys = _keys(frame, by, "step", "loss", "seconds")
    if "epoch" in keys:
        keys["epoch"] = np.floor(keys["epoch"]).astype("Int64")
    frame = measured(frame, measure)
    known, whole = recorded(frame, measure), finite(frame, measure)
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


def finite(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether all that the measure says of each update is finite, the line as well as the K values; bool (rows,).

    Args:
        frame: Rows with the columns of :func:`landscape.smoothness.measured`.
        measure: Its measure.
    """
    # The extremes are NaN or infinite if one of the K values is.
    columns = [f"{measure}_min", f"{measure}_max", *([measure] if MEASURES[measure].line else [])]
    return np.logical_and.reduce([np.isfinite(frame[column].to_numpy()) for column in columns])


def recorded(frame: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether each row is of a run that recorded what the measure needs, at any of its updates; bool (rows,)."""
    known = holds(frame, measure)
    if known.all():
        return known
    keys = _keys(frame, ("run", "band")).assign(known=known)
    return keys.groupby(["run", "band"], observed=True, dropna=False)["known"].transform("any").to_numpy()


def band_labels(frame: pd.DataFrame) -> pd.Series:
    """The band that each row belongs to, by a label such as ``GhostNorm (G=16)``; the categories are in drawing order.

    Rows of one norm with the same groups share a band, whatever their seed; implementations of GhostNorm do not.
    Without a column ``norm`` every run is a band of its own, and without ``run`` all rows are one band without a label.
    """
    if "norm" not in frame:
        return pd.Series(frame.get("run", ""), frame.index, dtype="category")
    names = [name for name in ("norm", "groups", "channel_groups", "ghost_by", *SETTINGS) if name in frame]
    # A run of which no norm is known is a band by itself.
    runs = frame["run"].astype(object) if "run" in frame else pd.Series("", frame.index)
    keys = frame[names].assign(run=runs.where(frame["norm"].isna()))
    differing = [
        name for name in SETTINGS if name in frame and len(frame.loc[frame["norm"].notna(), name].unique()) > 1
    ]
    number = keys.groupby(list(keys), observed=True, dropna=False, sort=False).ngroup()
    facts = keys.loc[~number.duplicated()].astype(object)
    facts = facts.where(facts.notna(), None).to_dict("records")
    labels = [_label(band, differing) for band in facts]
    # Names of any length may differ where they are cut.
    labels = [label if label == short(label) else f"[{index}] {short(label)}" for index, label in enumerate(labels)]
    order = [labels[index] for index in sorted(range(len(facts)), key=lambda index: _position(facts[index]))]
    categories = list(dict.fromkeys(order))
    codes = np.array([categories.index(label) for label in labels], int)
    return pd.Series(pd.Categorical.from_codes(codes[number], categories), frame.index)


def _label(facts: Mapping[str, Any], differing: Sequence[str]) -> str:
    if facts["norm"] is None:
        return str(facts["run"])
    norm = NORMS.get(facts["norm"], NormName(str(facts["norm"])))
    options = ", ".join(
        f"{sign}={_number(facts[fact])}" for fact, sign in norm.symbols.items() if facts.get(fact) is not None
    )
    name = f"{norm.title} ({options})" if options else norm.title
    name = name if facts.get("ghost_by") in (None, "layer") else f"{name} by {facts['ghost_by']}"
    return ", ".join([name, *(f"{fact} {facts[fact]}".replace("_", " ") for fact in differing)])


def _number(fact: Any) -> str:
    return f"{fact:g}" if isinstance(fact, float) else str(fact)


def _position(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    norms = list(NORMS)
    norm = norms.index(facts["norm"]) if facts["norm"] in norms else len(norms)
    groups = [facts.get(name) or 0 for name in ("channel_groups", "groups")]
    # Facts may be of any type, and text comes after numbers.
    variant = [(isinstance(number, str), number) for number in groups]
    return norm, str(facts["norm"]), *variant, facts.get("ghost_by") != "layer"


def _keys(frame: pd.DataFrame, by: str | Sequence[str], *others: str) -> pd.DataFrame:
    """The columns that make the groups; a frame without ``run`` is one run without a name, and bands are worked out."""
    names = [by] if isinstance(by, str) else list(by)
    frame = frame if "run" in frame else frame.assign(run="")
    if "band" in names and "band" not in frame:
        frame = frame.assign(band=band_labels(frame))
    if missing := [name for name in (*names, *others) if name not in frame]:
        raise UserError(f"The frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")
    return pd.DataFrame(frame[names])
