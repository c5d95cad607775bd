"""Measures on traces: a frame in, a smaller frame out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.errors import UserError
from landscape.vocabulary import NORMS, NormName

SETTINGS = ("dataset", "model", "batch_size", "base_lr", "direction")
"""Facts that join a band's label when runs differ in them."""


def envelope(frame: pd.DataFrame, x: str = "step", by: str | Sequence[str] = "run", bins: int = 1000) -> pd.DataFrame:
    """The band of every group over ``x``, in at most ``bins`` points and without losing an extreme.

    Neighbouring values of ``x`` share a bin, the same one in all groups; up to ``bins`` distinct values each have their
    own. All runs of a group are joined: the band spans the smallest to the largest of them.

    Args:
        frame: Rows of ``read_traces`` or ``TraceWriter.frame``.
        x: ``"step"`` or ``"epoch"``.
        by: Columns whose values make the groups; ``"band"`` stands for ``band_labels(frame)``.
        bins: Most points per group.

    Returns:
        One row per group and bin: ``x`` (the bin's first), ``loss`` (mean; NaN if one is not finite), ``loss_min`` and
        ``loss_max`` (smallest and largest finite value), ``updates`` (rows joined) and ``not_finite`` (those of them
        with a probed loss that is NaN or infinite).

    Raises:
        UserError: A column is missing, or ``x`` was not recorded.
    """
    keys = _keys(frame, by, x)
    if pd.isna(frame[x].to_numpy()).any():
        raise UserError(f"The trace does not know the {x} of every update; choose another x, such as step.")
    losses = frame[["loss", "loss_min", "loss_max"]]
    rows = keys.assign(
        **losses.where(np.isfinite), x=frame[x], bin=_bins(frame[x].to_numpy(), bins), not_finite=~_finite(frame)
    )
    groups = rows.groupby([*keys.columns, "bin"], observed=True, dropna=False)
    joined = groups.agg(
        x=("x", "min"),
        loss=("loss", "mean"),
        known=("loss", "count"),
        loss_min=("loss_min", "min"),
        loss_max=("loss_max", "max"),
        updates=("x", "size"),
        not_finite=("not_finite", "sum"),
    )
    joined["loss"] = joined["loss"].where(joined.pop("known") == joined["updates"])
    return joined.droplevel("bin").reset_index().rename(columns={"x": x})


def _bins(x: np.ndarray, bins: int) -> np.ndarray:
    values, position = np.unique(x, return_inverse=True)
    return position * min(bins, len(values)) // max(len(values), 1)


def summarize(frame: pd.DataFrame, by: str | Sequence[str] = "run") -> pd.DataFrame:
    """How rough the landscape was: the range of the probed losses, ``loss_max - loss_min``, averaged over updates.

    Args:
        frame: Rows of ``read_traces`` or ``TraceWriter.frame``.
        by: Columns whose values make the groups, such as ``("band", "epoch")``: ``band`` stands for
            ``band_labels(frame)``, and ``epoch`` counts the passes completed, so that the first one is 0.

    Returns:
        One row per group: ``updates`` probed, ``not_finite`` (updates with a probed loss that is NaN or infinite),
        ``mean_range`` and ``median_range`` over the other updates, ``mean_loss`` over the finite training losses, and
        the ``seconds`` that probing took. A mean over nothing is NaN.

    Raises:
        UserError: A column is missing.
    """
    keys = _keys(frame, by)
    if "epoch" in keys:
        keys["epoch"] = np.floor(keys["epoch"]).astype("Int64")
    finite = _finite(frame)
    width = (frame["loss_max"] - frame["loss_min"]).where(finite)
    loss = frame["loss"].where(np.isfinite(frame["loss"]))
    rows = keys.assign(_finite=~finite, _width=width, _loss=loss, _seconds=frame["seconds"])
    return rows.groupby(list(keys.columns), observed=True, dropna=False, as_index=False).agg(
        updates=("_finite", "size"),
        not_finite=("_finite", "sum"),
        mean_range=("_width", "mean"),
        median_range=("_width", "median"),
        mean_loss=("_loss", "mean"),
        seconds=("_seconds", "sum"),
    )


def band_labels(frame: pd.DataFrame) -> pd.Series:
    """The band that each row belongs to, by a label such as ``GhostNorm (G=16)``; the categories are in drawing order.

    Rows of one norm with the same groups share a band, whatever their seed. Without a column ``norm`` every run is a
    band of its own, and without ``run`` all rows are one band without a label.
    """
    if "norm" not in frame:
        return pd.Series(frame.get("run", ""), frame.index, dtype="category")
    names = [name for name in ("norm", "groups", "channel_groups", *SETTINGS) if name in frame]
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
    order = [labels[index] for index in sorted(range(len(facts)), key=lambda index: _position(facts[index]))]
    return pd.Series(pd.Categorical(np.array(labels)[number], list(dict.fromkeys(order))), frame.index)


def _label(facts: Mapping[str, Any], differing: Sequence[str]) -> str:
    if facts["norm"] is None:
        return str(facts["run"])
    norm = NORMS.get(facts["norm"], NormName(str(facts["norm"])))
    options = ", ".join(f"{sign}={facts[fact]:g}" for fact, sign in norm.symbols.items() if facts.get(fact) is not None)
    name = f"{norm.title} ({options})" if options else norm.title
    return ", ".join([name, *(f"{fact} {facts[fact]}".replace("_", " ") for fact in differing)])


def _position(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    norms = list(NORMS)
    norm = norms.index(facts["norm"]) if facts["norm"] in norms else len(norms)
    return norm, str(facts["norm"]), facts.get("channel_groups") or 0, facts.get("groups") or 0


def _finite(frame: pd.DataFrame) -> np.ndarray:
    """Whether all probed losses of an update are finite: the extremes are NaN or infinite if one of them is."""
    return np.isfinite(frame["loss_min"].to_numpy()) & np.isfinite(frame["loss_max"].to_numpy())


def _keys(frame: pd.DataFrame, by: str | Sequence[str], *others: str) -> pd.DataFrame:
    """The columns that make the groups; a frame without ``run`` is one run without a name, and bands are worked out."""
    names = [by] if isinstance(by, str) else list(by)
    frame = frame if "run" in frame else frame.assign(run="")
    if "band" in names and "band" not in frame:
        frame = frame.assign(band=band_labels(frame))
    if missing := [name for name in (*names, *others) if name not in frame]:
        raise UserError(f"The frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")
    return pd.DataFrame(frame[names])
