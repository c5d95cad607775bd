"""Training of recipes: with the probe, for a trace, or without it, for the accuracy."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.group import RankFailedError
from landscape.distributed.setup import local_device, process_group, world_size
from landscape.errors import LandscapeError
from landscape.names import check_choice
from landscape.probe.landscape_probe import LandscapeProbe
from landscape.storage.filesystem import Location
from landscape.training.checkpoint import Checkpoints
from landscape.training.completed import check_same_data, is_recorded
from landscape.training.experiment import Experiment, resolve_device
from landscape.training.presets import RECIPES
from landscape.training.progress import Progress
from landscape.training.recipe import Recipe
from landscape.training.target import TraceTarget

OnUpdate = Callable[[LandscapeProbe], None]
"""Function (probe) -> None, called after each update."""


def train(
    recipe: Recipe | str,
    out: Location = "traces",
    *,
    data_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    on_update: OnUpdate = lambda probe: None,
    progress: bool | None = None,
) -> Location:
    """Train a recipe, probe its updates, and record the trace.

    The folder of an unfinished run holds a checkpoint. On a CPU, with the same number of threads, a run that was killed
    and resumed has the same trace as an uninterrupted one, bit for bit, except for the column ``seconds``.

    Args:
        recipe: Recipe to train: one of `RECIPES`, its name, or a `dataclasses.replace` of it.
        out: Folder of traces, or a URL such as ``s3://bucket/traces``; the run is its subfolder ``recipe.run_name``.
        data_dir: Folder of data files, to which missing ones are downloaded; the default is the user's cache.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; the default is the GPU if there is one.
        overwrite: True replaces a run of the same name.
        resume: True continues an unfinished run of the same name from its checkpoint, restarts it if it has none, and
            leaves a finished run as it is.
        checkpoint_seconds: Minimum time between two checkpoints, in seconds; it is longer if checkpoints would take
            more than 3 % of the time. A checkpoint is also written if ``on_update`` raises.
        on_update: Function (probe) -> None, called after each update.
        progress: True or False to show a progress bar or not; the default shows it on a terminal and in a notebook.

    Returns:
        Folder or URL of the run, for `read_traces`. Its table ``epochs`` holds loss and accuracy on the test set and on
        the held-out samples.

    Raises:
        LandscapeError: The recipe, the device, the data set or the folder cannot be used; or the run to be resumed has
            other settings or a damaged checkpoint.

    Examples:
        >>> from dataclasses import replace
        >>> from landscape import RECIPES, read_traces, train
        >>> folder = train(replace(RECIPES["digits"], epochs=1, train_samples=256), device="cpu")
        >>> frame = read_traces(folder)
        >>> list(frame.step), bool(frame.loss_max[0] > frame.loss_min[0])
        ([0, 1], True)
    """
    if isinstance(recipe, str):
        check_choice("recipe", recipe, RECIPES)
        recipe = RECIPES[recipe]
    target = TraceTarget(out, data_dir, device, overwrite, resume, checkpoint_seconds)
    with Progress(recipe, progress) as bar:

        def after_update(probe: LandscapeProbe) -> None:
            bar.update(probe)
            on_update(probe)

        return record(recipe, target, after_update)


def record(recipe: Recipe, target: TraceTarget, on_update: OnUpdate = lambda probe: None) -> Location:
    """Train a recipe and record its trace, as `train` does.

    Args:
        recipe: Recipe to train.
        target: Destination of the trace.
        on_update: Function (probe) -> None, called after each update.

    Returns:
        Folder or URL of the run.
    """
    recipe = recipe.resolve()
    location = target.location(recipe)
    if target.resume and is_recorded(recipe, location):
        return location
    if recipe.ghost_by != "ranks":
        _Training(Experiment(recipe, target.data_dir, target.device), target).run(on_update)
        return location
    check_processes(recipe)
    own = local_device(resolve_device(target.device).type)
    with process_group(own) as ranks:
        _Training(Experiment(recipe, target.data_dir, own, ranks), target).run(on_update)
    return location


def check_processes(recipe: Recipe) -> None:
    """Raise a LandscapeError unless torchrun has started enough processes."""
    processes = world_size() or 1
    if recipe.ghost_by == "ranks" and processes != recipe.groups:
        raise LandscapeError(
            f"ghost_by='ranks' with groups={recipe.groups}: requires {recipe.groups} processes, got {processes}. Use "
            f"`landscape probe --ghost-by ranks`, or `torchrun --nproc-per-node {recipe.groups}`."
        )
    if recipe.ghost_by != "ranks" and processes > 1:
        raise LandscapeError(
            f"ghost_by={recipe.ghost_by!r}: {recipe.run_name} is trained by 1 process, but torchrun has started "
            f"{processes}. Use norm='ghost' with ghost_by='ranks', or omit torchrun."
        )


class _Training:
    """Experiment with its probe, and its progress.

    Order of events, for the checkpoint between updates 7 and 8: update 7, its row, ``on_update``, checkpoint, update 8.
    """

    def __init__(self, experiment: Experiment, target: TraceTarget) -> None:
        recipe = experiment.recipe
        self.experiment, self.resume, self.location = experiment, target.resume, target.location(recipe)
        facts = recipe.metadata() | experiment.metadata()
        if target.resume:
            check_same_data(facts, self.location)
        self.epoch = 1
        self.losses: list[Tensor] = []
        """Losses of the updates of this epoch so far."""
        self.probe = LandscapeProbe(
            experiment.model,
            experiment.optimizer,
            experiment.criterion,
            step_sizes=recipe.step_sizes,
            relative=recipe.relative,
            every=recipe.every,
            overhead=recipe.overhead,
            direction=recipe.direction,
            gradients=recipe.gradients,
            critical=recipe.critical,
            engine=recipe.engine,
            trace=self.location,
            facts=facts,
            overwrite=target.overwrite,
            resume=target.resume,
            steps_per_epoch=experiment.updates,
        )
        seconds = target.checkpoint_seconds
        self.checkpoints = Checkpoints(self.location, self.probe.trace, recipe, experiment.ranks, seconds)

    def run(self, on_update: OnUpdate) -> None:
        """Train to the end, from any checkpoint."""
        recipe = self.experiment.recipe
        with self.probe:
            restored = self.resume and self.checkpoints.restore(self.load_state_dict)
            if self.resume and not restored and is_recorded(recipe, self.location):
                return  # Another process has completed the run in the meantime.
            while self.epoch <= recipe.epochs:
                for loss in self.experiment.epoch(len(self.losses)):
                    self.losses.append(loss)
                    self._between_updates(on_update)
                self.probe.trace.append(_epoch_row(self.epoch, self.losses, self.experiment), table="epochs")
                self.epoch, self.losses = self.epoch + 1, []
            if self.probe.trace.flush():
                self.checkpoints.discard()

    def _between_updates(self, on_update: OnUpdate) -> None:
        try:
            self.experiment.ranks.run_on_all(lambda: on_update(self.probe))
        except RankFailedError:  # A checkpoint needs all ranks.
            raise
        except BaseException:
            self.checkpoints.save(self.state_dict)
            raise
        if self.checkpoints.due():
            self.checkpoints.save(self.state_dict)

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
        recipe: Recipe to train: one of `RECIPES`, or a `dataclasses.replace` of it.
        data_dir: Folder of data files, to which missing ones are downloaded; the default is the user's cache.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; the default is the GPU if there is one.
        on_epoch: Function (row) -> None, called after each epoch; only the row of the last epoch has test columns.

    Returns:
        Row of the last epoch, as in the table ``epochs`` of a trace, and ``seconds`` since the first update. Accuracies
        are shares from 0 to 1; they are NaN without held-out samples or without a test set.

    Raises:
        LandscapeError: The recipe, the device or the data set cannot be used.

    Examples:
        >>> from dataclasses import replace
        >>> from landscape import RECIPES
        >>> row = classify(replace(RECIPES["classify-digits"], epochs=2, train_samples=256), device="cpu")
        >>> row["epoch"], row["step"], 0 < row["test_accuracy"] < 1
        (2, 4, True)
    """
    experiment, started = Experiment(recipe, data_dir, device), time.perf_counter()
    row: dict[str, float] = {}
    for epoch in range(1, experiment.recipe.epochs + 1):
        losses, is_last = list(experiment.epoch()), epoch == experiment.recipe.epochs
        row = _epoch_row(epoch, losses, experiment, is_last) | {"seconds": time.perf_counter() - started}
        on_epoch(row)
    return row


def dry_run(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> Experiment:
    """Raise the LandscapeError of `train` before any training.

    Data and model are loaded, and one batch is evaluated; the experiment is returned.

    Args:
        recipe: Recipe to train: one of `RECIPES`, or a `dataclasses.replace` of it.
        data_dir: Folder of data files, to which missing ones are downloaded; the default is the user's cache.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; the default is the GPU if there is one.

    Raises:
        LandscapeError: The recipe, the device or the data set cannot be used.

    Examples:
        >>> from dataclasses import replace
        >>> from landscape import RECIPES
        >>> dry_run(replace(RECIPES["digits"], batch_size=5000), device="cpu")
        Traceback (most recent call last):
        landscape.errors.LandscapeError: batch_size=5000: must be at most the 1500 training samples.
    """
    return Experiment(recipe, data_dir, device)


def _epoch_row(epoch: int, losses: list[Tensor], experiment: Experiment, test: bool = True) -> dict[str, float]:
    """Return the row of an epoch, optionally without test columns."""
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
