"""``landscape list``: the runs recorded in folders."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from landscape.errors import LandscapeError
from landscape.text import printable

from .output import echo
from .params import Command, LocationType

if TYPE_CHECKING:  # pandas is slow to import, and --help does not need it.
    import pandas as pd

COLUMNS = (
    "run",
    "updates",
    "recipe",
    "norm",
    "groups",
    "channel_groups",
    "ghost_by",
    "seed",
    "writer",
    "started",
    "ended",
)


@click.command("list", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=LocationType())
def command(paths: tuple[str | Path, ...]) -> None:
    """List recorded runs with their numbers of updates.

    PATHS are folders of runs, folders that hold runs at any depth, or URLs such as s3://bucket/traces. A run without a
    time in the column `ended` is running, or was killed or stopped: `landscape probe --resume` continues it.
    """
    from landscape.traces.reader import list_runs

    tables, error = [], None
    try:
        tables.append(list_runs(paths))
    except LandscapeError as found:
        error = found
    tables += _starting(paths)
    if error and not tables:
        raise error
    echo(_table(tables).to_string(index=False))


def _starting(paths: Sequence[str | Path]) -> "list[pd.DataFrame]":
    """Return a table of runs without rows, if any."""
    from landscape.storage.filesystem import store_at
    from landscape.storage.lock import writer_of
    from landscape.traces.folder import TraceFolder
    from landscape.traces.frame import fact_columns, scalars

    rows = {}
    for path in paths:
        with suppress(LandscapeError, OSError):  # `list_runs` has named what cannot be read
            store = store_at(path)
            tree = store.tree(lambda error: None) if store.kind() == "folder" else {}
            for inner, names in tree.items():
                folder = TraceFolder(store.inside(inner) if inner else store, names)
                if folder.METADATA in names and not folder.parts("updates"):
                    own = {"run": printable(inner or folder.name), "updates": 0, "writer": writer_of(folder.store)}
                    rows[str(folder.store)] = scalars(folder.metadata()) | own
    return [fact_columns(list(rows.values()))] if rows else []


def _table(tables: "list[pd.DataFrame]") -> "pd.DataFrame":
    """Return the columns that have values, and the column ``ended``."""
    import pandas as pd

    runs = pd.concat([table.astype(object) for table in tables], ignore_index=True).reindex(columns=list(COLUMNS))
    table = runs.dropna(axis="columns", how="all")
    return table.assign(ended=runs["ended"]).where(lambda table: table.notna(), "-")
