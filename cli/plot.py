"""``landscape plot``: the figure of recorded traces, and its numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from landscape.names import MEASURES

from .output import echo, report
from .params import Command, LocalPath, LocationType, options_under

if TYPE_CHECKING:  # pandas is slow to import, and --help does not need it.
    import pandas as pd

figure_option = options_under("Figure")


@click.command("plot", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=LocationType())
@figure_option(
    "--measure",
    "measures",
    type=click.Choice([*MEASURES]),
    multiple=True,
    metavar="NAME",
    help=f"Measure to draw: {', '.join(MEASURES)}. Repeatable; each is a panel.  [default: loss, and lost_share below]",
)
@figure_option("--x", type=click.Choice(["step", "epoch"]), default="step", show_default=True, help="Horizontal axis.")
@figure_option(
    "--scale",
    type=click.Choice(["auto", "log", "symlog", "linear"]),
    default="auto",
    show_default=True,
    help="Scale of the vertical axes.",
)
@figure_option(
    "--layout",
    type=click.Choice(["auto", "overlay", "multiples"]),
    default="auto",
    show_default=True,
    help="overlay: all bands in one panel; multiples: one panel each; auto: multiples if a band would be hidden.",
)
@options_under("Output")(
    "--out",
    type=LocalPath(),
    default=Path("landscape.png"),
    show_default=True,
    help="Figure: .png, .svg or .pdf.",
)
def command(
    paths: tuple[str | Path, ...], out: Path, measures: tuple[str, ...], x: str, scale: str, layout: str
) -> None:
    """Draw a band of losses per norm; print its size.

    PATHS are folders of runs, folders that hold runs at any depth, or URLs such as s3://bucket/traces. The measures of
    the points around an update:

    \b
    loss            their losses, and the loss before the step
    predictiveness  distances of their gradients from that before the step
    beta            the largest such distance per distance moved
    gap             differences of their losses from the linear prediction
    curvature       mean curvature of the loss from the parameters to the point
    cosine          cosines of their gradients with that before the step

    \b
    One number per update:
    range               largest minus smallest loss
    relative_range      range over the range that the slope predicts
    lost_share          share of the promised decrease that is lost; at 1 the loss stays
    sharpness           curvature from the parameters to the learning rate's step
    batch_sharpness     curvature of the loss at the parameters, along the direction
    optimal_step        step size of the smallest loss
    critical_step       step size at which the loss is back
    critical_sharpness  2 over the critical step size
    lipschitz           largest change of the loss per distance moved
    misfit              distance of the loss from a parabola, relative to the range
    sam_sharpness       rise of the loss at the most negative step size
    """  # noqa: D301 (click reads the character \b)
    # pandas and matplotlib are slow to import, and --help does not need them.
    from landscape.analysis.labels import band_labels
    from landscape.plotting.caption import reservations
    from landscape.plotting.figure import save_figure
    from landscape.plotting.landscape import plot_landscape
    from landscape.traces.reader import read_traces

    frame = read_traces(paths)
    save_figure(plot_landscape(frame, measure=measures or None, x=x, scale=scale, layout=layout), out)
    for measure in dict.fromkeys(measures or ("loss",)):
        for table in _tables(frame, measure, per_epoch=x == "epoch"):
            echo(table.to_string(float_format="{:.4g}".format) + "\n")
    if "loss" in (measures or ("loss",)):
        for sentence in reservations(frame.assign(band=band_labels(frame))):
            echo(f"Warning: {sentence}", err=True)
    report(f"Figure: {out}")


def _tables(frame: "pd.DataFrame", measure: str, per_epoch: bool) -> Iterator["pd.DataFrame"]:
    """Yield tables of the sizes of the bands.

    With ``per_epoch``, tables with a row for each epoch follow. Columns on non-finite values appear if there are
    any.
    """
    from landscape.analysis.summary import size_name, summarize

    whole = summarize(frame, by="band", measure=measure).set_index("band").rename_axis(None)
    diverged = bool(whole["not_finite"].to_numpy().any())
    yield whole if diverged else whole.drop(columns="first_not_finite")
    if per_epoch:
        epochs = summarize(frame, by=("epoch", "band"), measure=measure)
        for column in (f"mean_{size_name(measure)}", *(["not_finite"] if diverged else [])):
            table = epochs.pivot(index="epoch", columns="band", values=column)
            yield table.rename_axis(columns=column.replace("_", " "))
