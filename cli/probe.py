"""``landscape probe``: recipes trained with several norms, with their traces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from landscape.callables import is_callable_name
from landscape.errors import LandscapeError
from landscape.names import NORMS
from landscape.probe.options import DIRECTIONS
from landscape.training.presets import RECIPES
from landscape.training.recipe import GHOST_BY, LOSSES, OPTIMIZERS, PRECISIONS, UNCHANGED, Recipe, norm_settings
from landscape.training.target import TraceTarget

from .output import FORMATS, LIVE, echo, formatted, report
from .params import Command, LocationType, Numbers, Share, data_dir_option, device_option, options_under, remembered
from .runner import prepare, rank, train_run

COMPARISON = ("none", "batch", "ghost")
OWN = Recipe(
    name="own",
    dataset="digits",
    model="simplenet",
    batch_size=64,
    epochs=10,
    lr=0.1,
    step_sizes=(0.5, 1.0, 1.5, 2.0),
    relative=True,
)
"""Recipe of a model or data of your own without ``--recipe``."""
ADAPTIVE_LR = 0.001
"""Default learning rate of other optimizers than SGD, that of torch's Adam."""

training_option = options_under("Training")
probe_option = options_under("Probe")
output_option = options_under("Output")


@click.command("probe", cls=Command)
@training_option(
    "--recipe",
    type=click.Choice([*RECIPES]),
    metavar="NAME",
    help=f"Recipe to train: {', '.join(RECIPES)}.  [default: digits]",
)
@training_option("--model", help="Model of your own, package.module:build; or one of the recipes', such as resnet20.")
@training_option(
    "--data", "dataset", help="Data of your own, package.module:load or file.npz; or those of a recipe, such as digits."
)
@training_option("--name", help="First part of the names of runs.  [default: the recipe, or your module or file]")
@training_option(
    "--norm",
    "norms",
    type=click.Choice([*NORMS, UNCHANGED]),
    multiple=True,
    metavar="NAME",
    help=f"Normalization: {', '.join(NORMS)}, unchanged (your model as it is). Repeatable; each is a run.  "
    f"[default: {', '.join(COMPARISON)}; unchanged for your own]",
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
@training_option("--lr", type=float, help="Learning rate; the highest one if the recipe changes it.")
@training_option("--loss", type=click.Choice(LOSSES), help="Loss of outputs and targets.  [default: cross-entropy]")
@training_option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS, case_sensitive=False),
    metavar="NAME",
    help=f"Optimizer: {', '.join(OPTIMIZERS)}, in any case. Others than SGD have a default --lr of 0.001.  "
    "[default: SGD]",
)
@training_option("--momentum", type=float, help="Momentum of SGD.")
@training_option("--weight-decay", type=float, help="Weight decay of the optimizer.")
@training_option("--train-samples", type=int, help="Training samples, a stratified subset.  [default: all]")
@training_option(
    "--precision", type=click.Choice(PRECISIONS), help="Precision of forward and backward passes.  [default: float32]"
)
@probe_option(
    "--step-sizes",
    type=Numbers(),
    help="Step sizes eta along the direction, such as 0.1,0.2,0.4; multiples of the learning rate for your own. "
    "Negative ones look uphill.",
)
@probe_option(
    "--direction",
    type=click.Choice(DIRECTIONS),
    help="Direction: the gradient, or the optimizer's update.  [default: gradient]",
)
@probe_option("--every", type=int, help="Interval of probed updates: 2 probes every second one.")
@probe_option("--overhead", type=Share(), help="Share of the training time for probes, such as 10%; sets the interval.")
@probe_option("--gradients", is_flag=True, default=None, help="Measure gradients, too: predictiveness and beta.")
@probe_option(
    "--critical", is_flag=True, default=None, help="Search for the critical step, by up to 6 more points per update."
)
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
@output_option("--live", help="Draw the range as text in the progress bar, too.", **remembered(LIVE))
@output_option(
    "--format", "style", type=click.Choice(FORMATS), help="Print a table of all runs in this format at the end, only."
)
def command(
    recipe: str | None,
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
    style: str | None,
    **options: Any,
) -> None:
    """Train a recipe with several norms and record the traces.

    Before each update, the loss of the same batch is measured at several step sizes along the gradient. Each
    combination of norm, groups and seed is a run. Omitted options come from the recipe. Draw the traces with
    `landscape plot`.

    A model of your own is a function `build()` that returns a new torch.nn.Module. Data of your own are a function
    `load()` that returns x_train, y_train and, for a test set, x_test, y_test (a tuple or a dict of arrays or tensors),
    or a file.npz with these names. Inputs are floats, or integers for an embedding; targets are classes 0, 1, ... as
    integers, or floats for --loss mse. Modules of the current folder are found. --norm replaces the BatchNorms of the
    model; without it the model is trained as it is. `landscape init` writes a file to start from.
    """
    target = TraceTarget(out, data_dir, device, overwrite, resume, checkpoint_seconds)
    base = _base(recipe, options)
    norms = norms or ((UNCHANGED,) if base.has_own_model else COMPARISON)
    given = {"groups": groups, "channel_groups": channel_groups, "ghost_by": ghost_by}
    for option in (option for option, values in given.items() if values):
        if not any(option in _variants(norm) for norm in norms):
            flag = f"--{option.replace('_', '-')}"
            raise LandscapeError(f"{flag}: none of the norms {', '.join(norms)} has this option. Omit it.")
    runs = _runs(base, norms, seeds, {name: values or (getattr(base, name),) for name, values in given.items()})
    for run in prepare(runs, target, err=bool(style)):
        train_run(run, target, {"recipe": recipe, "name": base.name, **options}, err=bool(style))
    if style and not rank():
        from .summarize import records

        echo(formatted(records([target.location(run) for run in runs]), style))
    elif rank() is None:  # Under torchrun, the parent process prints it.
        report(f"Draw them: landscape plot {out}")


def _base(name: str | None, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the given options."""
    given = {option: value for option, value in options.items() if value is not None}
    own = [given[option] for option in ("model", "dataset") if option in given]
    base = OWN if name is None and own else RECIPES[name or "digits"]
    if own:
        base = replace(base, name=_name(own[0]) if name is None else f"{name}-{_name(own[0])}")
    if given.get("optimizer", base.optimizer) != base.optimizer:
        base = replace(base, lr=ADAPTIVE_LR, lr_without_norm=None, momentum=0.0, nesterov=False)
    # A given learning rate applies to the runs without a norm, too.
    return replace(base, **given, **({"lr_without_norm": None} if "lr" in given else {}))


def _name(source: str) -> str:
    """Return the name of runs with a model or data.

    Examples:
        >>> _name("my.nets:build"), _name("my.nets:wide"), _name("data/prices.npz"), _name("resnet20")
        ('nets', 'nets-wide', 'prices', 'resnet20')
    """
    if not is_callable_name(source):
        return Path(source).stem
    module, _, attribute = source.partition(":")
    own = module.rpartition(".")[2]
    return own if attribute in ("build", "load") else f"{own}-{attribute}"


def _variants(norm: str) -> tuple[str, ...]:
    """Return the settings that make variants of a norm."""
    return (*norm_settings(norm), "ghost_by") if norm == "ghost" else norm_settings(norm)


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
