"""The runs in a place: found, listed, and read into one frame, whatever of them can be read."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, Store, is_url, reason, store_at
from landscape.storage.lock import writer_of
from landscape.text import printable
from landscape.traces.folder import CHECKPOINT, first_row, folder_name, part_names, read_facts
from landscape.traces.frame import fact_columns, scalars, to_frame
from landscape.traces.parquet import column_names, read_part, rows_in, run_in


@dataclass(frozen=True)
class Run:
    """Where a run is recorded, under which name, and the parts that are asked for."""

    name: str
    store: Store
    parts: tuple[str, ...]
    whole: bool
    """Whether these are all parts that were found, so that they should have no gap."""


def read_traces(paths: Location | Iterable[Location], table: str = "updates") -> pd.DataFrame:
    """Read the traces of one or many runs into one frame.

    What cannot be read (a damaged part, one of another run or of a later format, facts that are no JSON) is left out
    and named by a warning and in ``frame.attrs["left_out"]``.

    Args:
        paths: A run folder, a folder that holds runs at any depth, a single part, or several of these; each a path or
            a URL such as ``s3://bucket/traces``.
        table: ``"updates"`` (one row per probed update) or ``"epochs"``.

    Returns:
        The columns of `landscape.traces.schema`, behind ``run`` (the run's folder, relative to the path given) and one
        column per scalar fact at the top of ``run.json``; a fact named like a column of the rows is left out. Text is
        categorical, whole-number facts are ``Int64``, lists are Arrow-backed (``frame.losses.list[0]``). NaN and inf
        stay as they are.

    Raises:
        LandscapeError: There is no such table, nothing is at a path or was recorded in it, or nothing of it can be read.
    """
    column_names(table)  # a table that does not exist is told before its parts are missed
    left_out: list[str] = []
    runs = _find_runs(paths, table, left_out)
    read = [(run, *_read(run, table, left_out)) for run in runs]
    kept = [(run, rows, facts) for run, rows, facts in read if rows is not None]
    if not kept:
        raise LandscapeError(f"Nothing can be read of what is recorded: {_abridged(left_out)}")
    if left_out:
        warnings.warn(f"Left out: {_abridged(left_out)}", stacklevel=2)
    # The run's name comes before all facts, and is not to be renamed by one.
    facts = [{"run": run.name} | facts | {"run": run.name} for run, _, facts in kept]
    frame = to_frame([rows for _, rows, _ in kept], facts, table)
    frame.attrs["left_out"] = left_out
    return frame


def list_runs(paths: Location | Iterable[Location]) -> pd.DataFrame:
    """The runs in a place, one row each, without reading what they recorded.

    Args:
        paths: As for :func:`read_traces`.

    Returns:
        ``run``, the number of its ``updates`` that were recorded, its ``writer`` (the process that is recording it, as
        far as can be known from here; missing if none is), and one column per scalar fact of its ``run.json``:
        ``ended`` is missing where a run goes on, was killed, or was stopped to be resumed.

    Raises:
        LandscapeError: Nothing is at a path or was recorded in it.
    """
    left_out: list[str] = []
    rows = [_run_summary(run, left_out) for run in _find_runs(paths, "updates", left_out)]
    if left_out:
        warnings.warn(f"Left out: {_abridged(left_out)}", stacklevel=2)
    return fact_columns(rows)


def _run_summary(run: Run, left_out: list[str]) -> dict[str, Any]:
    own = {"run": printable(run.name), "updates": _count(run, left_out), "writer": writer_of(run.store)}
    facts = scalars(_facts_of(run, left_out))
    ended = None if CHECKPOINT in run.store.names() else facts.pop("ended", None)
    return own | {name: fact for name, fact in facts.items() if name not in own} | {"ended": ended}


def _find_runs(paths: Location | Iterable[Location], table: str, left_out: list[str]) -> list[Run]:
    """Every run at or under the paths, once, under a name of its own."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[str, Run] = {}
    for run in (run for path in paths for run in _locate(path, table, left_out)):
        earlier = found.get(str(run.store), run)
        parts = tuple(sorted({*earlier.parts, *run.parts}))
        found[str(run.store)] = Run(earlier.name, run.store, parts, earlier.whole or run.whole)
    if not found:
        where = ", ".join(map(str, paths)) or "no path"
        why = f" ({_abridged(left_out)})" if left_out else ""
        raise LandscapeError(
            f"No {table} are recorded in {where}{why}; record some with `landscape probe --out FOLDER`."
        )
    count = Counter(run.name for run in found.values())
    return [
        run if count[run.name] == 1 else Run(str(run.store), run.store, run.parts, run.whole) for run in found.values()
    ]


def _locate(path: Location, table: str, left_out: list[str]) -> Iterator[Run]:
    """The runs at or under one path."""
    place = str(path) if is_url(path) else Path(os.path.realpath(path))  # which takes links that lead in a circle
    store = store_at(place)
    try:
        kind = store.kind()
        if kind == "folder":
            tree = store.tree(lambda error: left_out.append(f"{error.filename} cannot be opened ({reason(error)})"))
            for inner, names in tree.items():
                if parts := part_names(names, table):
                    own = store.inside(inner) if inner else store
                    yield Run(inner or folder_name(place), own, tuple(parts), whole=True)
        elif kind == "file":
            folder, _, name = (
                str(place).rpartition("/") if is_url(place) else (Path(place).parent, "", Path(place).name)
            )
            yield Run(folder_name(folder), store_at(folder), (name,), whole=False)
    except OSError as error:
        raise LandscapeError(f"{path} cannot be read: {reason(error)}.") from error
    if kind is None:
        raise LandscapeError(f"There is no {path}; give a run folder, a folder of runs, or a part ({table}-*.parquet).")


def _read(run: Run, table: str, left_out: list[str]) -> tuple[pa.Table | None, dict[str, Any]]:
    """The rows of a run, if any can be read, and its facts."""
    facts = _facts_of(run, left_out)
    identities = {facts["id"]} if isinstance(facts.get("id"), str) else _identities(run)
    if len(identities) > 1:
        left_out.append(f"{run.store} has parts of several runs, and no run.json that says which belong there")
        return None, facts
    parts, following, told = [], 0, False
    for name in run.parts:
        try:
            part = read_part(run.store, name, table, next(iter(identities), None))
        except LandscapeError as error:
            left_out.append(str(error).rstrip("."))
            told = True
            continue
        first = first_row(name)
        if run.whole and first is not None:
            if first < following:
                left_out.append(f"{run.store.inside(name)} repeats rows of the part before it")
                continue
            if first > following and not told:
                left_out.append(f"{run.store} lacks the {table} in rows {following} to {first - 1}")
            following, told = first + part.num_rows, False
        parts.append(part)
    if run.whole and parts and not told and (lacking := _recorded(facts, table) - following) > 0:
        left_out.append(f"{run.store} lacks the last {lacking} of its {table}")
    return (pa.concat_tables(parts) if parts else None), facts


def _identities(run: Run) -> set[str]:
    """The runs that parts say to belong to, as far as they do."""
    found: set[str | None] = set()
    for name in run.parts:
        with suppress(LandscapeError):  # which reading it will tell
            found.add(run_in(run.store, name))
    return {identity for identity in found if identity is not None}


def _recorded(facts: Mapping[str, Any], table: str) -> int:
    """How many rows the run says to have recorded when it ended; 0 if it does not say."""
    rows = facts.get("rows")
    count = rows.get(table, 0) if isinstance(rows, dict) else 0
    return count if isinstance(count, int) else 0


def _facts_of(run: Run, left_out: list[str]) -> dict[str, Any]:
    try:
        return read_facts(run.store)
    except LandscapeError as error:
        left_out.append(str(error).rstrip("."))
        return {}


def _count(run: Run, left_out: list[str]) -> int | None:
    """Rows of a run, by the last of its parts."""
    last = run.parts[-1]
    try:
        return (first_row(last) or 0) + rows_in(run.store, last)
    except LandscapeError as error:
        left_out.append(str(error).rstrip("."))
        return first_row(last)


def _abridged(sentences: list[str], most: int = 5) -> str:
    more = [f"{len(sentences) - most} more"] if len(sentences) > most else []
    return "; ".join([*sentences[:most], *more]) + "."
