"""Trains recipes one after the other, under a progress bar; commands of the command line share it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from landscape.errors import UserError
from landscape.recipes import Recipe

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from landscape.probe import LandscapeProbe


@dataclass(frozen=True)
class Places:
    """Where traces go, where data comes from, and what computes."""

    out: Path
    data_dir: Path | None
    device: str | None
    overwrite: bool = False


def rank() -> int | None:
    """Which of the processes that torchrun has started this is; None without torchrun."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def prepare(runs: Sequence[Recipe], places: Places) -> None:
    """Before the first run is trained, find out whether a later one cannot be, or was recorded already."""
    from landscape.runs import holds_rows
    from landscape.training import check_processes, rehearse

    taken = [str(places.out / run.run) for run in runs if holds_rows(places.out / run.run)]
    if taken and not places.overwrite:
        raise UserError(f"Recorded already: {', '.join(taken)}. Give another --out, or --overwrite to replace.")
    if rank() is not None:
        for run in runs:
            check_processes(run)
    for run in {replace(run, seed=0): run for run in runs}.values():
        rehearse(run, places.data_dir, places.device)


def record(run: Recipe, places: Places, options: Mapping[str, Any]) -> None:
    """Train one run, and say in one line where its trace is and how smooth the landscape was.

    Args:
        run: What is trained.
        places: Where.
        options: What was asked of the recipe besides norm, groups and seed: for the processes that are to be started.
    """
    from landscape.ranks import torchrun

    try:
        if run.ghost_by != "ranks" or rank() is not None:
            folder = _train(run, places)
            if not rank():
                click.echo(_smoothness(folder))
        elif code := torchrun(_arguments(run, places, options), run.groups or 1):
            raise SystemExit(code)
    except KeyboardInterrupt:
        click.echo(
            f"Interrupted. What was recorded of this run is in {places.out / run.run}; --overwrite starts it anew.",
            err=True,
        )
        raise


def _train(run: Recipe, places: Places) -> Path:
    """Train under a progress bar."""
    from landscape.training import train

    with _Progress(run) as progress:
        return train(
            run,
            places.out,
            data_dir=places.data_dir,
            device=places.device,
            overwrite=places.overwrite,
            on_update=progress.update,
        )


def _arguments(run: Recipe, places: Places, options: Mapping[str, Any]) -> list[str]:
    """The command that trains this run alone, without the word ``landscape``."""
    asked = {"recipe": run.recipe, "norm": run.norm, "groups": run.groups, "seed": run.seed, "ghost_by": run.ghost_by}
    asked |= {"out": places.out, "data_dir": places.data_dir, "device": places.device, **options}
    words = ["probe", *(["--overwrite"] if places.overwrite else [])]
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words += [flag]
        elif value is not None:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _smoothness(folder: Path) -> str:
    from landscape.measures import summarize
    from landscape.runs import read_traces

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
        self.bar = tqdm(desc=run.run, unit=" updates", disable=True if rank() else None)
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
