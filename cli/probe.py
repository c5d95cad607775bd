"""``landscape probe``: recipes trained with several norms, with their traces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from landscape.errors import LandscapeError
from landscape.names import NORMS, options_of
from landscape.training.presets import RECIPES
from landscape.training.recipe import GHOST_BY, PRECISIONS, Recipe
from landscape.training.target import TraceTarget

from .output import report
from .params import Command, LocationType, Numbers, Share, data_dir_option, device_option, options_under
from .runner import prepare, rank, train_run

COMPARISON = ("none", "batch", "ghost")

training_option = options_under("Training")
probe_option = options_under("Probe")
output_option = options_under("Output")


@click.command("probe", cls=Command)
@training_option(
    "--recipe",
    type=click.Choice([*RECIPES]),
    default="digits",
    show_default=True,
    metavar="NAME",
    help=f"Recipe to train: {', '.join(RECIPES)}.",
)
@training_option(
    "--norm",
    "norms",
    type=click.Choice([*NORMS]),
    multiple=True,
    default=COMPARISON,
    show_default=True,
    metavar="NAME",
    help=f"Normalization: {', '.join(NORMS)}. Repeatable; each is a run.",
)
@training_option(
    "--groups", multiple=True, type=int, help="Groups G_M of the batch, for norms with that option. Repeatable."
)
@training_option(
    "--channel-groups",
    multiple=True,
    type=int,
    help="Groups G_C of the channels, for norms with that option. Repeatable.",
)
@training_option(
    "--ghost-by",
    type=click.Choice(GHOST_BY),
    multiple=True,
    help="Implementation of GhostNorm: a layer, BatchNorm on micro-batches, or BatchNorm in each of several processes. "
    "Repeatable.  [default: layer]",
)
@training_option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    default=(0,),
    show_default=True,
    help="Seed of weights and data order. Repeatable.",
)
@training_option("--epochs", type=int, help="Passes over the training set.")
@training_option("--batch-size", type=int, help="Samples per update.")
@training_option("--lr", type=float, help="Learning rate of SGD; the highest one if the recipe changes it.")
@training_option("--train-samples", type=int, help="Training samples, a stratified subset.  [default: all]")
@training_option(
    "--precision", type=click.Choice(PRECISIONS), help="Precision of forward and backward passes.  [default: float32]"
)
@probe_option("--step-sizes", type=Numbers(), help="Step sizes eta along the gradient, such as 0.1,0.2,0.4.")
@probe_option("--every", type=int, help="Interval of probed updates: 2 probes every second one.")
@probe_option("--overhead", type=Share(), help="Share of the training time for probes, such as 10%; sets the interval.")
@probe_option("--gradients", is_flag=True, default=None, help="Measure gradients, too: predictiveness and beta.")
@device_option
@data_dir_option
@output_option(
    "--out", type=LocationType(), default=Path("traces"), show_default=True, help="Folder of traces, or a URL."
)
@output_option("--overwrite", is_flag=True, help="Replace runs of the same name.")
@output_option(
    "--resume",
    is_flag=True,
    help="Continue unfinished runs of the same name from their checkpoints; keep finished ones.",
)
@output_option(
    "--checkpoint-seconds",
    type=float,
    default=TraceTarget.checkpoint_seconds,
    show_default=True,
    help="Minimum time between checkpoints; longer if they would take more than 3 % of the time.",
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
    """Train a recipe with several norms and record the traces.

    Before each update, the loss of the same batch is measured at several step sizes along the gradient. Each
    combination of norm, groups and seed is a run. Omitted options come from the recipe. Draw the traces with
    `landscape plot`.
    """
    target = TraceTarget(out, data_dir, device, overwrite, resume, checkpoint_seconds)
    base = _base(recipe, options)
    given = {"groups": groups, "channel_groups": channel_groups, "ghost_by": ghost_by}
    for option in (option for option, values in given.items() if values):
        if not any(option in _variants(norm) for norm in norms):
            flag = f"--{option.replace('_', '-')}"
            raise LandscapeError(f"{flag}: none of the norms {', '.join(norms)} has this option. Omit it.")
    runs = _runs(base, norms, seeds, {name: values or (getattr(base, name),) for name, values in given.items()})
    for run in prepare(runs, target):
        train_run(run, target, options)
    if rank() is None:  # Under torchrun, the parent process prints it.
        report(f"Draw them: landscape plot {out}")


def _base(name: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the given options."""
    given = {option: value for option, value in options.items() if value is not None}
    # A given learning rate applies to the runs without a norm, too.
    return replace(RECIPES[name], **given, **({"lr_without_norm": None} if "lr" in given else {}))


def _variants(norm: str) -> tuple[str, ...]:
    """Return the settings that make variants of a norm."""
    return (*options_of(norm), "ghost_by") if norm == "ghost" else options_of(norm)


def _runs(
    base: Recipe, norms: Sequence[str], seeds: Sequence[int], variants: Mapping[str, Sequence[Any]]
) -> list[Recipe]:
    """Return each combination of norm, its variants and seed once."""
    runs = []
    for norm in norms:
        names = _variants(norm)
        for values in product(*(variants[name] for name in names), seeds):
            chosen = dict(zip((*names, "seed"), values, strict=True))
            runs.append(replace(base, norm=norm, **chosen).resolve())
    return list(dict.fromkeys(runs))
