"""Trains recipes one after the other, under a progress bar; commands of the command line share it."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from landscape.errors import LandscapeError, TrainingInterrupted
from landscape.training.recipe import Recipe

from .signals import SignalGuard

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from landscape.probe.landscape_probe import LandscapeProbe


@dataclass(frozen=True)
class Places:
    """Where traces go and what becomes of those that are there, where data comes from, and what computes."""

    out: str | Path
    data_dir: Path | None
    device: str | None
    overwrite: bool = False
    resume: bool = False
    checkpoint_seconds: float = 60.0

    @property
    def resuming(self) -> str:
        """What the command lacks to go on, were it stopped."""
        return "" if self.resume else " with --resume"

    def of(self, run: Recipe) -> str | Path:
        """The folder or URL of a run."""
        from landscape.storage.filesystem import inside

        return inside(self.out, run.run_name)


def rank() -> int | None:
    """Which of the processes that torchrun has started this is; None without torchrun."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def prepare(runs: Sequence[Recipe], places: Places) -> list[Recipe]:
    """Before the first run is trained, find out whether a later one cannot be, or was recorded already.

    Returns:
        The runs that are to be trained; of those that are recorded to their end, and to be resumed, one line is said.
    """
    from landscape.training.train import check_processes, check_resuming, dry_run

    check_resuming(places.resume, places.overwrite, places.checkpoint_seconds)
    left = _unrecorded(runs, places)
    if rank() is not None:
        for run in left:
            check_processes(run)
    for run in {replace(run, seed=0): run for run in left}.values():
        dry_run(run, places.data_dir, places.device)
    return left


def _unrecorded(runs: Sequence[Recipe], places: Places) -> list[Recipe]:
    from landscape.traces.folder import has_rows
    from landscape.training.completed import is_recorded

    if places.resume:
        ended = [run for run in runs if is_recorded(run, places.of(run))]
        for run in [] if rank() else ended:
            click.echo(f"{_smoothness(places.of(run))} (recorded before)")
        return [run for run in runs if run not in ended]
    taken = [str(places.of(run)) for run in runs if has_rows(places.of(run))]
    if taken and not places.overwrite:
        raise LandscapeError(
            f"Recorded already: {', '.join(taken)}. Give another --out, --resume to go on with what came to no end, or "
            "--overwrite to replace."
        )
    return list(runs)


def record(run: Recipe, places: Places, options: Mapping[str, Any]) -> None:
    """Train one run, and say in one line where its trace is and how smooth the landscape was.

    Args:
        run: What is trained.
        places: Where.
        options: What was asked of the recipe besides norm, groups and seed: for the processes that are to be started.
    """
    from .torchrun import torchrun

    if run.ghost_by == "ranks" and rank() is None:
        afterwards = f"The same command{places.resuming} goes on from what is recorded in {places.of(run)}."
        if code := torchrun(_arguments(run, places, options), run.groups or 1, afterwards):
            raise SystemExit(code)
        return
    folder, number = places.of(run), None
    with SignalGuard() as interruptions:
        try:
            _train(run, places, interruptions)
        except TrainingInterrupted:
            number = interruptions.signal or signal.SIGTERM  # that of another rank
        except KeyboardInterrupt:
            number = signal.SIGINT
        else:
            if not rank():
                click.echo(_smoothness(folder))
            number = interruptions.signal  # too late for this run
    if number:
        if not rank():
            when = f"after {interruptions.step} updates" if interruptions.step else "before any update"
            again = f"the same command{places.resuming} {_what_resuming_does(folder)}"
            click.echo(f"Stopped by {number.name} {when} of {folder}; {again}.", err=True)
        raise SystemExit(128 + number)


def _what_resuming_does(folder: str | Path) -> str:
    """What is there to go on from: a place that could not be written to may hold no checkpoint."""
    from landscape.storage.filesystem import store_at
    from landscape.traces.folder import CHECKPOINT

    try:
        there = CHECKPOINT in store_at(folder).names()
    except OSError:
        there = False
    return "goes on" if there else "starts it anew, as no checkpoint could be written"


def _train(run: Recipe, places: Places, interruptions: SignalGuard) -> None:
    """Train under a progress bar."""
    from landscape.training.train import train

    def on_update(probe: "LandscapeProbe") -> None:
        progress.update(probe)
        interruptions.between_updates(probe.step)

    with _Progress(run) as progress:
        train(
            run,
            places.out,
            data_dir=places.data_dir,
            device=places.device,
            overwrite=places.overwrite,
            resume=places.resume,
            checkpoint_seconds=places.checkpoint_seconds,
            on_update=on_update,
        )


def _arguments(run: Recipe, places: Places, options: Mapping[str, Any]) -> list[str]:
    """The command that trains this run alone, without the word ``landscape``."""
    asked = {"recipe": run.recipe, "norm": run.norm, "groups": run.groups, "seed": run.seed, "ghost_by": run.ghost_by}
    asked |= {"out": places.out, "data_dir": places.data_dir, "device": places.device}
    asked |= {"overwrite": places.overwrite or None, "resume": places.resume or None}
    asked |= {"checkpoint_seconds": places.checkpoint_seconds, **options}
    words = ["probe"]
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words += [flag]
        elif value is not None:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _smoothness(folder: str | Path) -> str:
    from landscape.analysis.summary import summarize
    from landscape.traces.reader import read_traces

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
        self.bar = tqdm(desc=run.run_name, unit=" updates", disable=True if rank() else None)
        self.shown = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, probe: "LandscapeProbe") -> None:
        if not self.bar.n:  # before them are those of an earlier process
            self.bar.n = self.bar.initial = probe.step - 1
        self.bar.total = self.epochs * (probe.options.steps_per_epoch or 0)
        # Reading a loss waits for the device, so it is done as often as an eye can follow, not as updates come.
        if not self.bar.disable and time.monotonic() - self.shown > 0.2 and (row := probe.last()):
            self.shown = time.monotonic()
            low, high = min(row["losses"]), max(row["losses"])
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, range {low:.4f} to {high:.4f}", refresh=False)
        self.bar.update()
