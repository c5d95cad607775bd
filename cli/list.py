"""``landscape list``: which runs are recorded somewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .params import PlaceType

if TYPE_CHECKING:  # --help does not wait for pandas
    import pandas as pd

SHOWN = (
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


@click.command("list")
@click.argument("paths", nargs=-1, required=True, type=PlaceType())
def command(paths: tuple[str | Path, ...]) -> None:
    """Say which runs are recorded in PATHS, and how many updates of each.

    PATHS are run folders, or folders that hold runs at any depth, or URLs such as s3://bucket/traces. A run without a
    time in the column `ended` goes on, or was killed or stopped: `landscape probe --resume` continues it.
    """
    from landscape.traces.reader import list_runs

    click.echo(_table(list_runs(paths)).to_string(index=False))


def _table(runs: "pd.DataFrame") -> "pd.DataFrame":
    """What there is to be shown: no column that says nothing."""
    shown = runs.reindex(columns=list(SHOWN)).dropna(axis="columns", how="all")
    shown["ended"] = runs["ended"]
    return shown.astype(object).where(shown.notna(), "-")
