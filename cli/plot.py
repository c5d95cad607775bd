"""``landscape plot``: the shaded figure of recorded traces."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from landscape.names import MEASURES

from .params import PlaceType

if TYPE_CHECKING:  # --help does not wait for pandas
    import pandas as pd


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PlaceType())
@click.option("--out", default="landscape.png", show_default=True, help="Picture to write: .png, .svg or .pdf.")
@click.option(
    "--measure",
    "measures",
    multiple=True,
    default=("loss",),
    help=f"What is drawn: {', '.join(MEASURES)}. Repeatable; each is a panel.  [default: loss]",
)
@click.option("--x", default="step", show_default=True, metavar="[step|epoch]", help="What it is drawn over.")
@click.option(
    "--scale",
    default="auto",
    show_default=True,
    metavar="[auto|log|symlog|linear]",
    help="Scale of the measures' axes.",
)
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    metavar="[auto|overlay|multiples]",
    help="All bands in one panel, or one panel each; auto: one panel unless a band would be hidden.",
)
def command(
    paths: tuple[str | Path, ...], out: str, measures: tuple[str, ...], x: str, scale: str, layout: str
) -> None:
    """Draw the losses around each update, one band per norm, from the traces in PATHS.

    PATHS are run folders, or folders that hold runs at any depth, or URLs such as s3://bucket/traces. What can be drawn
    of the points around an update:

    \b
    loss            the losses there, and the loss before the step
    predictiveness  distances of the gradients there from that before the step
    beta            the largest such distance per distance moved
    gap             differences of the losses from their linear prediction
    curvature       mean curvature of the loss on the way there
    """  # noqa: D301 (click looks for the character \b)
    # Imported here, so that --help does not wait for pandas and matplotlib.
    from landscape.plotting.figure import save_figure
    from landscape.plotting.landscape import plot_landscape
    from landscape.traces.reader import read_traces

    frame = read_traces(paths)
    save_figure(plot_landscape(frame, measure=measures, x=x, scale=scale, layout=layout), out)
    for measure in dict.fromkeys(measures):
        for table in _tables(frame, measure, per_epoch=x == "epoch"):
            click.echo(table.to_string(float_format="{:.4g}".format) + "\n")
    click.echo(f"Figure: {out}")


def _tables(frame: "pd.DataFrame", measure: str, per_epoch: bool) -> Iterator["pd.DataFrame"]:
    """How rough the landscape was, for each band, and also for each epoch; and where it was not finite."""
    from landscape.analysis.summary import size_name, summarize

    whole = summarize(frame, by="band", measure=measure).set_index("band").rename_axis(None)
    diverged = bool(whole["not_finite"].to_numpy().any())
    yield whole if diverged else whole.drop(columns="first_not_finite")
    if per_epoch:
        epochs = summarize(frame, by=("epoch", "band"), measure=measure)
        for column in (f"mean_{size_name(measure)}", *(["not_finite"] if diverged else [])):
            table = epochs.pivot(index="epoch", columns="band", values=column)
            yield table.rename_axis(columns=column.replace("_", " "))
