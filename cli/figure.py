"""``landscape figure``: the figures of arXiv:2007.08554, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from landscape.errors import LandscapeError
from landscape.files import whole_file
from landscape.training.presets import RECIPES
from landscape.training.recipe import Recipe
from landscape.training.target import TraceTarget

from .output import echo, report
from .params import Command, LocalPath, data_dir_option, device_option, options_under, out_option
from .runner import prepare, train_run

if TYPE_CHECKING:  # pandas and matplotlib are slow to import, and --help does not need them.
    import pandas as pd
    from matplotlib.figure import Figure

SCALES = ("small", "paper")


@dataclass(frozen=True)
class FigureRequest:
    """Options of the command."""

    out: Path
    scale: str
    traces: Path | None
    recipes: Sequence[str]
    data_dir: Path | None
    device: str | None


def _figure1(request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    from landscape.paper.figure1 import figure1_blocks, plot_blocks

    if request.recipes:
        raise LandscapeError("--recipe: figure 1 shows the norms themselves, without training. Omit --recipe.")
    return plot_blocks({title: steps.numpy() for title, steps in figure1_blocks().items()}), None


def _comparison(number: str, request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    """Train the missing runs; return figure 4 or 5."""
    from landscape.paper.figures4_5 import COMPARISONS, roughness
    from landscape.plotting.landscape import plot_landscape
    from landscape.traces.reader import read_traces
    from landscape.training.completed import pending

    if request.recipes:
        raise LandscapeError(f"--recipe: figure {number} has its own recipes. Omit --recipe, or use --scale.")
    runs = COMPARISONS[number, request.scale]
    folder = request.traces or request.out / "traces" / runs[0].name
    if missing := pending(runs, folder):
        report(f"Training {len(missing)} of {len(runs)} runs into {folder} ...", err=True)
        target = TraceTarget(folder, request.data_dir, request.device, resume=True)
        for run in prepare(missing, target):
            train_run(run, target, {})
    locations = [folder / run.run_name for run in runs]
    frame = read_traces(locations)
    figure = plot_landscape(frame, x="epoch", layout="multiples")
    return figure, roughness(frame, read_traces(locations, table="epochs"))


def _ranking(request: FigureRequest) -> "tuple[Figure, pd.DataFrame | None]":
    import pandas as pd

    from landscape.paper.rank_changes import plot_orders, ranking
    from landscape.training.train import dry_run

    recipes = _ranking_recipes(request)
    for recipe in recipes:  # Every recipe is checked before the first is trained.
        dry_run(recipe, request.data_dir, request.device)
    frames = []
    for recipe in recipes:
        report(f"Training {recipe.model} on {recipe.dataset} ...", err=True)
        frames.append(ranking(recipe, request.data_dir, request.device))
    frame = pd.concat(frames, ignore_index=True)
    by = ["model", "dataset", "updates", "layer"]
    table = frame.pivot_table("share", by, "groups", "median", sort=False) * 100
    return plot_orders(frame), table.rename_axis(columns="% at G =")


def _ranking_recipes(request: FigureRequest) -> list[Recipe]:
    """Return the requested recipes.

    The default is SimpleNet on MNIST, and at the paper's scale a ResNet, which takes minutes on one CPU core.
    """
    recipes = [RECIPES[name] for name in dict.fromkeys(request.recipes or ["mnist"])]
    if request.scale == "small":
        return [replace(recipe, epochs=1) for recipe in recipes]
    plain = {"schedule": "constant", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "augment": ()}
    cifar = replace(RECIPES["cifar10"], model="resnet20", train_samples=12_800, epochs=4, **plain)
    return recipes if request.recipes else [*recipes, cifar]


@dataclass(frozen=True)
class FigureSpec:
    """Specification of a figure.

    Attributes:
        stems: File names without suffix, by scale.
        help: Content, for the help.
        draw: Function (request) -> (figure, table); the table is None without numbers.
    """

    stems: Mapping[str, str]
    help: str
    draw: "Callable[[FigureRequest], tuple[Figure, pd.DataFrame | None]]"


FIGURES = {
    "1": FigureSpec(dict.fromkeys(SCALES, "figure1"), "which values each norm normalizes together", _figure1),
    "ranking": FigureSpec(
        {"paper": "ranking", "small": "ranking-small"},
        "share of activation pairs whose order GhostNorm changes (section 2.2)",
        _ranking,
    ),
    "4": FigureSpec(
        {"paper": "figure4-mnist", "small": "figure4-digits"},
        "loss landscape of SimpleNet on MNIST; small: on digits",
        partial(_comparison, "4"),
    ),
    "5": FigureSpec(
        dict.fromkeys(SCALES, "figure5-cifar10"),
        "loss landscape of ResNet-56 on CIFAR-10; small: on a subset",
        partial(_comparison, "5"),
    ),
}
"""Figures by name."""

_HELP = """Draw a figure of the paper. Writes NAME.png, NAME.svg and NAME.csv.

\b
""" + "\n".join(f"{name:<9}{spec.help}" for name, spec in FIGURES.items())

figure_option = options_under("Figure")


@click.command("figure", help=_HELP, cls=Command)
@click.argument("name", metavar="NAME", type=click.Choice([*FIGURES]))
@figure_option(
    "--scale",
    type=click.Choice(SCALES),
    default="paper",
    show_default=True,
    help="Size of the trainings; figure 5 at the paper's scale needs a GPU.",
)
@figure_option(
    "--recipe",
    "recipes",
    type=click.Choice([*RECIPES]),
    metavar="NAME",
    multiple=True,
    help=f"Recipe of the figure ranking: {', '.join(RECIPES)}. Repeatable.  [default: those of the paper]",
)
@figure_option(
    "--traces",
    type=LocalPath(),
    help="Folder with the runs of figure 4 or 5; missing runs are trained into it.  [default: in OUT]",
)
@device_option
@data_dir_option
@out_option("figures", "Folder of figures.")
def command(
    name: str,
    out: Path,
    scale: str,
    traces: Path | None,
    recipes: Sequence[str],
    data_dir: Path | None,
    device: str | None,
) -> None:
    """Draw a figure, write it, and print its numbers."""
    if out.exists() and not out.is_dir():
        raise LandscapeError(f"--out {out}: is a file. Use a folder.")
    if traces and name not in ("4", "5"):
        raise LandscapeError(f"--traces: figure {name} is not drawn from traces. Omit --traces.")
    figure, table = FIGURES[name].draw(FigureRequest(out, scale, traces, recipes, data_dir, device))
    from landscape.plotting.figure import save_figure

    # A figure with given recipes gets another file name, so that it never replaces the paper's figure.
    stem = "-".join([FIGURES[name].stems[scale], *dict.fromkeys(recipes)])
    if table is not None:
        echo(table.to_string(float_format="{:.4g}".format) + "\n")
    for suffix in ("png", "svg"):
        path = out / f"{stem}.{suffix}"
        save_figure(figure, path)
        report(f"Figure: {path}")
    if table is not None:
        with whole_file(out / f"{stem}.csv") as file:
            file.write(table.to_csv(float_format="%.6g", lineterminator="\n").encode())
