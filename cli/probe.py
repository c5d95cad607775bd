"""``landscape probe``: train a recipe with several norms and record what the probe measures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from landscape.errors import LandscapeError
from landscape.names import NORMS, options_of
from landscape.training.presets import RECIPES, recipe_named
from landscape.training.recipe import GHOST_BY, PRECISIONS, Recipe

from .params import PlaceType
from .runner import Places, prepare, rank, record

COMPARISON = ("none", "batch", "ghost")


class Numbers(click.ParamType):
    """Numbers with commas between them, such as ``0.1,0.2,0.4``."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers as a tuple."""
        try:
            return tuple(float(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers with commas between them, such as 0.1,0.2,0.4.", param, ctx)


class Share(click.ParamType):
    """A share, as ``10%`` or ``0.1``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            self.fail(f"{value!r} is no share of the training time, such as 10% or 0.1.", param, ctx)
        return share


@click.command("probe")
@click.option("--recipe", default="digits", show_default=True, help=f"What is trained: {', '.join(RECIPES)}.")
@click.option(
    "--norm",
    "norms",
    multiple=True,
    default=COMPARISON,
    help=f"Normalization: {', '.join(NORMS)}. Repeatable; each is a run.  [default: {', '.join(COMPARISON)}]",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    default=(0,),
    help="Seed of weights and data order. Repeatable.  [default: 0]",
)
@click.option(
    "--groups", multiple=True, type=int, help="Groups G_M of the batch, for norms that have them. Repeatable."
)
@click.option(
    "--channel-groups",
    multiple=True,
    type=int,
    help="Groups G_C of the channels, for norms that have them. Repeatable.",
)
@click.option(
    "--ghost-by",
    multiple=True,
    help=f"What makes GhostNorm's groups: {', '.join(GHOST_BY)}. Repeatable.  [default: layer]",
)
@click.option("--probe-lrs", type=Numbers(), help="Step sizes eta along the gradient, such as 0.1,0.2,0.4.")
@click.option("--epochs", type=int, help="Passes over the training set.")
@click.option("--batch-size", type=int, help="Samples in an update.")
@click.option("--lr", type=float, help="Learning rate of SGD; where the recipe changes it, the highest.")
@click.option("--train-samples", type=int, help="Train on so many samples, with the share of each class kept.")
@click.option("--precision", help=f"Of forward and backward passes: {', '.join(PRECISIONS)}.  [default: float32]")
@click.option("--every", type=int, help="Probe each n-th update.")
@click.option("--overhead", type=Share(), help="Probe as many updates as this share of the training time pays for.")
@click.option("--gradients", is_flag=True, default=None, help="Measure gradients too: predictiveness and beta.")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU where there is one]")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where data files are, or are put.  [default: the user's cache]"
)
@click.option("--out", type=PlaceType(), default=Path("traces"), show_default=True, help="Folder of traces, or a URL.")
@click.option("--overwrite", is_flag=True, help="Replace runs of the same name.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with runs of the same name from their last checkpoint; those that have ended stay as they are.",
)
@click.option(
    "--checkpoint-seconds",
    type=float,
    default=Places.checkpoint_seconds,
    show_default=True,
    help="Write a checkpoint every so many seconds, or later if they would take more than 3 % of the time.",
)
def command(
    recipe: str,
    norms: Sequence[str],
    seeds: Sequence[int],
    groups: Sequence[int],
    channel_groups: Sequence[int],
    ghost_by: Sequence[str],
    device: str | None,
    data_dir: Path | None,
    out: str | Path,
    overwrite: bool,
    resume: bool,
    checkpoint_seconds: float,
    **options: Any,
) -> None:
    """Train a recipe once for each norm and seed, probing its updates, and record the traces.

    Before each update the loss of the same batch is measured at several step sizes along the gradient. Options that
    are not given come from the recipe. Draw what was recorded with `landscape plot`.
    """
    base = _base(recipe, options)
    given = {"groups": groups, "channel_groups": channel_groups, "ghost_by": ghost_by}
    for option in (option for option, values in given.items() if values):
        if not any(option in _variants(norm) for norm in norms):
            raise LandscapeError(f"{option} is given, but none of the norms {', '.join(norms)} takes it; leave it out.")
    runs = _runs(base, norms, seeds, {name: values or (getattr(base, name),) for name, values in given.items()})
    places = Places(out, data_dir, device, overwrite, resume, checkpoint_seconds)
    for run in prepare(runs, places):
        record(run, places, options)
    if rank() is None:  # otherwise who started the processes says so
        click.echo(f"Draw them: landscape plot {out}")


def _base(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name with the options that were given."""
    given = {option: value for option, value in options.items() if value is not None}
    # A learning rate that is asked for is that of all runs.
    return replace(recipe_named(name), **given, **({"lr_without_norm": None} if "lr" in given else {}))


def _variants(norm: str) -> tuple[str, ...]:
    """The options of a recipe that make variants of a norm."""
    return (*options_of(norm), "ghost_by") if norm == "ghost" else options_of(norm)


def _runs(
    base: Recipe, norms: Sequence[str], seeds: Sequence[int], variants: Mapping[str, Sequence[Any]]
) -> list[Recipe]:
    """Every combination, each once: seeds innermost, and only the variants that a norm knows."""
    runs = []
    for norm in norms:
        names = _variants(norm)
        for values in product(*(variants[name] for name in names), seeds):
            chosen = dict(zip((*names, "seed"), values, strict=True))
            runs.append(replace(base, norm=norm, **chosen).resolve())
    return list(dict.fromkeys(runs))
