"""``landscape list``: the runs recorded in folders."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

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

    echo(_table(list_runs(paths)).to_string(index=False))


def _table(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Return the columns that have values, and the column ``ended``."""
    table = runs.astype(object).reindex(columns=list(COLUMNS)).dropna(axis="columns", how="all")
    return table.assign(ended=runs["ended"].astype(object)).where(lambda table: table.notna(), "-")
