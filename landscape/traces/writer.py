"""Records a run: rows into Parquet parts, which are written as soon as their place takes them."""

import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Self

import pandas as pd
import pyarrow as pa

from landscape.errors import LandscapeError
from landscape.files import finished_name
from landscape.storage.filesystem import Location, Memory, reason, store_at
from landscape.storage.write_queue import WriteQueue
from landscape.traces.folder import CHECKPOINT, FACTS, first_row, part_names, read_facts
from landscape.traces.frame import to_frame
from landscape.traces.metadata import environment, plain
from landscape.traces.parquet import Row, column_names, read_part, rows_in, schema, to_arrow, to_parquet
from landscape.traces.schema import TABLES, VERSION


class TraceWriter:
    """Records the rows of one run in a place that is readable at any moment, also after the process was killed.

    The place holds ``run.json``, which says what made the run, and parts such as ``updates-000001000.parquet``,
    numbered by the index of their first row. Every file appears as a whole, so a killed process loses the rows since
    the last flush and no more. Values are written as they are: NaN stays NaN and inf stays inf.

    Where a disk is full, a folder has vanished or a server does not answer, training goes on: a warning says so, once,
    and the rows stay in memory (as Parquet, up to ``WAITING_BYTES`` of `storage.write_queue`) until they can be
    written, which every flush tries again. What is missing in the end is said by the error that :meth:`close` raises.

    Args:
        place: Folder of the run, or a URL such as ``s3://bucket/run``; created if needed, and written to by this
            process alone until :meth:`close`. With None the rows stay in memory, for ``frame``.
        facts: What is needed to repeat the run, for ``run.json``; may be nested. Scalars at the top become columns in
            ``read_traces``.
        flush_rows: Rows of one table after which everything pending is written.
        flush_seconds: Seconds after which everything pending is written, looked at when a row is appended.
        overwrite: Whether the files of an earlier run in the place are removed first.
        resume: Whether an earlier run in the place goes on, behind its rows (see :meth:`rewind`).
        resolve: Turns pending rows of one table into rows of Python and numpy values just before they are written.
            Rows may thus hold tensors of a device, which are fetched in one transfer.

    Attributes:
        place: Where the run is recorded, as text; None for a trace in memory.

    Raises:
        LandscapeError: The place holds a run already, is being written to by another process, or cannot be written to; or a
            fact cannot be put into JSON.
    """

    def __init__(
        self,
        place: Location | None,
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
                "overwrite=True starts a run anew, and resume=True goes on with it: choose one of them."
            )
        self._store = Memory() if place is None else store_at(place)
        self.place = None if place is None else str(self._store)
        self._flush_rows, self._flush_seconds, self._resolve = flush_rows, flush_seconds, resolve
        self._pending: dict[str, list[Row]] = {table: [] for table in TABLES}
        self._rows = dict.fromkeys(TABLES, 0)
        self._parts: dict[str, int] = {}
        """How many rows each part has that this writer has made, by name."""
        self._flushed = time.monotonic()
        self._facts: dict[str, Any] = plain(facts or {})
        if place is not None:
            made = {"version": VERSION, "id": uuid.uuid4().hex, "started": _now(), "environment": environment()}
            self._facts = made | self._facts
        try:
            self._store.create()
            self._outbox = WriteQueue(self._store)
        except OSError as error:
            raise self._unusable(error) from error
        self._begin(overwrite, resume)

    def _begin(self, overwrite: bool, resume: bool) -> None:
        try:
            names = self._store.names()
            recorded = [name for table in TABLES for name in part_names(names, table)]
            if recorded and not (overwrite or resume):
                raise LandscapeError(
                    f"{self._store} holds a run already; give another folder, overwrite=True to replace it, or "
                    "resume=True to go on with it."
                )
            if resume and recorded:
                self._resume(recorded)
            elif not resume:
                self._remove([CHECKPOINT, *reversed(recorded), FACTS])
            # What killed processes have left half done; any other file is let alone.
            self._remove([name for name in names if name.startswith(".") and _is_own(finished_name(name))])
            self._store.write(FACTS, self._json())
        except OSError as error:
            self._outbox.release_lock()
            raise self._unusable(error) from error
        except LandscapeError:
            self._outbox.release_lock()
            raise

    def _resume(self, recorded: list[str]) -> None:
        """Take over what an earlier process has recorded."""
        known = read_facts(self._store)
        resumed = [*known.pop("resumed", []), self._facts["started"]]
        kept = {name: known.get(name) for name in ("id", "started")} if known else {"id": None}
        self._facts = known | self._facts | kept | {"resumed": resumed}
        for name in ("ended", "rows"):
            self._facts.pop(name, None)
        for table in TABLES:
            if parts := part_names(recorded, table):
                self._rows[table] = (first_row(parts[-1]) or 0) + rows_in(self._store, parts[-1])

    @property
    def written(self) -> dict[str, int]:
        """How many rows of each table were handed to the place: those that are there if :meth:`flush` says so."""
        return dict(self._rows)

    def append(self, row: Row, table: str = "updates") -> None:
        """Add a row; its keys are columns of ``landscape.traces.schema``, and those left out are missing values.

        ``loss_min`` and ``loss_max`` are taken from ``losses`` unless the row gives them; both are NaN if one loss is.

        Raises:
            LandscapeError: There is no such table, or it has no column of that name.
        """
        names = column_names(table)
        if unknown := [name for name in row if name not in names]:
            raise LandscapeError(f"The table {table} has no column {', '.join(unknown)}; it has {', '.join(names)}.")
        self._pending[table].append(row)
        if len(self._pending[table]) >= self._flush_rows or time.monotonic() - self._flushed >= self._flush_seconds:
            self._encode_pending()
            self._outbox.flush(again=False)

    def update_metadata(self, **facts: Any) -> None:
        """Add facts about the run to ``run.json``, or replace those of the same name.

        Raises:
            LandscapeError: A fact cannot be put into JSON; the message names it.
        """
        self._facts |= {**plain(facts), "version": VERSION}
        self._outbox.put(FACTS, self._json())
        self._outbox.flush()

    def flush(self) -> bool:
        """Write the pending rows, one part per table that has any.

        Returns:
            Whether everything that was recorded is in its place now.
        """
        self._encode_pending()
        return self._outbox.flush() and not self._outbox.lost

    def _encode_pending(self) -> None:
        """Make parts of the pending rows."""
        for table, rows in self._pending.items():
            if rows:
                part = to_arrow(self._resolve(rows) if self._resolve else rows, table)
                name = f"{table}-{self._rows[table]:09d}.parquet"
                self._outbox.put(name, to_parquet(part, name, self._facts.get("id")))
                self._parts[name] = part.num_rows
                self._rows[table] += part.num_rows
                self._pending[table] = []  # only now: rows that could not be resolved are still here
        self._flushed = time.monotonic()

    def truncate(self, written: Mapping[str, int]) -> None:
        """Forget all rows but the first, as many of each table as ``written`` was at an earlier time.

        Raises:
            LandscapeError: It was never that, some of these rows are not there any more, or the place is out of reach.
        """
        if set(written) - set(TABLES) or not all(isinstance(rows, int) and rows >= 0 for rows in written.values()):
            raise LandscapeError(f"written={dict(written)!r}: give what TraceWriter.written was, rows by table.")
        self.flush()
        try:
            parts = {table: part_names(self._store.names(), table) for table in TABLES}
            if self.place is not None:  # before any row is removed
                for table in TABLES:
                    self._check_rows(parts[table], table, written.get(table, 0))
            for table in TABLES:
                self._truncate_table(parts[table], table, written.get(table, 0))
        except OSError as error:
            raise LandscapeError(f"{self._store} cannot be gone on with now: {reason(error)}.") from error

    def _check_rows(self, parts: list[str], table: str, rows: int) -> None:
        following = 0
        for name in parts:
            if following >= rows or (first_row(name) or 0) != following:
                break
            following += rows_in(self._store, name)
        if following < rows:
            raise LandscapeError(
                f"{self._store} has {following} rows of {table}, and should go on after {rows}: some were lost since. "
                "Put them back, or start the run anew (--overwrite, overwrite=True)."
            )

    def _truncate_table(self, parts: list[str], table: str, rows: int) -> None:
        later = [name for name in parts if (first_row(name) or 0) >= rows]
        self._remove(later[::-1])  # from the end on, so that a process that is killed now leaves no gap
        if last := parts[: len(parts) - len(later)][-1:]:
            keep = rows - (first_row(last[0]) or 0)
            if rows_in(self._store, last[0]) > keep:
                part = read_part(self._store, last[0], table).slice(0, keep)
                self._store.write(last[0], to_parquet(part, last[0], self._facts.get("id")))
        self._rows[table] = rows

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._store.remove(name)
            self._outbox.discard(name)
            self._parts.pop(name, None)

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """Everything recorded so far, as ``read_traces`` gives it but without ``run``; flushes first.

        Raises:
            LandscapeError: What was written cannot be read, as while its place is out of reach.
        """
        self.flush()
        waiting, lost = self._outbox.waiting, self._outbox.lost
        try:
            names = {*self._store.names(), *self._parts}.difference(lost)
        except OSError as error:
            raise LandscapeError(f"{self._store} cannot be read now: {reason(error)}.") from error
        stores = {name: Memory(waiting) if name in waiting else self._store for name in part_names(names, table)}
        rows = [read_part(store, name, table) for name, store in stores.items()]
        return to_frame([pa.concat_tables([schema(table).empty_table(), *rows])], [self._facts], table)

    def write_file(self, name: str, content: bytes) -> None:
        """Put another file beside the run, whole or not at all; an OSError if the place does not take it."""
        self._store.write(name, content)

    def read_file(self, name: str) -> bytes | None:
        """The contents of a file beside the run; None if there is none."""
        return self._store.read(name) if name in self._store.names() else None

    def delete_file(self, name: str) -> None:
        """Remove a file beside the run, if it is there."""
        self._store.remove(name)

    def close(self, ended: bool = True) -> None:
        """Write what is pending, note when the run ended, and, if all is written, let others write to its place.

        Args:
            ended: Whether the run has come to its end, or was only stopped.

        Raises:
            LandscapeError: Rows are missing in the place. Those that wait in memory are tried again by another ``close``.
        """
        self.flush()
        if self.place is not None:
            self.update_metadata(rows=self._rows, **({"ended": _now()} if ended else {}))
        if missing := self._outbox.close():
            told = [f"{self._amount(names)} {why}" for why, names in missing.items()]
            raise LandscapeError(f"Not all that was recorded is in {self._store}: {'; '.join(told)}.")

    def _amount(self, names: Iterable[str]) -> str:
        """How many rows of which tables are in these files."""
        rows = {table: sum(self._parts[name] for name in part_names(names, table)) for table in TABLES}
        counts = [f"{count} rows of {table}" for table, count in rows.items() if count]
        return " and ".join(counts or ["facts of the run"])

    def _json(self) -> bytes:
        return json.dumps(self._facts, indent=2, allow_nan=False).encode()

    def _unusable(self, error: OSError) -> LandscapeError:
        return LandscapeError(f"No trace can be written in {self._store}: {reason(error)}. Give another folder.")

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
            warnings.warn(str(missing), stacklevel=2)  # the error that ended the run is worth more


def _is_own(name: str) -> bool:
    return name in (FACTS, CHECKPOINT) or first_row(name) is not None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class NullWriter:
    """Takes what a `TraceWriter` takes and keeps nothing: for processes beside the one that writes."""

    place = None
    written: ClassVar[dict[str, int]] = dict.fromkeys(TABLES, 0)

    def append(self, row: Row, table: str = "updates") -> None:
        """Forget the row."""

    def update_metadata(self, **facts: Any) -> None:
        """Forget the facts."""

    def flush(self) -> bool:
        """Write nothing."""
        return True

    def truncate(self, written: Mapping[str, int]) -> None:
        """Forget nothing."""

    def write_file(self, name: str, content: bytes) -> None:
        """Forget the file."""

    def read_file(self, name: str) -> bytes | None:
        """There is no file."""

    def delete_file(self, name: str) -> None:
        """There is no file."""

    def close(self, ended: bool = True) -> None:
        """Write nothing."""

    def __exit__(self, *error: object) -> None:
        """Write nothing."""

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """The columns of the table, without rows."""
        return to_frame([schema(table).empty_table()], [{}], table)
