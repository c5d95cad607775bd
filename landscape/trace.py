"""The trace of a run: rows into Parquet parts, and the parts of many runs into one frame."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa

from landscape.columns import TABLES, VERSION
from landscape.errors import UserError
from landscape.facts import environment, plain
from landscape.files import temporary_name, whole_file
from landscape.parts import Row, check_version, column_names, read_part, schema, to_arrow, to_pandas, write_part


class TraceWriter:
    """Records the rows of one run in a folder that is readable at any moment, also after the process was killed.

    The folder holds ``run.json``, which says what made the run, and parts such as ``updates-000001000.parquet``,
    numbered by the index of their first row. Every file is written beside its place and moved into it, so only the rows
    since the last flush can be lost. Values are written as they are: NaN stays NaN and inf stays inf.

    Args:
        folder: Where the run is kept; created if needed. With None the rows stay in memory, for ``frame`` alone.
        facts: What is needed to repeat the run, for ``run.json``; may be nested. Scalars at the top become columns in
            ``read_traces``.
        flush_rows: Rows of one table after which everything pending is written.
        flush_seconds: Seconds after which everything pending is written, looked at when a row is appended.
        overwrite: Whether the files of an earlier run in ``folder`` are removed first.
        resolve: Turns pending rows of one table into rows of Python and numpy values just before they are written.
            Rows may thus hold tensors of a device, which are fetched in one transfer.

    Raises:
        UserError: The folder holds a run already, or cannot be written to, or a fact cannot be put into JSON.
    """

    def __init__(
        self,
        folder: str | Path | None,
        facts: Mapping[str, Any] | None = None,
        *,
        flush_rows: int = 1000,
        flush_seconds: float = 30.0,
        overwrite: bool = False,
        resolve: Callable[[list[Row]], list[Row]] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._flush_rows, self._flush_seconds, self._resolve = flush_rows, flush_seconds, resolve
        self._pending: dict[str, list[Row]] = {table: [] for table in TABLES}
        self._written = dict.fromkeys(TABLES, 0)
        self._in_memory = {table: schema(table).empty_table() for table in TABLES}
        self._flushed = time.monotonic()
        self._facts: dict[str, Any] = plain(facts or {})
        if self.folder is not None:
            self._facts = {"version": VERSION, "started": _now(), "environment": environment(), **self._facts}
            self._begin(self.folder, overwrite)

    def _begin(self, folder: Path, overwrite: bool) -> None:
        try:
            _clear(folder, overwrite)
            self.note()
        except OSError as error:
            raise UserError(f"No trace can be written in {folder}: {error.strerror}. Give another folder.") from error

    def append(self, row: Row, table: str = "updates") -> None:
        """Add a row; its keys are columns of ``landscape.columns``, and those left out are missing values.

        ``loss_min`` and ``loss_max`` are taken from ``losses`` unless the row gives them; both are NaN if one loss is.

        Raises:
            UserError: There is no such table, or it has no column of that name.
        """
        names = column_names(table)
        if unknown := [name for name in row if name not in names]:
            raise UserError(f"The table {table} has no column {', '.join(unknown)}; it has {', '.join(names)}.")
        self._pending[table].append(row)
        if len(self._pending[table]) >= self._flush_rows or time.monotonic() - self._flushed >= self._flush_seconds:
            self.flush()

    def note(self, **facts: Any) -> None:
        """Add facts about the run to ``run.json``, or replace those of the same name.

        Raises:
            UserError: A fact cannot be put into JSON; the message names it.
        """
        self._facts |= {**plain(facts), "version": VERSION}
        if self.folder is not None:
            with whole_file(self.folder / "run.json") as file:
                file.write(json.dumps(self._facts, indent=2, allow_nan=False).encode())

    def flush(self) -> None:
        """Write the pending rows, one part per table that has any."""
        for table, rows in self._pending.items():
            if rows:
                self._keep(to_arrow(self._resolve(rows) if self._resolve else rows, table), table)
                self._pending[table] = []  # only now: rows that could not be written are still here
        self._flushed = time.monotonic()

    def _keep(self, part: pa.Table, table: str) -> None:
        if self.folder is None:
            self._in_memory[table] = pa.concat_tables([self._in_memory[table], part])
        else:
            with whole_file(self.folder / f"{table}-{self._written[table]:09d}.parquet") as file:
                write_part(part, file)
            self._written[table] += part.num_rows

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """Everything recorded so far, as ``read_traces`` gives it but without ``run``; flushes first."""
        self.flush()
        parts = sorted(self.folder.glob(f"{table}-*.parquet")) if self.folder else []
        rows = pa.concat_tables([self._in_memory[table], *(read_part(part, table) for part in parts)])
        return _joined([rows], [self._facts], table)

    def close(self) -> None:
        """Write what is pending and note when the run ended."""
        self.flush()
        if self.folder is not None:
            self.note(ended=_now())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class NoTrace:
    """Takes what a `TraceWriter` takes and keeps nothing: for processes beside the one that writes."""

    folder = None

    def append(self, row: Row, table: str = "updates") -> None:
        """Forget the row."""

    def note(self, **facts: Any) -> None:
        """Forget the facts."""

    def flush(self) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Write nothing."""

    def frame(self, table: str = "updates") -> pd.DataFrame:
        """The columns of the table, without rows."""
        return _joined([schema(table).empty_table()], [{}], table)


def _clear(folder: Path, overwrite: bool) -> None:
    """Make the folder, free of the files of an earlier run; other files in it are let alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if holds_rows(folder) and not overwrite:
        raise UserError(f"{folder} holds a run already; give another folder, or overwrite=True to replace it.")
    patterns = [Path("run.json"), *(Path(f"{table}-*.parquet") for table in TABLES)]
    earlier = [path for pattern in patterns for path in folder.glob(pattern.name)]
    leftovers = [path for pattern in patterns for path in folder.glob(temporary_name(pattern).name)]
    for path in earlier + leftovers:
        path.unlink()


def holds_rows(folder: Path) -> bool:
    """Whether a run was recorded in the folder; one that ended before its first flush left nothing worth keeping."""
    return any(path for table in TABLES for path in folder.glob(f"{table}-*.parquet"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_traces(paths: str | Path | Iterable[str | Path], table: str = "updates") -> pd.DataFrame:
    """Read the traces of one or many runs into one frame.

    Args:
        paths: A run folder, a folder that holds runs at any depth, a single part, or several of these.
        table: ``"updates"`` (one row per probed update) or ``"epochs"``.

    Returns:
        The columns of ``landscape.columns``, behind ``run`` (the run's folder, relative to the path given) and one
        column per scalar fact at the top of ``run.json``; a fact named like a column of the rows is left out. Text is
        categorical, whole-number facts are ``Int64``, lists are Arrow-backed (``frame.losses.list[0]``). NaN and inf
        stay as they are.

    Raises:
        UserError: There is no such table, nothing is at a path or was recorded in it, or a file cannot be read.
    """
    column_names(table)  # a table that does not exist is told before its parts are missed
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    names, parts = _find_runs(paths, table)
    rows = [pa.concat_tables([read_part(part, table) for part in parts[folder]]) for folder in parts]
    run = {folder: {"run": names[folder]} for folder in parts}  # before all facts, and not to be renamed by one
    facts = [run[folder] | read_facts(folder / "run.json") | run[folder] for folder in parts]
    return _joined(rows, facts, table)


def _joined(rows: list[pa.Table], facts: list[dict[str, Any]], table: str) -> pd.DataFrame:
    """The rows of all runs behind their scalar facts; a fact named like a column of the rows is left out."""
    taken = {"version", *column_names(table)}
    scalars = [{n: f for n, f in run.items() if n not in taken and not isinstance(f, dict | list)} for run in facts]
    columns = _fact_columns(scalars)
    repeated = columns.loc[np.repeat(columns.index, [run.num_rows for run in rows])].reset_index(drop=True)
    return pd.concat([repeated, to_pandas(pa.concat_tables(rows))], axis=1)


def _find_runs(paths: list[Path], table: str) -> tuple[dict[Path, str], dict[Path, list[Path]]]:
    """Name and parts of every run, by its folder; a run that several paths lead to is found once."""
    names: dict[Path, str] = {}
    parts: dict[Path, set[Path]] = {}
    for name, part in (found for path in paths for found in _locate(path, table)):
        names.setdefault(part.parent, name)
        parts.setdefault(part.parent, set()).add(part)
    if not parts:
        where = ", ".join(map(str, paths)) or "no path"
        raise UserError(f"No {table} are recorded in {where}; record some with `landscape probe --out FOLDER`.")
    count = Counter(names.values())
    names = {folder: name if count[name] == 1 else folder.as_posix() for folder, name in names.items()}
    return names, {folder: sorted(found) for folder, found in parts.items()}


def _locate(path: Path, table: str) -> Iterator[tuple[str, Path]]:
    """Yield the parts at or under a path, each with the name of its run."""
    root = path.resolve()
    if root.is_dir():
        for part in sorted(root.rglob(f"{table}-*.parquet")):
            inner = part.parent.relative_to(root)
            yield inner.as_posix() if inner.parts else root.name, part
    elif root.exists():
        yield root.parent.name, root
    else:
        raise UserError(f"There is no {path}; give a run folder, a folder of runs, or a part ({table}-*.parquet).")


def read_facts(path: Path) -> dict[str, Any]:
    """What a ``run.json`` says, nothing if there is none; a UserError if it cannot be read or is of a later version."""
    if not path.exists():
        return {}
    try:
        facts = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); mend it, or move it out of the folder.") from error
    check_version(facts.get("version", VERSION), path)
    return facts


def _fact_columns(facts: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per run, in types that stay small when they are repeated for every update."""
    names = dict.fromkeys(name for run in facts for name in run)
    columns = {name: _fact_column([run.get(name) for run in facts]) for name in names}
    return pd.DataFrame(columns, index=range(len(facts)))


def _fact_column(values: list[Any]) -> pd.Series:
    column = pd.Series(values, dtype=object)
    types = {"integer": "Int64", "boolean": "boolean", "floating": "float64", "mixed-integer-float": "float64"}
    return column.astype(types.get(pd.api.types.infer_dtype(column, skipna=True), "category"))
