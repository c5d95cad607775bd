"""Record a run: a row buffer, metadata, and a write queue."""

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import pandas as pd
import pyarrow as pa

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, Memory, reason, store_at
from landscape.storage.write_queue import WriteQueue
from landscape.traces.buffer import RowBuffer
from landscape.traces.folder import TraceFolder
from landscape.traces.frame import to_frame
from landscape.traces.metadata import new_metadata, now, plain, resumed_metadata, to_json
from landscape.traces.parquet import Row, read_part, rows_in, schema, to_parquet
from landscape.traces.schema import TABLES, VERSION


class TraceWriter:
    """Writer of a trace, readable at any time.

    The folder holds metadata, ``run.json``, and Parquet parts such as ``updates-000001000.parquet``, numbered by the
    index of their first row. Every file is written atomically, so a killed process loses only the rows since the last
    flush. Values are written as they are: NaN stays NaN and inf stays inf.

    If the disk is full, the folder was deleted or the server does not respond, training continues: the first failure
    issues a warning, the rows stay in memory (as Parquet, up to 256 MiB), and every flush retries. `close` raises an
    error that names the missing rows.

    Args:
        location: Folder of the run, or a URL such as ``s3://bucket/run``. It is created if needed, and locked until
            `close`. With None the rows stay in memory, for `frame`.
        facts: What is needed to repeat the run, for ``run.json``; may be nested. Scalars at the top level become
            columns in `read_traces`.
        flush_rows: Number of pending rows of one table at which all pending rows are written.
        flush_seconds: Seconds since the last flush at which `append` writes all pending rows.
        overwrite: Remove the files of an earlier run in the folder.
        resume: Append to an earlier run in the folder; see `truncate`.
        resolve: Function that converts pending rows of one table to Python and numpy values just before they are
            written, and may drop some. Rows may thus hold device tensors, which are copied in one transfer.

    Attributes:
        location: Folder or URL as text; None for a trace in memory.

    Raises:
        LandscapeError: The folder holds a run already, is locked by another process, or cannot be written; or JSON
            cannot hold a fact; or ``overwrite`` and ``resume`` are both true.

    Examples:
        >>> from landscape import read_traces
        >>> with TraceWriter("traces/run", {"norm": "ghost", "seed": 0}) as trace:
        ...     trace.append({"step": 0, "loss": 1.5, "step_sizes": [0.1, 0.2], "losses": [1.25, 1.0]})
        >>> read_traces("traces")[["run", "norm", "step", "loss", "loss_min", "loss_max"]]
           run   norm  step  loss  loss_min  loss_max
        0  run  ghost     0   1.5       1.0      1.25
    """

    def __init__(
        self,
        location: Location | None,
        facts: Mapping[str, Any] | None = None,
        *,
        flush_rows: int = 1000,
        flush_seconds: float = 30.0,
        overwrite: bool = False,
        resume: bool = False,
        resolve: Callable[[list[Row]], list[Row]] | None = None,
    ) -> None:
        if overwrite and resume:
            raise LandscapeError(
                "overwrite=True with resume=True: must not be combined. Use overwrite to replace the run, or resume to "
                "continue it."
            )
        self._store = Memory() if location is None else store_at(location)
        self.location = None if location is None else str(self._store)
        self._buffer = RowBuffer(flush_rows, flush_seconds, resolve)
        self._metadata: dict[str, Any] = plain(facts or {}) if location is None else new_metadata(facts or {})
        self._part_rows: dict[str, int] = {}
        """Number of rows of each part of this writer, by name."""
        self._closes_at_exit = 0
        """Process that closes it at its end, if nobody else has."""
        try:
            self._store.create()
            self._queue = WriteQueue(self._store)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._start(overwrite, resume)
        except OSError as error:
            self._queue.release_lock()
            raise self._unusable(error) from error
        except LandscapeError:
            self._queue.release_lock()
            raise

    def _start(self, overwrite: bool, resume: bool) -> None:
        """Replace or resume an earlier run, and write ``run.json``."""
        earlier = TraceFolder(self._store, self._store.names())
        parts = {table: earlier.parts(table) for table in TABLES}
        recorded = [name for names in parts.values() for name in names]
        if recorded and not (overwrite or resume):
            raise LandscapeError(
                f"{self._store}: holds a run already. Use another folder, overwrite=True to replace it, or resume=True "
                "to continue it."
            )
        if resume and recorded:
            self._metadata = resumed_metadata(earlier.metadata(), self._metadata)
            self._buffer.encoded |= {table: earlier.end_row(names[-1]) for table, names in parts.items() if names}
        elif not resume:
            self._remove([earlier.CHECKPOINT, *reversed(recorded), earlier.METADATA])
        self._remove(earlier.leftovers())
        self._store.write(earlier.METADATA, to_json(self._metadata))

    @property
    def written(self) -> dict[str, int]:
        """Number of encoded rows by table.

        They are in the folder if `flush` returns True.
        """
        return dict(self._buffer.encoded)

    def append(self, row: Row, table: str = "updates") -> None:
        """Add a row, to be written with a later flush.

        Args:
            row: Values by the column names of `landscape.traces.schema`; columns left out are missing values.
                ``loss_min`` and ``loss_max`` default to the extremes of ``losses``; both are NaN if one loss is.
            table: ``"updates"`` or ``"epochs"``.

        Raises:
            LandscapeError: There is no such table, or it has no such column.
        """
        if self.location is not None and not self._closes_at_exit:
            self._closes_at_exit = os.getpid()
            atexit.register(self._close_at_exit)
        if self._buffer.append(row, table):
            self._encode_pending()
            self._queue.flush(in_back_off=False)

    def update_metadata(self, **facts: Any) -> None:
        """Add or replace facts in ``run.json``.

        Raises:
            LandscapeError: JSON cannot hold a fact; the message names it.
        """
        self._metadata |= {**plain(facts), "version": VERSION}
        self._queue.put(TraceFolder.METADATA, to_json(self._metadata))
        self._queue.flush()

    def resolve_pending(self) -> None:
        """Convert pending rows by ``resolve``, without writing them."""
        self._buffer.resolve_pending()

    def last_step(self) -> int:
        """Return the largest step of the written updates, or -1."""
        folder = TraceFolder(self._store, self._store.names())
        rows = [read_part(self._store, name, "updates") for name in folder.parts("updates")[-1:]]
        return max((step for part in rows for step in part.column("step").to_pylist()), default=-1)

    def flush(self) -> bool:
        """Write the pending rows, one part per table.

        Returns:
            True if everything that was recorded is in the folder.
        """
        self._encode_pending()
        return self._queue.flush() and not self._queue.lost

    def _encode_pending(self) -> None:
        for name, count, content in self._buffer.encode(self._metadata.get("id")):
            self._queue.put(name, content)
            self._part_rows[name] = count

    def truncate(self, written: Mapping[str, int]) -> None:
        """Drop all rows after the first ``written[table]`` of each table.

        Args:
            written: Value of `written` at the time to return to.

        Raises:
            LandscapeError: ``written`` is no such value, some of the rows are missing, or the folder is unreachable.

        Examples:
            >>> trace = TraceWriter(None)
            >>> for step in range(5):
            ...     trace.append({"step": step})
            >>> trace.truncate({"updates": 3})
            >>> list(trace.frame().step)
            [0, 1, 2]
        """
        if set(written) - set(TABLES) or not all(isinstance(rows, int) and rows >= 0 for rows in written.values()):
            raise LandscapeError(
                f"written={dict(written)!r}: must be numbers of rows by table. Use an earlier value of "
                "TraceWriter.written."
            )
        self.flush()
        try:
            folder = TraceFolder(self._store, self._store.names())
            if self.location is not None:  # All tables are checked before any row is removed.
                for table in TABLES:
                    self._check_rows(folder, table, written.get(table, 0))
            for table in TABLES:
                self._truncate_table(folder.parts(table), table, written.get(table, 0))
        except OSError as error:
            raise LandscapeError(f"{self._store}: cannot be resumed now ({reason(error)}). Retry later.") from error

    def _check_rows(self, folder: TraceFolder, table: str, rows: int) -> None:
        following = 0
        for name in folder.parts(table):
            if following >= rows or (folder.first_row(name) or 0) != following:
                break
            following = folder.end_row(name)
        if following < rows:
            raise LandscapeError(
                f"{self._store}: has {following} rows of {table}, but must have {rows} to be resumed. Put the missing "
                "rows back, or restart the run (--overwrite, overwrite=True)."
            )

    def _truncate_table(self, parts: list[str], table: str, rows: int) -> None:
        later = [name for name in parts if (TraceFolder.first_row(name) or 0) >= rows]
        self._remove(later[::-1])  # From the end, so that a process killed meanwhile leaves no gap.
        if last := parts[: len(parts) - len(later)][-1:]:
            keep = rows - (TraceFolder.first_row(last[0]) or 0)
            if rows_in(self._store, last[0]) > keep:
                part = read_part(self._store, last[0], table).slice(0, keep)
                self._store.write(last[0], to_parquet(part, last[0], self._metadata.get("id")))
        self._buffer.encoded[table] = rows

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._store.remove(name)
            self._queue.discard(name)
            self._part_rows.pop(name, None)

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """Flush, and return all rows as `read_traces` does, without ``run``.

        Args:
            table: ``"updates"`` or ``"epochs"``.

        Raises:
            LandscapeError: The written rows cannot be read, for example while the server does not respond.
        """
        self.flush()
        waiting = self._queue.waiting
        try:
            names = {*self._store.names(), *self._part_rows}.difference(self._queue.lost)
        except OSError as error:
            raise LandscapeError(f"{self._store}: cannot be read now ({reason(error)}). Retry later.") from error
        parts = TraceFolder(self._store, names).parts(table)
        stores = [Memory(waiting) if name in waiting else self._store for name in parts]
        rows = [read_part(store, name, table) for store, name in zip(stores, parts, strict=True)]
        return to_frame([pa.concat_tables([schema(table).empty_table(), *rows])], [self._metadata], table)

    def write_file(self, name: str, content: bytes) -> None:
        """Write another file to the folder atomically.

        Raises:
            OSError: The folder cannot be written.
        """
        self._store.write(name, content)

    def read_file(self, name: str) -> bytes | None:
        """Return the content of another file, None without one."""
        return self._store.read(name) if name in self._store.names() else None

    def delete_file(self, name: str) -> None:
        """Remove another file if it exists."""
        self._store.remove(name)

    def close(self, ended: bool = True) -> None:
        """Write pending rows and metadata; release the lock.

        Args:
            ended: True if the run is complete, False if it was interrupted.

        Raises:
            LandscapeError: Rows are missing in the folder. Another ``close`` retries those in memory.
        """
        atexit.unregister(self._close_at_exit)
        self._closes_at_exit = 0
        self.flush()
        if self.location is not None:
            self.update_metadata(rows=self._buffer.encoded, **({"ended": now()} if ended else {}))
        if missing := self._queue.close():
            reasons = "; ".join(f"{self._amount(names)} {why}" for why, names in missing.items())
            raise LandscapeError(f"{self._store}: is incomplete: {reasons}.")

    def _close_at_exit(self) -> None:
        """Write the rows of a run that nobody has closed.

        A process that was forked has copies of them, which are not its own.
        """
        if self._closes_at_exit == os.getpid():
            try:
                self.close(ended=not hasattr(sys, "last_value"))  # which an error that ends the process has set
            except LandscapeError as missing:
                warnings.warn(str(missing), stacklevel=2)

    def _amount(self, names: Iterable[str]) -> str:
        """Return the number of rows in some files, by table."""
        folder = TraceFolder(self._store, names)
        rows = {table: sum(self._part_rows[name] for name in folder.parts(table)) for table in TABLES}
        return " and ".join(f"{count} rows of {table}" for table, count in rows.items() if count) or "metadata"

    def _unusable(self, error: OSError) -> LandscapeError:
        return LandscapeError(f"{self._store}: cannot hold a trace ({reason(error)}). Use another folder.")

    def __repr__(self) -> str:
        """Return the place and the number of rows."""
        rows = self._buffer.rows("updates")
        return f"TraceWriter({self.location or 'in memory'}, {rows} updates)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close(ended=error is None)
        except LandscapeError as missing:
            if error is None:
                raise
            warnings.warn(str(missing), stacklevel=2)  # The error that ended the run is more important.


class NullWriter(TraceWriter):
    """Writer that drops everything, for ranks that write nothing."""

    def __init__(self) -> None:
        super().__init__(None)

    def append(self, row: Row, table: str = "updates") -> None:
        """Drop the row."""

    def update_metadata(self, **facts: Any) -> None:
        """Drop the facts."""

    def truncate(self, written: Mapping[str, int]) -> None:
        """Do nothing, as there are no rows."""
