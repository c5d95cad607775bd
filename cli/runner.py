"""Training of several runs, one after another, with progress bar and signals."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landscape.errors import LandscapeError, TrainingInterrupted
from landscape.training.recipe import Recipe
from landscape.training.target import TraceTarget

from .output import LIVE, QUIET, TRACEBACK, VERBOSE, echo, is_set, report
from .params import Share
from .signals import SignalGuard

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it.
    from landscape.probe.landscape_probe import LandscapeProbe


def rank() -> int | None:
    """Return the rank of this process, or None without torchrun."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def prepare(runs: Sequence[Recipe], target: TraceTarget, err: bool = False) -> list[Recipe]:
    """Check that all runs can be trained; return unfinished ones.

    With ``target.resume``, a summary of each finished run is printed, and the run is left out. Lines are printed to
    the standard error with ``err``. How many BatchNorms of a model of the user are converted is printed, too.

    Raises:
        LandscapeError: A run cannot be trained, or exists and is to be kept.
    """
    from landscape.training.train import check_processes, dry_run

    unfinished = _unfinished(runs, target, err)
    if rank() is not None:
        for run in unfinished:
            check_processes(run)
    for run in {replace(run, seed=0): run for run in unfinished}.values():
        experiment = dry_run(run, target.data_dir, target.device)
        if experiment.converted is not None and not rank():
            of = f"{experiment.converted} BatchNorm{'s' * (experiment.converted > 1)} of {run.model}"
            report(f"{run.run_name}: {of} converted to {run.norm}", err=err)
    if not target.resume and not target.overwrite:
        _raise_if_recorded(runs, target)  # last, since it would hide other mistakes
    return unfinished


def _unfinished(runs: Sequence[Recipe], target: TraceTarget, err: bool) -> list[Recipe]:
    from landscape.training.completed import is_recorded

    recorded = [run for run in runs if is_recorded(run, target.location(run))] if target.resume else []
    for run in [] if rank() else recorded:
        report(f"{_summary(target.location(run))} (already recorded)", err=err)
    return [run for run in runs if run not in recorded]


def _raise_if_recorded(runs: Sequence[Recipe], target: TraceTarget) -> None:
    from landscape.traces.folder import TraceFolder

    existing = [str(target.location(run)) for run in runs if TraceFolder(target.location(run)).has_rows]
    if existing:
        raise LandscapeError(
            f"These runs exist: {', '.join(existing)}. Use another --out, --resume to continue unfinished runs, or "
            "--overwrite to replace them."
        )


def train_run(run: Recipe, target: TraceTarget, options: Mapping[str, Any], err: bool = False) -> None:
    """Train one run; print its folder and its smoothness.

    Args:
        run: Recipe of the run, resolved.
        target: Destination of the trace.
        options: Other options of ``landscape probe`` by name, for the processes of ``ghost_by="ranks"``.
        err: Print to the standard error.
    """
    from .torchrun import torchrun

    if run.ghost_by == "ranks" and rank() is None:
        hint = f"Run the same command{_missing_flag(target)} to continue from {target.location(run)}."
        if code := torchrun(_arguments(run, target, options), run.groups or 1, hint):
            raise SystemExit(code)
        return
    number = None
    with SignalGuard() as guard:
        try:
            _train(run, target, guard)
        except TrainingInterrupted:
            number = guard.signal or signal.SIGTERM  # Without a signal here, another rank received one.
        except KeyboardInterrupt:
            number = signal.SIGINT
        else:
            if not rank():
                report(_summary(target.location(run)), err=err)
                _warn_of_few_probes(target.location(run))
            number = guard.signal  # It came after the last update.
    if number:
        if not rank():
            when = f"after {guard.step} updates" if guard.step else "before any update"
            echo(f"Stopped by {number.name} {when}. {_resume_hint(run, target)}", err=True)
        raise SystemExit(128 + number)


def _missing_flag(target: TraceTarget) -> str:
    return "" if target.resume else " with --resume"


def _resume_hint(run: Recipe, target: TraceTarget) -> str:
    """Return a sentence on continuing, which needs a checkpoint."""
    from landscape.traces.folder import TraceFolder

    location = target.location(run)
    try:
        has_checkpoint = TraceFolder(location).has_checkpoint
    except OSError:
        has_checkpoint = False
    aim = f"continue {location}" if has_checkpoint else f"restart {location}, which has no checkpoint"
    return f"Run the same command{_missing_flag(target)} to {aim}."


def _train(run: Recipe, target: TraceTarget, guard: SignalGuard) -> None:
    from landscape.training.progress import Progress
    from landscape.training.train import record

    def on_update(probe: "LandscapeProbe") -> None:
        progress.update(probe)
        epoch, rest = divmod(probe.step, probe.options.steps_per_epoch or probe.step)
        if prints_epochs and not rest:
            echo(f"{run.run_name}: epoch {epoch} of {run.epochs}", err=True)
        guard.between_updates(probe.step)

    with Progress(run, False if rank() or is_set(QUIET) else None, live=is_set(LIVE)) as progress:
        prints_epochs = not progress.is_shown and is_set(VERBOSE) and not rank()
        record(run, target, on_update)


def _arguments(run: Recipe, target: TraceTarget, options: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``landscape`` that train this run alone."""
    values = {"recipe": run.name, "norm": run.norm, "groups": run.groups, "seed": run.seed, "ghost_by": run.ghost_by}
    values |= {name: value or None for name, value in vars(target).items() if name != "checkpoint_seconds"}
    values |= {"checkpoint_seconds": target.checkpoint_seconds, **options}
    values |= {option.rpartition(".")[2]: is_set(option) or None for option in (QUIET, VERBOSE, TRACEBACK, LIVE)}
    words = ["probe"]
    for name, value in values.items():
        flag = "--data" if name == "dataset" else f"--{name.replace('_', '-')}"
        if value is True:
            words += [flag]
        elif name == "overhead" and value is not None:
            words += [flag, Share.to_text(value)]
        elif value is not None:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _summary(location: str | Path) -> str:
    """Return a line with a run's smoothness and accuracy."""
    from landscape.analysis.summary import summarize
    from landscape.traces.reader import read_traces

    summary = summarize(read_traces(location)).iloc[0]
    loss, accuracy = read_traces(location, table="epochs")[["test_loss", "test_accuracy"]].iloc[-1]
    not_finite = f", {summary.not_finite} of them not finite" if summary.not_finite else ""
    tested = "no test set" if loss != loss else f"test loss {loss:.4g}"  # A regression has no accuracy.
    tested = tested if accuracy != accuracy else f"test accuracy {accuracy:.2%}"
    return (
        f"{location}: mean range {summary.mean_range:.4g} (median {summary.median_range:.4g}) "
        f"over {summary.updates} updates{not_finite}; {tested}"
    )


def _warn_of_few_probes(location: str | Path) -> None:
    """Warn if ``--overhead`` paid for too few probes."""
    from landscape.traces.folder import TraceFolder

    budget = TraceFolder(location).metadata().get("budget") or {}
    if "enough_share" in budget:
        paid = f"--overhead {100 * budget['share']:.4g}% paid for {budget['probes']} of {budget['updates']} updates"
        enough = f"--overhead {100 * budget['enough_share']:.4g}% pays for {budget['enough_probes']}"
        echo(f"Warning: {location}: {paid}, too few to compare runs. On this machine {enough}.", err=True)
