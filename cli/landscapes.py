"""Figures 4 and 5: their runs are trained where they are not recorded yet, and drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .running import Places, prepare, record

if TYPE_CHECKING:  # --help does not wait for pandas and matplotlib
    import pandas as pd
    from matplotlib.figure import Figure


def draw(
    number: str, scale: str, traces: Path, data_dir: Path | None, device: str | None
) -> "tuple[Figure, pd.DataFrame]":
    """The figure of that number, and its table; what is missing in the folder of traces is trained first."""
    from landscape.comparisons import COMPARISONS, missing, roughness
    from landscape.plots import plot_landscape
    from landscape.trace import read_traces

    runs = COMPARISONS[number, scale]
    places = Places(traces, data_dir, device, overwrite=True)  # only runs that came to no end
    if left := missing(runs, traces):
        click.echo(f"{len(left)} of {len(runs)} runs are to be trained into {traces}.", err=True)
        prepare(left, places)
    for run in left:
        record(run, places, {})
    folders = [traces / run.run for run in runs]
    frame = read_traces(folders)
    return plot_landscape(frame, x="epoch"), roughness(frame, read_traces(folders, table="epochs"))
