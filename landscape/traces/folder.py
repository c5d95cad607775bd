"""The layout of the folder of a recorded run."""

import json
import re
from collections.abc import Iterable
from typing import Any

from landscape.errors import LandscapeError
from landscape.files import finished_name
from landscape.storage.address import outer_and_name
from landscape.storage.filesystem import Location, Store, reason, store_at
from landscape.traces.parquet import check_version, rows_in
from landscape.traces.schema import TABLES, VERSION


class TraceFolder:
    """Folder of a recorded run.

    Its layout is::

        run.json                       metadata
        updates-000000000.parquet      part of the table "updates" that begins with row 0
        updates-000001000.parquet      part of the same table that begins with row 1000
        epochs-000000000.parquet       part of the table "epochs"
        checkpoint.pt                  state of an unfinished run
        .owner.json, .lock, .NAME.tmp  lock, and temporary files

    Args:
        location: Path, URL or store of the folder.
        names: File names, if they are listed already; otherwise each method lists the folder.

    Attributes:
        store: Store of the files.
        name: Last part of the path or URL.

    Examples:
        >>> from landscape import TraceWriter
        >>> with TraceWriter("traces/run", {"seed": 3}) as trace:
        ...     trace.append({"step": 0, "losses": [2.0, 1.0]})
        >>> folder = TraceFolder("traces/run")
        >>> folder.metadata()["seed"], folder.parts("updates"), folder.has_checkpoint
        (3, ['updates-000000000.parquet'], False)
    """

    METADATA = "run.json"
    CHECKPOINT = "checkpoint.pt"

    def __init__(self, location: Location | Store, names: Iterable[str] | None = None) -> None:
        self.store = location if isinstance(location, Store) else store_at(location)
        self.name = outer_and_name(str(self.store))[1] or str(self.store)
        self._names = None if names is None else list(names)

    def names(self) -> list[str]:
        """Return the names of all files."""
        return self.store.names() if self._names is None else self._names

    def metadata(self) -> dict[str, Any]:
        """Return the content of ``run.json``, empty if there is none.

        Raises:
            LandscapeError: The file is no JSON object, or its format version is not supported.
        """
        path = self.store.inside(self.METADATA)
        try:
            content = dict(json.loads(self.store.read(self.METADATA)))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise LandscapeError(f"{path}: cannot be read as JSON ({reason(error)}). Repair or move it.") from error
        check_version(content.get("version", VERSION), path)
        return content

    def parts(self, table: str) -> list[str]:
        """Return the names of a table's parts, sorted by row."""
        return sorted(name for name in self.names() if name.startswith(f"{table}-") and name.endswith(".parquet"))

    @property
    def has_rows(self) -> bool:
        """True if the folder has parts of any table."""
        return any(self.first_row(name) is not None for name in self.names())

    @property
    def has_checkpoint(self) -> bool:
        """True if the folder has a checkpoint to resume from."""
        return self.CHECKPOINT in self.names()

    def leftovers(self) -> list[str]:
        """Return temporary files of writers that were killed."""
        hidden = [name for name in self.names() if name.startswith(".")]
        return [name for name in hidden if self._is_of_run(finished_name(name))]

    def _is_of_run(self, name: str) -> bool:
        return name in (self.METADATA, self.CHECKPOINT) or self.first_row(name) is not None

    def end_row(self, part: str) -> int:
        """Return the index of the first row after a part.

        Raises:
            LandscapeError: The file cannot be read as Parquet.
        """
        return (self.first_row(part) or 0) + rows_in(self.store, part)

    @staticmethod
    def part_name(table: str, first_row: int) -> str:
        """Return the name of a part by its first row."""
        return f"{table}-{first_row:09d}.parquet"

    @staticmethod
    def first_row(part: str) -> int | None:
        """Return a part's first row; None for other files."""
        found = re.fullmatch(rf"(?:{'|'.join(TABLES)})-(\d+)\.parquet", part)
        return int(found[1]) if found else None
