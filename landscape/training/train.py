"""Trains a recipe: with the probe attached, for a landscape, or without it, for its accuracy."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.group import RankFailedError
from landscape.distributed.setup import local_device, process_group, world_size
from landscape.errors import LandscapeError
from landscape.probe.landscape_probe import LandscapeProbe
from landscape.storage.filesystem import Location, inside
from landscape.training.checkpoint import Checkpoints
from landscape.training.completed import is_recorded
from landscape.training.experiment import Experiment, resolve_device
from landscape.training.recipe import Recipe

OnUpdate = Callable[[LandscapeProbe], None]


def train(
    recipe: Recipe,
    out: Location = "traces",
    *,
    data_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    on_update: OnUpdate = lambda probe: None,
) -> Location:
    """Train a recipe, probing its updates, and record the trace.

    Beside the trace of an unfinished run there is a checkpoint. On a CPU, with the same number of threads, a run that
    was killed and resumed has the same trace as one that never was, bit for bit but for the column ``seconds``.

    Args:
        recipe: What is trained, such as ``RECIPES["mnist"]`` or a ``dataclasses.replace`` of it.
        out: Folder of traces, or a URL such as ``s3://bucket/traces``; the run gets a folder ``recipe.run`` in it.
        data_dir: Where the files of the data set are, or are put; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; by default the GPU where there is one.
        overwrite: Whether a trace of the same name is replaced.
        resume: Whether an unfinished run of the same name goes on from its last checkpoint, or starts anew where it has
            none; a finished one stays as it is.
        checkpoint_seconds: A checkpoint is written after so many seconds, or later if they would take more than 3 % of
            the time; also when ``on_update`` raises.
        on_update: Called after every update.

    Returns:
        The run's folder, for :func:`landscape.read_traces`. Its table ``epochs`` holds loss and accuracy on the test
        set and on what was held out.

    Raises:
        LandscapeError: A recipe, device, data set or folder that cannot be used; or a run to be resumed that has other
            settings, or a damaged checkpoint.
    """
    check_resuming(resume, overwrite, checkpoint_seconds)
    place = inside(out, recipe.resolve().run_name)
    if resume and is_recorded(recipe, place):
        return place
    begin = TraceTarget(place, overwrite, resume, checkpoint_seconds)
    if recipe.ghost_by != "ranks":
        _Training(Experiment(recipe, data_dir, device), begin).run(on_update)
        return place
    check_processes(recipe)
    own = local_device(resolve_device(device).type)
    with process_group(own) as ranks:
        _Training(Experiment(recipe, data_dir, own, ranks), begin).run(on_update)
    return place


def check_resuming(resume: bool, overwrite: bool, checkpoint_seconds: float) -> None:
    """Raise a LandscapeError unless these can be asked for together."""
    if resume and overwrite:
        raise LandscapeError("resume goes on with a run, and overwrite starts it anew: choose one of them.")
    if not checkpoint_seconds >= 0:
        raise LandscapeError(f"checkpoint_seconds={checkpoint_seconds} is out of range; give seconds from 0 on.")


def check_processes(recipe: Recipe) -> None:
    """Raise a LandscapeError unless torchrun has started as many processes as the recipe is trained by."""
    processes = world_size() or 1
    if recipe.ghost_by == "ranks" and processes != recipe.groups:
        raise LandscapeError(
            f"ghost_by='ranks' with groups={recipe.groups} takes as many processes, and there are {processes}: "
            f"`landscape probe --ghost-by ranks` starts them, or `torchrun --nproc-per-node {recipe.groups}`."
        )
    if recipe.ghost_by != "ranks" and processes > 1:
        raise LandscapeError(
            f"torchrun has started {processes} processes, and {recipe.run_name} is trained by one: take norm ghost and "
            "ghost_by ranks, or leave torchrun out."
        )


@dataclass(frozen=True)
class TraceTarget:
    """Where a run is recorded, and what becomes of an earlier one there."""

    place: Location
    overwrite: bool
    resume: bool
    checkpoint_seconds: float


class _Training:
    """An experiment with the probe attached, and how far it has come."""

    def __init__(self, experiment: Experiment, begin: TraceTarget) -> None:
        self.experiment, self.begin = experiment, begin
        self.epoch = 1
        self.losses: list[Tensor] = []
        """Of the updates of this epoch so far."""
        recipe = experiment.recipe
        self.probe = LandscapeProbe(
            experiment.model,
            experiment.optimizer,
            experiment.criterion,
            step_sizes=recipe.probe_lrs,
            relative=recipe.relative,
            every=recipe.every,
            overhead=recipe.overhead,
            gradients=recipe.gradients,
            engine=recipe.engine,
            trace=begin.place,
            facts=asdict(recipe) | experiment.facts(),
            overwrite=begin.overwrite,
            resume=begin.resume,
            steps_per_epoch=experiment.updates,
        )
        trace, seconds = self.probe.trace, begin.checkpoint_seconds
        self.checkpoints = Checkpoints(begin.place, trace, recipe, experiment.ranks, seconds)

    def run(self, on_update: OnUpdate) -> None:
        """Train, from where an earlier process has come to."""
        recipe = self.experiment.recipe
        with self.probe:
            restored = self.begin.resume and self.checkpoints.restore(self.load_state_dict)
            if self.begin.resume and not restored and is_recorded(recipe, self.begin.place):
                return  # another process has just ended it
            while self.epoch <= recipe.epochs:
                for loss in self.experiment.epoch(len(self.losses)):
                    self.losses.append(loss)
                    self._between_updates(on_update)
                self.probe.trace.append(_after(self.epoch, self.losses, self.experiment), table="epochs")
                self.epoch, self.losses = self.epoch + 1, []
            if self.probe.trace.flush():
                self.checkpoints.discard()

    def _between_updates(self, on_update: OnUpdate) -> None:
        try:
            self.experiment.ranks.run_on_all(lambda: on_update(self.probe))
        except RankFailedError:  # with whom a checkpoint would be written
            raise
        except BaseException:
            self.checkpoints.keep(self.state_dict)
            raise
        if self.checkpoints.due():
            self.checkpoints.keep(self.state_dict)

    def state_dict(self) -> dict[str, Any]:
        own = {"experiment": self.experiment.state_dict(), "probe": self.probe.state_dict()}
        return {"epoch": self.epoch, "losses": torch.stack(self.losses), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.experiment.load_state_dict(state["experiment"])
        self.probe.load_state_dict(state["probe"])
        self.epoch, self.losses = state["epoch"], list(state["losses"].to(self.experiment.device))


def classify(
    recipe: Recipe,
    *,
    data_dir: str | Path | None = None,
    device: str | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> dict[str, float]:
    """Train a recipe without a probe, for its accuracy.

    Args:
        recipe: As for :func:`train`.
        data_dir: Likewise.
        device: Likewise.
        on_epoch: Called after every epoch, with its row, in which only the last epoch has test columns.

    Returns:
        The last epoch's row, as in the table ``epochs`` of a trace (NaN where nothing was held out, or there is no test
        set), and ``seconds`` since the first update.

    Raises:
        LandscapeError: A recipe, device or data set that cannot be used.
    """
    experiment, started = Experiment(recipe, data_dir, device), time.perf_counter()
    row: dict[str, float] = {}
    for epoch in range(1, experiment.recipe.epochs + 1):
        losses, ended = list(experiment.epoch()), epoch == experiment.recipe.epochs
        row = _after(epoch, losses, experiment, ended) | {"seconds": time.perf_counter() - started}
        on_epoch(row)
    return row


def dry_run(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> None:
    """Raise the LandscapeError that :func:`train` would raise, as far as it can be known without training.

    Args:
        recipe: As for :func:`train`, and so are the others.
        data_dir: Likewise.
        device: Likewise.
    """
    Experiment(recipe, data_dir, device)


def _after(epoch: int, losses: list[Tensor], experiment: Experiment, test: bool = True) -> dict[str, float]:
    """The row of an epoch that has just ended; what is said of the test set is NaN unless it is asked for."""
    data = experiment.data
    validation, tested = experiment.evaluate(data.validation), experiment.evaluate(data.test if test else data.test[:0])
    return {
        "epoch": epoch,
        "step": epoch * experiment.updates,
        "train_loss": experiment.mean_loss(losses),
        "validation_loss": validation[0],
        "validation_accuracy": validation[1],
        "test_loss": tested[0],
        "test_accuracy": tested[1],
    }
