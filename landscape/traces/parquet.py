"""Parquet parts of a trace: encode rows, and read a part as an Arrow table."""

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
    """Return the names of a table's columns, in order.

    Raises:
        LandscapeError: There is no such table.

    Examples:
        >>> column_names("epochs")[:3]
        ['epoch', 'step', 'train_loss']
    """
    if table not in TABLES:
        raise LandscapeError(f"table={table!r}: no table of a trace. Use {', '.join(TABLES)}.")
    return [column.name for column in TABLES[table]]


def schema(table: str) -> pa.Schema:
    """Return the Arrow schema of a table.

    Metadata of the fields are unit and meaning; metadata of the schema is the format version.
    """
    fields = [
        pa.field(column.name, _ARROW[column.type], metadata={"unit": column.unit, "meaning": column.meaning})
        for column in TABLES[table]
    ]
    return pa.schema(fields, metadata={"landscape_version": str(VERSION)})


def to_arrow(rows: list[Row], table: str) -> pa.Table:
    """Return rows as an Arrow table.

    ``loss_min`` and ``loss_max`` default to the extremes of ``losses``, without those at negative step sizes.

    Examples:
        >>> to_arrow([{"step": 0, "losses": [2.0, 1.0]}], "updates")["loss_min"].to_pylist()
        [1.0]
    """
    return pa.Table.from_pylist([_with_range(row) for row in rows], schema=schema(table))


def _with_range(row: Row) -> Row:
    losses = row.get("losses")
    if losses is None:
        return row
    if (etas := row.get("step_sizes")) is not None and len(etas) == len(losses):
        # Without a step in the direction of descent, the band is over all steps.
        losses = [loss for eta, loss in zip(etas, losses, strict=True) if eta >= 0] or losses
    return {"loss_min": np.min(losses), "loss_max": np.max(losses), **row}


def to_pandas(part: pa.Table) -> pd.DataFrame:
    """Return a table as a frame; lists become arrays."""
    # Arrow-backed lists would be smaller, but pandas cannot read a file back to which it wrote them.
    return part.to_pandas()


def to_parquet(part: pa.Table, name: str, run: str | None = None) -> bytes:
    """Return an Arrow table as Parquet.

    pandas, polars and DuckDB read it. Every page has a CRC-32 checksum. The metadata has the name of the part, the
    identity of its run, and a checksum of these, of the format version and of the number of rows.

    Args:
        part: Rows.
        name: File name of the part.
        run: Identity of the run, if it has one.
    """
    metadata = {**(part.schema.metadata or {}), b"landscape_part": name.encode()}
    metadata |= {} if run is None else {b"landscape_run": run.encode()}
    metadata[b"landscape_metadata_checksum"] = _checksum(metadata, part.num_rows)
    buffer = pa.BufferOutputStream()
    pq.write_table(part.replace_schema_metadata(metadata), buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def _checksum(metadata: dict[bytes, bytes], rows: int) -> bytes:
    # The checksums of Parquet cover its pages only. A flipped bit elsewhere makes the file unreadable, except in the
    # number of rows and in the format version, which would drop rows or columns.
    keys = (b"landscape_version", b"landscape_part", b"landscape_run")
    return b"%08x" % zlib.crc32(b"|".join([*(metadata.get(key, b"") for key in keys), b"%d" % rows]))


def rows_in(store: Store, name: str) -> int:
    """Return the number of rows in a part's footer.

    Raises:
        LandscapeError: The file cannot be read as Parquet.
    """
    with _opened(store, name) as file:
        return file.metadata.num_rows


def run_in(store: Store, name: str) -> str | None:
    """Return the run's identity in a part's footer.

    Raises:
        LandscapeError: The file cannot be read as Parquet.
    """
    with _opened(store, name) as file:
        run = (file.schema_arrow.metadata or {}).get(b"landscape_run")
    return None if run is None else run.decode(errors="replace")


def read_part(store: Store, name: str, table: str, run: str | None = None) -> pa.Table:
    """Read one part of a table.

    Columns that its format version did not have yet are missing values.

    Args:
        store: Store of the part.
        name: File name of the part.
        table: ``"updates"`` or ``"epochs"``.
        run: Identity that the run of the part must have, if known.

    Raises:
        LandscapeError: The file is damaged, of another table or run, was renamed, or has a newer format.
    """
    path = store.inside(name)
    with _opened(store, name) as file:
        part = file.read()
    metadata, known = part.schema.metadata or {}, _known_columns(part, table, path)
    if run and metadata.get(b"landscape_run", run.encode()) != run.encode():
        raise LandscapeError(f"{path}: belongs to another run than the run.json beside it. Move one of them out.")
    written_as = metadata.get(b"landscape_part", name.encode()).decode(errors="replace")
    if name.startswith(f"{table}-") and written_as != name:
        raise LandscapeError(f"{path}: was written as {written_as}, the name with its rows. Rename it back.")
    checksum = _checksum(metadata, part.num_rows)
    if metadata.get(b"landscape_metadata_checksum", checksum) != checksum:
        raise LandscapeError(f"{path}: was changed since it was written (other checksum). Restore the original.")
    names = column_names(table)
    try:
        columns = [part[name] if name in known else pa.nulls(part.num_rows) for name in names]
        return pa.table(columns, names).cast(schema(table))
    except (pa.ArrowException, ValueError) as error:
        raise _other_table(path, table, reason(error)) from error


def _known_columns(part: pa.Table, table: str, path: object) -> list[str]:
    """Return the columns that the part's format version has."""
    # A part rewritten by another tool may have lost its version: then its newest column determines the version.
    newest = max((column.since for column in TABLES[table] if column.name in part.column_names), default=VERSION)
    version = check_version((part.schema.metadata or {}).get(b"landscape_version", newest), path)
    known = [column.name for column in TABLES[table] if column.since <= version]
    if missing := [name for name in known if name not in part.column_names]:
        raise _other_table(path, table, f"it has no column {', '.join(missing)}")
    return known


def _other_table(path: object, table: str, why: str) -> LandscapeError:
    return LandscapeError(f"{path}: is no part of the table {table} ({why}). Move it out of the folder.")


@contextmanager
def _opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; errors of pyarrow become LandscapeErrors."""
    try:
        with store.open(name) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise LandscapeError(
            f"{store.inside(name)}: cannot be read as Parquet ({reason(error)}). Move it out of its folder if it is "
            "damaged, or name run folders or parts."
        ) from error


def check_version(version: bytes | int, path: object) -> int:
    """Return the format version as a number.

    Raises:
        LandscapeError: The version is no number, or newer than that of this package.
    """
    try:
        number = int(version)
    except (TypeError, ValueError, OverflowError) as error:
        raise LandscapeError(
            f"{path}: has trace format {version!r}: must be a number. Use a file written by landscape."
        ) from error
    if number > VERSION:
        raise LandscapeError(
            f"{path}: has trace format {number}, but this landscape reads up to {VERSION}. Upgrade landscape-probe."
        )
    return number
