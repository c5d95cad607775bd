"""One Parquet part of a trace: rows in, an Arrow table between, a frame out."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from landscape.columns import TABLES, VERSION
from landscape.errors import UserError

Row = dict[str, Any]

_ARROW = {"int64": pa.int64(), "float64": pa.float64(), "list<float64>": pa.list_(pa.float64())}


def column_names(table: str) -> list[str]:
    """Names of a table's columns, in order.

    Raises:
        UserError: There is no such table.
    """
    if table not in TABLES:
        raise UserError(f"There is no table {table}; the tables of a trace are {', '.join(TABLES)}.")
    return [column.name for column in TABLES[table]]


def schema(table: str) -> pa.Schema:
    """Arrow schema of a table: units and meanings with the fields, the format's version with the whole."""
    fields = [
        pa.field(column.name, _ARROW[column.type], metadata={"unit": column.unit, "meaning": column.meaning})
        for column in TABLES[table]
    ]
    return pa.schema(fields, metadata={"landscape_version": str(VERSION)})


def to_arrow(rows: list[Row], table: str) -> pa.Table:
    """Rows as an Arrow table, with ``loss_min`` and ``loss_max`` taken from ``losses`` where a row lacks them."""
    return pa.Table.from_pylist([_with_range(row) for row in rows], schema=schema(table))


def _with_range(row: Row) -> Row:
    losses = row.get("losses")
    return row if losses is None else {"loss_min": np.min(losses), "loss_max": np.max(losses), **row}


def to_pandas(part: pa.Table) -> pd.DataFrame:
    """An Arrow table as a frame whose lists stay in Arrow: a million small numpy arrays would be large and slow."""
    return part.to_pandas(types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_list(kind) else None)


def write_part(part: pa.Table, file: BinaryIO) -> None:
    """Write an Arrow table as Parquet that pandas, polars and DuckDB read by themselves."""
    pq.write_table(part, file, compression="zstd")


def read_part(path: Path, table: str) -> pa.Table:
    """Read one part of a table; columns that came with a later format than the part's are missing values.

    Raises:
        UserError: The file is no Parquet file, or no part of this table, or is in a newer format.
    """
    try:
        with pq.ParquetFile(path) as file:
            part = file.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({error}). Name run folders or parts; "
            "to read the rest, move a damaged part out of its folder."
        ) from error
    names = column_names(table)
    # A part that another tool has rewritten may have lost its version: it has that of its newest column.
    newest = max((column.since for column in TABLES[table] if column.name in part.column_names), default=VERSION)
    version = check_version((part.schema.metadata or {}).get(b"landscape_version", newest), path)
    known = {column.name for column in TABLES[table] if column.since <= version}
    if missing := [name for name in names if name in known.difference(part.column_names)]:
        raise UserError(f"{path} is no part of the table {table}: it has no column {', '.join(missing)}.")
    columns = [part[name] if name in known else pa.nulls(part.num_rows) for name in names]
    return pa.table(columns, names).cast(schema(table))


def check_version(version: bytes | int, path: Path) -> int:
    """The version of what is read, as a number; what a later version of this package has written is refused.

    Raises:
        UserError: The version is higher than the one that this package writes.
    """
    try:
        number = int(version)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has no trace format but {version!r}; it was not written by landscape.") from error
    if number > VERSION:
        raise UserError(f"{path} has trace format {number}, and only {VERSION} is known here; upgrade landscape.")
    return number
