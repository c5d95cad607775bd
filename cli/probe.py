"""``landscape probe``: train a recipe with several norms and record what the probe measures."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from landscape.errors import UserError
from landscape.recipes import GHOST_BY, PRECISIONS, RECIPES, Recipe
from landscape.vocabulary import NORMS, options_of

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from landscape.probe import LandscapeProbe

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
@click.option("--groups", multiple=True, type=int, help="Groups G_M of the batch, for ghost and seq. Repeatable.")
@click.option(
    "--channel-groups", multiple=True, type=int, help="Groups G_C of the channels, for group and seq. Repeatable."
)
@click.option("--ghost-by", help=f"What makes GhostNorm's groups: {', '.join(GHOST_BY)}.  [default: layer]")
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
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("traces"), show_default=True, help="Folder of traces."
)
@click.option("--overwrite", is_flag=True, help="Replace runs of the same name.")
def command(
    recipe: str,
    norms: Sequence[str],
    seeds: Sequence[int],
    groups: Sequence[int],
    channel_groups: Sequence[int],
    device: str | None,
    data_dir: Path | None,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a recipe once for each norm and seed, probing its updates, and record the traces.

    Before each update the loss of the same batch is measured at several step sizes along the gradient. Options that
    are not given come from the recipe. Draw what was recorded with `landscape plot`.
    """
    base = _base(recipe, options)
    variants = {"groups": groups or (base.groups,), "channel_groups": channel_groups or (base.channel_groups,)}
    for option, given in (("groups", groups), ("channel_groups", channel_groups)):
        if given and not any(option in options_of(norm) for norm in norms):
            raise UserError(f"{option} is given, but none of the norms {', '.join(norms)} takes it; leave it out.")
    runs = _runs(base, norms, seeds, variants)
    _rehearse(runs, out, data_dir, device, overwrite)
    for run in runs:
        _train(run, out, data_dir, device, overwrite)
    click.echo(f"Draw them: landscape plot {out}")


def _base(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name with the options that were given."""
    if name not in RECIPES:
        raise UserError(f"Unknown recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    given = {option: value for option, value in options.items() if value is not None}
    # A learning rate that is asked for is that of all runs.
    return replace(RECIPES[name], **given, **({"lr_without_norm": None} if "lr" in given else {}))


def _runs(
    base: Recipe, norms: Sequence[str], seeds: Sequence[int], variants: Mapping[str, Sequence[Any]]
) -> list[Recipe]:
    """Every combination, each once: seeds innermost, and only the variants that a norm knows."""
    runs = []
    for norm in norms:
        names = options_of(norm)
        for values in product(*(variants[name] for name in names), seeds):
            chosen = dict(zip((*names, "seed"), values, strict=True))
            runs.append(replace(base, norm=norm, **chosen).checked())
    return list(dict.fromkeys(runs))


def _rehearse(runs: Sequence[Recipe], out: Path, data_dir: Path | None, device: str | None, overwrite: bool) -> None:
    """Before the first run is trained, find out whether a later one cannot be."""
    from landscape.trace import holds_rows
    from landscape.training import rehearse

    if not overwrite and (taken := [str(out / run.run) for run in runs if holds_rows(out / run.run)]):
        raise UserError(f"Recorded already: {', '.join(taken)}. Give another --out, or --overwrite to replace.")
    for run in {replace(run, seed=0): run for run in runs}.values():
        rehearse(run, data_dir, device)


def _train(run: Recipe, out: Path, data_dir: Path | None, device: str | None, overwrite: bool) -> None:
    """Train one run under a progress bar, and say in one line where its trace is and how smooth the landscape was."""
    from landscape.training import train

    try:
        with _Progress(run) as progress:
            folder = train(run, out, data_dir=data_dir, device=device, overwrite=overwrite, on_update=progress.update)
    except KeyboardInterrupt:
        click.echo(
            f"Interrupted. What was recorded of this run is in {out / run.run}; --overwrite starts it anew.", err=True
        )
        raise
    click.echo(_smoothness(folder))


def _smoothness(folder: Path) -> str:
    from landscape.measures import summarize
    from landscape.trace import read_traces

    summary = summarize(read_traces(folder)).iloc[0]
    accuracy = read_traces(folder, table="epochs")["test_accuracy"].iloc[-1]
    not_finite = f", {summary.not_finite} of them not finite" if summary.not_finite else ""
    tested = "no test set" if accuracy != accuracy else f"test accuracy {accuracy:.2%}"
    return (
        f"{folder}: mean range {summary.mean_range:.4g} (median {summary.median_range:.4g}) "
        f"over {summary.updates} updates{not_finite}; {tested}"
    )


class _Progress:
    """A progress bar with the current loss and the range of the probed losses, where a person looks on."""

    def __init__(self, run: Recipe) -> None:
        from tqdm import tqdm

        self.epochs = run.epochs
        self.bar = tqdm(desc=run.run, unit=" updates", disable=None)
        self.shown = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, probe: "LandscapeProbe") -> None:
        self.bar.total = self.epochs * (probe.steps_per_epoch or 0)
        # Reading a loss waits for the device, so it is done as often as an eye can follow, not as updates come.
        if not self.bar.disable and time.monotonic() - self.shown > 0.2 and (row := probe.last()):
            self.shown = time.monotonic()
            low, high = min(row["losses"]), max(row["losses"])
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, range {low:.4f} to {high:.4f}", refresh=False)
        self.bar.update()
