"""Rows in memory, and their encoding as Parquet parts."""

import time
from collections.abc import Callable, Iterator

from landscape.errors import LandscapeError
from landscape.traces.folder import TraceFolder
from landscape.traces.parquet import Row, column_names, to_arrow, to_parquet
from landscape.traces.schema import TABLES


class RowBuffer:
    """Pending rows of each table of a trace.

    Args:
        flush_rows: Number of pending rows of one table at which a flush is due.
        flush_seconds: Seconds since the last flush at which the next one is due.
        resolve: Function that converts pending rows of one table to Python and numpy values, and may drop some.

    Attributes:
        encoded: Number of rows of each table that were encoded as parts.
    """

    def __init__(self, flush_rows: int, flush_seconds: float, resolve: Callable[[list[Row]], list[Row]] | None) -> None:
        self.encoded = dict.fromkeys(TABLES, 0)
        self._flush_rows, self._flush_seconds, self._resolve = flush_rows, flush_seconds, resolve
        self._pending: dict[str, list[Row]] = {table: [] for table in TABLES}
        self._flushed = time.monotonic()

    def append(self, row: Row, table: str) -> bool:
        """Add a row; return True if a flush is due.

        Raises:
            LandscapeError: There is no such table or column.
        """
        names = column_names(table)
        if unknown := [name for name in row if name not in names]:
            raise LandscapeError(f"{', '.join(unknown)}: no column of table {table}. Use {', '.join(names)}.")
        self._pending[table].append(row)
        is_full = len(self._pending[table]) >= self._flush_rows
        return is_full or time.monotonic() - self._flushed >= self._flush_seconds

    def rows(self, table: str) -> int:
        """Return the number of rows of a table so far."""
        return self.encoded[table] + len(self._pending[table])

    def resolve_pending(self) -> None:
        """Convert pending rows now; they stay pending."""
        if self._resolve:
            self._pending = {table: self._resolve(rows) if rows else rows for table, rows in self._pending.items()}

    def encode(self, run: str | None) -> Iterator[tuple[str, int, bytes]]:
        """Encode pending rows; yield name, row count and content.

        Args:
            run: Identity of the run.
        """
        for table, rows in self._pending.items():
            if rows:
                kept = self._resolve(rows) if self._resolve else rows
                if not kept:
                    self._pending[table] = []
                    continue
                part = to_arrow(kept, table)
                name = TraceFolder.part_name(table, self.encoded[table])
                content = to_parquet(part, name, run)
                # Cleared only now: if resolving or encoding raises, the rows stay pending.
                self._pending[table] = []
                self.encoded[table] += part.num_rows
                yield name, part.num_rows, content
        self._flushed = time.monotonic()
