"""``landscape figure``: the figures of the paper, each by its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from landscape.errors import LandscapeError
from landscape.training.presets import RECIPES, recipe_named
from landscape.training.recipe import Recipe

from .runner import Places, prepare, record

if TYPE_CHECKING:  # --help does not wait for pandas and matplotlib
    import pandas as pd
    from matplotlib.figure import Figure

SCALES = ("small", "paper")


@dataclass(frozen=True)
class FigureRequest:
    """What was asked for on the command line."""

    out: Path
    scale: str
    traces: Path | None
    recipes: Sequence[str]
    data_dir: Path | None
    device: str | None


def _figure1(request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    from landscape.paper.figure1 import figure1_blocks, plot_blocks

    if request.recipes:
        raise LandscapeError("Figure 1 shows the norms themselves and trains nothing; leave --recipe out.")
    return plot_blocks({title: steps.numpy() for title, steps in figure1_blocks().items()}), None


def _comparison(number: str, request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    """Figure 4 or 5: what is not recorded yet is trained first."""
    from landscape.paper.figures4_5 import COMPARISONS, pending, roughness
    from landscape.plotting.landscape import plot_landscape
    from landscape.traces.reader import read_traces

    if request.recipes:
        raise LandscapeError(f"Figure {number} has recipes of its own, at two scales; leave --recipe out.")
    runs = COMPARISONS[number, request.scale]
    folder = request.traces or request.out / "traces" / runs[0].recipe
    if left := pending(runs, folder):
        click.echo(f"{len(left)} of {len(runs)} runs are to be trained, into {folder}.", err=True)
        places = Places(folder, request.data_dir, request.device, resume=True)
        for run in prepare(left, places):
            record(run, places, {})
    recorded = [folder / run.run_name for run in runs]
    frame = read_traces(recorded)
    return plot_landscape(frame, x="epoch", layout="multiples"), roughness(frame, read_traces(recorded, table="epochs"))


def _ranking(request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    import pandas as pd

    from landscape.paper.rank_changes import plot_orders, ranking
    from landscape.training.train import dry_run

    recipes = _ranking_recipes(request)
    for recipe in recipes:  # before the first is trained, find out whether a later one cannot be
        dry_run(recipe, request.data_dir, request.device)
    frames = []
    for recipe in recipes:
        click.echo(f"Training {recipe.model} on {recipe.dataset} ...", err=True)
        frames.append(ranking(recipe, request.data_dir, request.device))
    frame = pd.concat(frames, ignore_index=True)
    by = ["model", "dataset", "updates", "layer"]
    table = frame.pivot_table("share", by, "groups", "median", sort=False) * 100
    return plot_orders(frame), table.rename_axis(columns="% at G =")


def _ranking_recipes(request: FigureRequest) -> list[Recipe]:
    """What was asked for; else SimpleNet on MNIST and, if not small, a ResNet in minutes of one CPU core."""
    recipes = [recipe_named(name) for name in dict.fromkeys(request.recipes or ["mnist"])]
    if request.scale == "small":
        return [replace(recipe, epochs=1) for recipe in recipes]
    cifar = replace(RECIPES["cifar10-small"], model="resnet20", schedule="constant", lr=0.1, augment=(), epochs=4)
    return recipes if request.recipes else [*recipes, cifar]


@dataclass(frozen=True)
class FigureSpec:
    """A figure: its files' names by scale, what it shows, and what draws it, with a table where it has numbers."""

    stems: Mapping[str, str]
    help: str
    draw: "Callable[[FigureRequest], tuple[Figure, pd.DataFrame | None]]"


FIGURES = {
    "1": FigureSpec(dict.fromkeys(SCALES, "figure1"), "which values each norm normalizes together", _figure1),
    "ranking": FigureSpec(
        {"paper": "ranking", "small": "ranking-small"},
        "how many pairs of activations GhostNorm puts in another order (section 2.2)",
        _ranking,
    ),
    "4": FigureSpec(
        {"paper": "figure4-mnist", "small": "figure4-digits"},
        "the loss landscape of SimpleNet on MNIST; small: on digits",
        partial(_comparison, "4"),
    ),
    "5": FigureSpec(
        dict.fromkeys(SCALES, "figure5-cifar10"),
        "the loss landscape of ResNet-56 on CIFAR-10; small: on a part of it",
        partial(_comparison, "5"),
    ),
}
"""The figures by the names they are asked for."""

_HELP = """Draw a figure of the paper, as PNG and SVG: NAME.png and NAME.svg in the folder --out.

\b
""" + "\n".join(f"{name:<9}{entry.help}" for name, entry in FIGURES.items())


@click.command("figure", help=_HELP)
@click.argument("name", metavar="NAME")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("figures"), show_default=True, help="Folder of pictures."
)
@click.option(
    "--scale",
    default="paper",
    show_default=True,
    metavar="[small|paper]",
    help="How much is trained for it; paper asks for a GPU in figure 5.",
)
@click.option(
    "--traces",
    type=click.Path(path_type=Path),
    help="Folder with the runs of figure 4 or 5; those it lacks are trained into it.  [default: in OUT]",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help=f"What is trained for it: {', '.join(RECIPES)}. Repeatable.  [default: its own]",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where data files are, or are put.  [default: the user's cache]"
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU where there is one]")
def command(
    name: str,
    out: Path,
    scale: str,
    traces: Path | None,
    recipes: Sequence[str],
    data_dir: Path | None,
    device: str | None,
) -> None:
    """Draw one figure, write it twice, and print its numbers."""
    if name not in FIGURES:
        raise LandscapeError(f"There is no figure {name!r}; choose one of {', '.join(FIGURES)}.")
    if scale not in SCALES:
        raise LandscapeError(f"scale is {scale!r}; it can be {', '.join(SCALES)}.")
    if out.exists() and not out.is_dir():
        raise LandscapeError(f"{out} is a file; give a folder as --out.")
    if traces and name not in ("4", "5"):
        raise LandscapeError(f"Figure {name} is not drawn from traces; leave --traces out.")
    figure, table = FIGURES[name].draw(FigureRequest(out, scale, traces, recipes, data_dir, device))
    from landscape.plotting.figure import save_figure

    # What was asked for otherwise does not take the place of the paper's figure.
    stem = "-".join([FIGURES[name].stems[scale], *dict.fromkeys(recipes)])
    if table is not None:
        click.echo(table.to_string(float_format="{:.4g}".format) + "\n")
    for suffix in ("png", "svg"):
        path = out / f"{stem}.{suffix}"
        save_figure(figure, path)
        click.echo(f"Figure: {path}")
