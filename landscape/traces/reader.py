"""Find runs, list them, and read them into one frame."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from landscape.errors import LandscapeError
from landscape.storage.address import normalized, outer_and_name
from landscape.storage.filesystem import Location, reason, store_at
from landscape.storage.lock import is_abandoned, writer_of
from landscape.text import printable
from landscape.traces.folder import TraceFolder
from landscape.traces.frame import fact_columns, scalars, to_frame
from landscape.traces.parquet import column_names, read_part, run_in


@dataclass(frozen=True)
class Run:
    """A run to read.

    Attributes:
        name: Name in the frame, unique.
        folder: Folder of the run.
        parts: Parts to read.
        is_whole: True if these are all parts of the run, so that they must have no gap.
    """

    name: str
    folder: TraceFolder
    parts: tuple[str, ...]
    is_whole: bool


def read_traces(paths: Location | Iterable[Location], table: str = "updates") -> pd.DataFrame:
    """Read the traces of runs into one frame.

    Files that cannot be read (a damaged part, a part of another run or of a newer format, invalid JSON) are left out
    and named by a warning and in ``frame.attrs["left_out"]``; so are runs whose process was killed before it wrote its
    last rows. Damage is found by checksums of the Parquet pages and of
    the metadata.

    Args:
        paths: A run folder, a folder with runs at any depth, a single part, or several of these; each a path or a URL
            such as ``s3://bucket/traces``.
        table: ``"updates"`` (one row per probed update) or ``"epochs"``.

    Returns:
        One row per row of the traces. Columns are ``run`` (the run's folder relative to the given path), one column per
        scalar fact at the top level of ``run.json``, and those of `landscape.traces.schema`, which replace facts of the
        same name. Text is categorical, integer facts are ``Int64``, lists are NumPy arrays (``frame.losses.str[0]``).
        NaN and inf are kept.

    Raises:
        LandscapeError: There is no such table, a path does not exist, or nothing can be read.

    Examples:
        >>> from landscape import TraceWriter
        >>> for seed in range(2):
        ...     with TraceWriter(f"traces/ghost-{seed}", {"norm": "ghost", "seed": seed}) as trace:
        ...         trace.append({"step": 0, "losses": [2.0, 1.0]})
        >>> read_traces("traces")[["run", "norm", "seed", "step", "loss_min", "loss_max"]]
               run   norm  seed  step  loss_min  loss_max
        0  ghost-0  ghost     0     0       1.0       2.0
        1  ghost-1  ghost     1     0       1.0       2.0
    """
    column_names(table)  # An unknown table raises here, before its parts are searched.
    left_out: list[str] = []
    runs = _find_runs(paths, table, left_out)
    read = [(run, *_read(run, table, left_out)) for run in runs]
    kept = [(run, rows, facts) for run, rows, facts in read if rows is not None]
    if not kept:
        raise LandscapeError(f"Nothing can be read: {_abridged(left_out)}")
    if left_out:
        warnings.warn(f"Left out: {_abridged(left_out)}", stacklevel=2)
    # The run's name is the first column, and a fact named "run" does not replace it.
    facts = [{"run": run.name} | facts | {"run": run.name} for run, _, facts in kept]
    frame = to_frame([rows for _, rows, _ in kept], facts, table)
    frame.attrs["left_out"] = left_out
    return frame


def list_runs(paths: Location | Iterable[Location]) -> pd.DataFrame:
    """List runs, one row each, without reading their rows.

    Args:
        paths: A run folder, a folder with runs at any depth, a single part, or several of these; each a path or a URL
            such as ``s3://bucket/traces``.

    Returns:
        Columns are ``run``, the number of recorded ``updates`` (0 for a run that has just started), the ``writer`` (the
        process that is recording the run, missing if there is none), and one column per scalar fact of ``run.json``.
        ``ended`` is missing if the run is in progress, was killed, or was interrupted to be resumed.

    Raises:
        LandscapeError: A path does not exist, or no run is recorded there.

    Examples:
        >>> from landscape import TraceWriter
        >>> with TraceWriter("runs/ghost", {"norm": "ghost"}) as trace:
        ...     trace.append({"step": 0, "losses": [2.0, 1.0]})
        >>> list_runs("runs")[["run", "updates", "norm"]]
             run  updates   norm
        0  ghost        1  ghost
    """
    left_out: list[str] = []
    rows = [_run_summary(run, left_out) for run in _find_runs(paths, "updates", left_out, with_started=True)]
    if left_out:
        warnings.warn(f"Left out: {_abridged(left_out)}", stacklevel=2)
    return fact_columns(rows)


def _run_summary(run: Run, left_out: list[str]) -> dict[str, Any]:
    own = {"run": printable(run.name), "updates": _count(run, left_out), "writer": writer_of(run.folder.store)}
    facts = scalars(_metadata(run, left_out))
    ended = None if run.folder.has_checkpoint else facts.pop("ended", None)
    return own | {name: fact for name, fact in facts.items() if name not in own} | {"ended": ended}


def _find_runs(
    paths: Location | Iterable[Location], table: str, left_out: list[str], with_started: bool = False
) -> list[Run]:
    """Return the runs at or under the paths.

    Args:
        paths: Paths that a user gave.
        table: Table of which there are rows.
        left_out: Gets a line for each folder that cannot be opened.
        with_started: True also returns runs without rows.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[str, Run] = {}
    for run in (run for path in paths for run in _locate(path, table, left_out, with_started)):
        key = str(run.folder.store)
        earlier = found.get(key, run)
        parts = tuple(sorted({*earlier.parts, *run.parts}))
        found[key] = replace(earlier, parts=parts, is_whole=earlier.is_whole or run.is_whole)
    if not found:
        where = ", ".join(map(str, paths)) or "no path"
        why = f" ({_abridged(left_out)})" if left_out else ""
        raise LandscapeError(f"No {table} are recorded in {where}{why}. Record some: landscape probe --out FOLDER.")
    count = Counter(run.name for run in found.values())
    return [run if count[run.name] == 1 else replace(run, name=key) for key, run in found.items()]


def _locate(path: Location, table: str, left_out: list[str], with_started: bool) -> Iterator[Run]:
    """Yield the runs at or under one path."""
    place = normalized(path)
    location = place if isinstance(place, str) else Path(os.path.realpath(place))  # which accepts cycles of links
    store = store_at(location)
    try:
        kind = store.kind()
        if kind == "folder":
            tree = store.tree(lambda error: left_out.append(f"{error.filename}: cannot be opened ({reason(error)})"))
            for inner, names in tree.items():
                folder = TraceFolder(store.inside(inner) if inner else store, names)
                run = Run(inner or folder.name, folder, tuple(folder.parts(table)), is_whole=True)
                if run.parts or (with_started and folder.METADATA in names and _metadata(run, left_out)):
                    yield run
        elif kind == "file":
            outer, name = outer_and_name(location)
            folder = TraceFolder(outer)
            yield Run(folder.name, folder, (name,), is_whole=False)
    except OSError as error:
        raise LandscapeError(
            f"{path}: cannot be read ({reason(error)}). Check the path and its permissions."
        ) from error
    if kind is None:
        raise LandscapeError(
            f"{path}: does not exist. Use a run folder, a folder of runs, or a part ({table}-*.parquet)."
        )


def _read(run: Run, table: str, left_out: list[str]) -> tuple[pa.Table | None, dict[str, Any]]:
    """Return the readable rows of a run, and its metadata.

    Gaps are found from the first row of each part, which is in its name::

        updates-000000000.parquet  4 rows    first 0, following 0: read
        updates-000000002.parquet  4 rows    first 2 < following 4: repeats rows, left out
        updates-000000008.parquet  2 rows    first 8 > following 4: rows 4 to 7 are missing
    """
    store, metadata = run.folder.store, _metadata(run, left_out)
    identities = {metadata["id"]} if isinstance(metadata.get("id"), str) else _identities(run)
    if len(identities) > 1:
        left_out.append(f"{store}: has parts of several runs, and no run.json with the identity of one of them")
        return None, metadata
    parts, following = [], 0
    gap_is_named = False  # True after a part that was left out, because its rows are the gap.
    for name in run.parts:
        try:
            part = read_part(store, name, table, next(iter(identities), None))
        except LandscapeError as error:
            left_out.append(_entry(error))
            gap_is_named = True
            continue
        first = run.folder.first_row(name)
        if run.is_whole and first is not None:
            if first < following:
                left_out.append(f"{store.inside(name)}: repeats rows of the part before it")
                continue
            if first > following and not gap_is_named:
                left_out.append(f"{store}: lacks the {table} in rows {following} to {first - 1}")
            following, gap_is_named = first + part.num_rows, False
        parts.append(part)
    if run.is_whole and parts and not gap_is_named and (lacking := _recorded(metadata, table) - following) > 0:
        left_out.append(f"{store}: lacks the last {lacking} of its {table}")
    elif run.is_whole and is_abandoned(store):
        left_out.append(f"{store}: may lack its last {table}, as its process was killed, or ended by os._exit")
    return (pa.concat_tables(parts) if parts else None), metadata


def _identities(run: Run) -> set[str]:
    """Return the identities of the runs that the parts name."""
    found: set[str | None] = set()
    for name in run.parts:
        with suppress(LandscapeError):  # Reading the part raises it again.
            found.add(run_in(run.folder.store, name))
    return {identity for identity in found if identity is not None}


def _recorded(metadata: Mapping[str, Any], table: str) -> int:
    """Return the final number of rows; 0 if unknown."""
    rows = metadata.get("rows")
    count = rows.get(table, 0) if isinstance(rows, dict) else 0
    return count if isinstance(count, int) else 0


def _metadata(run: Run, left_out: list[str]) -> dict[str, Any]:
    try:
        return run.folder.metadata()
    except LandscapeError as error:
        left_out.append(_entry(error))
        return {}


def _count(run: Run, left_out: list[str]) -> int | None:
    """Return the number of rows, from the last part."""
    if not run.parts:
        return 0
    last = run.parts[-1]
    try:
        return run.folder.end_row(last)
    except LandscapeError as error:
        left_out.append(_entry(error))
        return run.folder.first_row(last)


def _entry(error: LandscapeError) -> str:
    """Return a message in the form "constraint; what to do"."""
    constraint, _, remedy = str(error).rstrip(".").rpartition(". ")
    return f"{constraint}; {remedy[:1].lower()}{remedy[1:]}" if constraint else remedy


def _abridged(entries: list[str], most: int = 5) -> str:
    more = [f"{len(entries) - most} more"] if len(entries) > most else []
    return "; ".join([*entries[:most], *more]) + "."
