"""One Parquet part of a trace: rows in, an Arrow table between, a frame out."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Store, reason
from landscape.traces.schema import TABLES, VERSION

Row = dict[str, Any]

_ARROW = {"int64": pa.int64(), "float64": pa.float64(), "list<float64>": pa.list_(pa.float64())}


def column_names(table: str) -> list[str]:
    """Names of a table's columns, in order.

    Raises:
        LandscapeError: There is no such table.
    """
    if table not in TABLES:
        raise LandscapeError(f"There is no table {table}; the tables of a trace are {', '.join(TABLES)}.")
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


def to_parquet(part: pa.Table, name: str, run: str | None = None) -> bytes:
    """An Arrow table as Parquet that pandas, polars and DuckDB read by themselves.

    With the rows go checksums, the part's name, and the ``run`` that they belong to, where it has an identity.
    """
    about = {"landscape_checksum": checksum(part), "landscape_part": name}
    about |= {} if run is None else {"landscape_run": run}
    buffer = pa.BufferOutputStream()
    table = part.replace_schema_metadata({**(part.schema.metadata or {}), **about})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def checksum(part: pa.Table) -> str:
    """CRC-32 of all values: those of Parquet's own cover its pages, not what says how to read them."""
    crc = 0
    for column in part.columns:
        values = column.combine_chunks()
        if pa.types.is_list(values.type):
            crc = zlib.crc32(values.value_lengths().fill_null(-1).to_numpy(), crc)
            values = values.flatten()
        crc = zlib.crc32(values.is_null().to_numpy(zero_copy_only=False), crc)
        crc = zlib.crc32(values.fill_null(0).to_numpy(), crc)
    return f"{crc:08x}"


def rows_in(store: Store, name: str) -> int:
    """How many rows a part has, by its footer alone.

    Raises:
        LandscapeError: It is no Parquet file.
    """
    with _opened(store, name) as file:
        return file.metadata.num_rows


def run_in(store: Store, name: str) -> str | None:
    """Identity of the run that a part says to belong to, by its footer alone.

    Raises:
        LandscapeError: It is no Parquet file.
    """
    with _opened(store, name) as file:
        run = (file.schema_arrow.metadata or {}).get(b"landscape_run")
    return None if run is None else run.decode(errors="replace")


def read_part(store: Store, name: str, table: str, run: str | None = None) -> pa.Table:
    """Read one part of a table; columns that came with a later format than the part's are missing values.

    Args:
        store: Where the part is.
        name: Its name there.
        table: ``"updates"`` or ``"epochs"``.
        run: Identity of the run that it should belong to, where that is known.

    Raises:
        LandscapeError: The file is no Parquet file or damaged, or no part of this table, or of another run, or has another
            part's name, or is in a newer format.
    """
    path = store.inside(name)
    with _opened(store, name) as file:
        part = file.read()
    about, known = part.schema.metadata or {}, _known_columns(part, table, path)
    if run and about.get(b"landscape_run", run.encode()) != run.encode():
        raise LandscapeError(f"{path} belongs to another run than the run.json beside it; move one of them out.")
    written_as = about.get(b"landscape_part", name.encode()).decode(errors="replace")
    if name.startswith(f"{table}-") and written_as != name:
        raise LandscapeError(f"{path} was written as {written_as}, which says where its rows belong; name it so again.")
    names = column_names(table)
    try:
        columns = [part[name] if name in known else pa.nulls(part.num_rows) for name in names]
        part = pa.table(columns, names).cast(schema(table))
    except (pa.ArrowException, ValueError) as error:
        raise LandscapeError(f"{path} is no part of the table {table}: {reason(error)}.") from error
    expected = about.get(b"landscape_checksum")
    if expected is not None and expected != checksum(part.select(known)).encode():
        raise LandscapeError(
            f"{path} was changed since it was written: its checksum is another; put the original back."
        )
    return part


def _known_columns(part: pa.Table, table: str, path: object) -> list[str]:
    """The columns that parts of this part's version have."""
    # A part that another tool has rewritten may have lost its version: it has that of its newest column.
    newest = max((column.since for column in TABLES[table] if column.name in part.column_names), default=VERSION)
    version = check_version((part.schema.metadata or {}).get(b"landscape_version", newest), path)
    known = [column.name for column in TABLES[table] if column.since <= version]
    if missing := [name for name in known if name not in part.column_names]:
        raise LandscapeError(f"{path} is no part of the table {table}: it has no column {', '.join(missing)}.")
    return known


@contextmanager
def _opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what pyarrow finds wrong with it in the body, too, is a LandscapeError."""
    try:
        with store.open(name) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise LandscapeError(
            f"{store.inside(name)} cannot be read as Parquet ({reason(error)}); move it out of its folder if it is "
            "damaged, or name run folders or parts."
        ) from error


def check_version(version: bytes | int, path: object) -> int:
    """The version of what is read, as a number; what a later version of this package has written is refused.

    Raises:
        LandscapeError: The version is higher than the one that this package writes.
    """
    try:
        number = int(version)
    except (TypeError, ValueError, OverflowError) as error:
        raise LandscapeError(f"{path} has no trace format but {version!r}; it was not written by landscape.") from error
    if number > VERSION:
        raise LandscapeError(f"{path} has trace format {number}, and only {VERSION} is known here; upgrade landscape.")
    return number
