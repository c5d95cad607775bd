"""``landscape summarize``: means of measures over recorded runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from landscape.errors import LandscapeError
from landscape.names import MEASURES

from .output import FORMATS, echo, formatted
from .params import Command, LocationType, options_under

option = options_under("Table")


@click.command("summarize", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=LocationType())
@option(
    "--by",
    multiple=True,
    default=("run",),
    show_default=True,
    help="Column of groups: run, band, epoch, norm, seed, ... Repeatable.",
)
@option(
    "--measure",
    "measures",
    type=click.Choice([*MEASURES]),
    multiple=True,
    default=("loss",),
    show_default=True,
    metavar="NAME",
    help="Measure, as for `landscape plot`. Repeatable.",
)
@option("--format", "style", type=click.Choice(FORMATS), default="table", show_default=True, help="Format.")
@option("--json", "style", flag_value="json", help="The same as --format json.")
def command(paths: tuple[str | Path, ...], by: tuple[str, ...], measures: tuple[str, ...], style: str) -> None:
    """Print mean and median of measures over recorded updates.

    PATHS are folders of runs, folders that hold runs at any depth, or URLs such as s3://bucket/traces. A row is a group
    of updates. Groups by run have the test loss, and the test accuracy, of the last epoch.
    """
    echo(formatted(records(paths, by, measures), style))


def records(
    paths: Sequence[str | Path], by: Sequence[str] = ("run",), measures: Sequence[str] = ("loss",)
) -> list[dict[str, Any]]:
    """Return a record for each group, without empty columns."""
    from landscape.analysis.summary import size_name, summarize
    from landscape.traces.reader import read_traces

    frame, by = read_traces(paths), list(dict.fromkeys(by))
    table = summarize(frame, by, measures[0])
    for measure in dict.fromkeys(measures[1:]):
        names = [f"{average}_{size_name(measure)}" for average in ("mean", "median")]
        table = table.merge(summarize(frame, by, measure)[[*by, *names]], on=by, how="left")
    if by == ["run"]:
        try:
            last = read_traces(paths, table="epochs").groupby("run", observed=True).last()
        except LandscapeError:  # Runs that no recipe trained have no epochs.
            pass
        else:
            tested = last.reindex(columns=["test_loss", "test_accuracy"])
            table = table.astype({"run": object}).merge(tested, left_on="run", right_index=True, how="left")
    return table.astype(object).dropna(axis="columns", how="all").to_dict("records")
