"""Labels of bands: which rows a figure or table joins, and under which name."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from landscape.analysis.comparable import SETTINGS, shown, step_sizes_of
from landscape.errors import LandscapeError
from landscape.names import NORMS, NormInfo
from landscape.text import short

STEP_SIZES = "step sizes"
"""Name of the column of step sizes as text, which are added likewise."""
LONGEST = 100
"""Maximum number of characters in a label."""


def band_labels(frame: pd.DataFrame) -> pd.Series:
    """Return the label of the band of each row.

    Runs with the same norm, groups, implementation of GhostNorm, settings (``comparable.SETTINGS``) and step sizes
    share a band, whatever their seed.
    Without a column ``norm`` every run is a band, and without ``run`` as well there is one band with an empty label.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.

    Returns:
        Categorical, (rows,); its categories are in the order of drawing, as in the paper.

    Examples:
        >>> frame = pd.DataFrame({"run": ["a", "b", "c"], "norm": ["ghost", "ghost", "none"], "groups": [16, 16, None]})
        >>> list(band_labels(frame))
        ['GhostNorm (G=16)', 'GhostNorm (G=16)', 'No normalization']
        >>> list(band_labels(frame).cat.categories)
        ['No normalization', 'GhostNorm (G=16)']
        >>> list(band_labels(frame.assign(batch_size=[128, 512, 512])).cat.categories)[1:]
        ['GhostNorm (G=16), batch size 128', 'GhostNorm (G=16), batch size 512']
    """
    if "norm" not in frame:
        return pd.Series(frame.get("run", ""), frame.index, dtype="category")
    frame = _with_step_sizes(frame)
    settings = [name for name in (*SETTINGS, STEP_SIZES) if name in frame]
    names = [*(name for name in ("norm", "groups", "channel_groups", "ghost_by") if name in frame), *settings]
    # A run without a norm in its metadata is a separate band.
    runs = frame["run"].astype(object) if "run" in frame else pd.Series("", frame.index)
    keys = frame[names].assign(run=runs.where(frame["norm"].isna()))
    differing = [name for name in settings if len(frame.loc[frame["norm"].notna(), name].unique()) > 1]
    number = keys.groupby(list(keys), observed=True, dropna=False, sort=False).ngroup()
    facts = keys.loc[~number.duplicated()].astype(object)
    facts = facts.where(facts.notna(), None).to_dict("records")
    labels = [_label(band, differing) for band in facts]
    # Long labels are numbered, because they may differ only in the part that is cut off. They begin with the norm,
    # which gives the colour.
    labels = [
        label if label == short(label, LONGEST) else f"{short(label, LONGEST - 5)} [{index}]"
        for index, label in enumerate(labels)
    ]
    order = [labels[index] for index in sorted(range(len(facts)), key=lambda index: _position(facts[index]))]
    categories = list(dict.fromkeys(order))
    codes = pd.Index(categories).get_indexer(pd.Index(labels))
    return pd.Series(pd.Categorical.from_codes(codes[number], categories), frame.index)


def _with_step_sizes(frame: pd.DataFrame) -> pd.DataFrame:
    """Add step sizes as text, if there are runs."""
    if "run" not in frame or "step_sizes" not in frame:
        return frame
    held = ["run", *(name for name in ("step_sizes", "lr", "relative") if name in frame)]
    known = pd.DataFrame(frame.loc[frame["step_sizes"].notna(), held])
    first = known[~known["run"].duplicated()]
    texts = {str(run): step_sizes_of(pd.DataFrame(rows)) for run, rows in first.groupby("run", observed=True)}
    return frame.assign(**{STEP_SIZES: frame["run"].astype(object).map(lambda run: texts.get(str(run)))})


def _label(facts: Mapping[str, Any], differing: Sequence[str]) -> str:
    if facts["norm"] is None:
        return str(facts["run"])
    norm = NORMS.get(facts["norm"], NormInfo(str(facts["norm"])))
    options = ", ".join(
        f"{sign}={_number(facts[fact])}" for fact, sign in norm.symbols.items() if facts.get(fact) is not None
    )
    name = f"{norm.title} ({options})" if options else norm.title
    name = name if facts.get("ghost_by") in (None, "layer") else f"{name} by {facts['ghost_by']}"
    return ", ".join([name, *(shown(fact, facts[fact]) for fact in differing)])


def _number(fact: Any) -> str:
    return f"{fact:g}" if isinstance(fact, float) else str(fact)


def _position(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    norms = list(NORMS)
    norm = norms.index(facts["norm"]) if facts["norm"] in norms else len(norms)
    groups = [facts.get(name) or 0 for name in ("channel_groups", "groups")]
    # Metadata may have any type; text is sorted after numbers.
    variant = [(isinstance(number, str), number) for number in groups]
    return norm, str(facts["norm"]), *variant, facts.get("ghost_by") != "layer"


def group_keys(frame: pd.DataFrame, by: str | Sequence[str], *others: str) -> pd.DataFrame:
    """Return the columns to group rows by.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``. A missing column ``run`` is filled with an empty
            name, a missing column ``band`` with :func:`band_labels`.
        by: Names of the columns to return.
        *others: Names of more columns that the frame must have.

    Raises:
        LandscapeError: A column is missing.
    """
    names = [by] if isinstance(by, str) else list(by)
    frame = frame if "run" in frame else frame.assign(run="")
    if "band" in names and "band" not in frame:
        frame = frame.assign(band=band_labels(frame))
    if missing := [name for name in (*names, *others) if name not in frame]:
        raise LandscapeError(
            f"columns={', '.join(missing)}: not in the frame. Use its columns: {', '.join(map(str, frame.columns))}."
        )
    return pd.DataFrame(frame[names])
