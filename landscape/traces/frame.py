"""Tables of runs as one frame, with facts as columns."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from landscape.text import printable
from landscape.traces.parquet import column_names, to_pandas

INTERNAL_FACTS = {"version", "id"}
"""Metadata for the reader, which is no column."""

FIRST = ("step", "loss", "loss_min", "loss_max")
"""Columns of updates that stand first."""


def to_frame(rows: list[pa.Table], facts: list[dict[str, Any]], table: str) -> pd.DataFrame:
    """Return the rows of all runs with scalar facts.

    The run is the first column, then those of the table, of updates the losses first; facts, which are constant in a
    run, are the last ones. A column of the table replaces a fact of the same name.

    Args:
        rows: Rows of each run.
        facts: Metadata of each run.
        table: ``"updates"`` or ``"epochs"``.
    """
    taken = set(column_names(table))
    columns = fact_columns([{n: fact for n, fact in scalars(run).items() if n not in taken} for run in facts])
    repeated = columns.loc[np.repeat(columns.index, [run.num_rows for run in rows])].reset_index(drop=True)
    own = to_pandas(pa.concat_tables(rows))
    first = [name for name in FIRST if name in own]
    own = own[first + [name for name in own if name not in first]]
    run = [name for name in repeated if name == "run"]
    return pd.concat([repeated[run], own, repeated.drop(columns=run)], axis=1)


def scalars(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that become columns, in printable values.

    Examples:
        >>> scalars({"id": "3f1c", "norm": "ghost", "seed": 0, "options": {"lr": 0.1}})
        {'norm': 'ghost', 'seed': 0}
    """
    kept = {
        name: fact for name, fact in facts.items() if name not in INTERNAL_FACTS and not isinstance(fact, dict | list)
    }
    return {printable(name): _column_value(fact) for name, fact in kept.items()}


def _column_value(fact: Any) -> Any:
    if isinstance(fact, int) and abs(fact) >= 2**63:
        return str(fact)
    return printable(fact) if isinstance(fact, str) else fact


def fact_columns(facts: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per run, in compact types.

    The types stay small when a row is repeated for every update.

    Examples:
        >>> fact_columns([{"seed": 0}, {"norm": "ghost"}]).dtypes.astype(str).to_dict()
        {'seed': 'Int64', 'norm': 'category'}
    """
    names = dict.fromkeys(name for run in facts for name in run)
    columns = {name: _fact_column([run.get(name) for run in facts]) for name in names}
    return pd.DataFrame(columns, index=range(len(facts)))


def _fact_column(values: list[Any]) -> pd.Series:
    column = pd.Series(values, dtype=object)
    types = {"integer": "Int64", "boolean": "boolean", "floating": "float64", "mixed-integer-float": "float64"}
    return column.astype(types.get(pd.api.types.infer_dtype(column, skipna=True), "category"))
