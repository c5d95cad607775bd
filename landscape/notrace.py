"""A trace that keeps nothing, for the processes beside the one that writes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd

from landscape.columns import TABLES
from landscape.parts import Row, schema
from landscape.runs import joined


class NoTrace:
    """Takes what a `TraceWriter` takes and keeps nothing: for processes beside the one that writes."""

    place = None
    written: ClassVar[dict[str, int]] = dict.fromkeys(TABLES, 0)

    def append(self, row: Row, table: str = "updates") -> None:
        """Forget the row."""

    def note(self, **facts: Any) -> None:
        """Forget the facts."""

    def flush(self) -> bool:
        """Write nothing."""
        return True

    def rewind(self, written: Mapping[str, int]) -> None:
        """Forget nothing."""

    def keep(self, name: str, content: bytes) -> None:
        """Forget the file."""

    def kept(self, name: str) -> bytes | None:
        """There is no file."""

    def discard(self, name: str) -> None:
        """There is no file."""

    def close(self, ended: bool = True) -> None:
        """Write nothing."""

    def __exit__(self, *error: object) -> None:
        """Write nothing."""

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """The columns of the table, without rows."""
        return joined([schema(table).empty_table()], [{}], table)
