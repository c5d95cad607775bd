"""Labels that tell the bands of a figure apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.errors import LandscapeError
from landscape.names import NORMS, NormInfo
from landscape.text import short

SETTINGS = ("dataset", "model", "batch_size", "base_lr", "direction")
"""Facts that join a band's label when runs differ in them."""


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
    norm = NORMS.get(facts["norm"], NormInfo(str(facts["norm"])))
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


def group_keys(frame: pd.DataFrame, by: str | Sequence[str], *others: str) -> pd.DataFrame:
    """The columns that make the groups; a frame without ``run`` is one run without a name, and bands are worked out."""
    names = [by] if isinstance(by, str) else list(by)
    frame = frame if "run" in frame else frame.assign(run="")
    if "band" in names and "band" not in frame:
        frame = frame.assign(band=band_labels(frame))
    if missing := [name for name in (*names, *others) if name not in frame]:
        raise LandscapeError(
            f"The frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
        )
    return pd.DataFrame(frame[names])
