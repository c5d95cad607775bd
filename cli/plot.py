"""``landscape plot``: the shaded figure of recorded traces."""

from pathlib import Path

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="landscape.png", show_default=True, help="Picture to write: .png, .svg or .pdf.")
@click.option("--x", default="step", show_default=True, metavar="[step|epoch]", help="What the losses are drawn over.")
@click.option("--scale", default="auto", show_default=True, metavar="[auto|log|linear]", help="Scale of the loss axis.")
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    metavar="[auto|overlay|multiples]",
    help="All bands in one panel, or one panel each; auto: one panel unless a band would be hidden.",
)
def command(paths: tuple[Path, ...], out: str, x: str, scale: str, layout: str) -> None:
    """Draw the losses around each update, one band per norm, from the traces in PATHS.

    PATHS are run folders, or folders that hold runs at any depth.
    """
    # Imported here, so that --help does not wait for pandas and matplotlib.
    from landscape.measures import summarize
    from landscape.plots import plot_landscape, save
    from landscape.trace import read_traces

    frame = read_traces(paths)
    save(plot_landscape(frame, x=x, scale=scale, layout=layout), out)
    tables = [summarize(frame, by="band").set_index("band").rename_axis(None)]
    if x == "epoch":
        epochs = summarize(frame, by=("epoch", "band"))
        tables.append(
            epochs.pivot(index="epoch", columns="band", values="mean_range").rename_axis(columns="mean range")
        )
    for table in tables:
        click.echo(table.to_string(float_format="{:.4g}".format) + "\n")
    click.echo(f"Figure: {out}")
