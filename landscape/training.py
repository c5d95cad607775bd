"""Trains a recipe: with the probe attached, for a landscape, or without it, for its accuracy."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from landscape.errors import UserError
from landscape.experiment import Experiment, usable_device
from landscape.probe import LandscapeProbe
from landscape.ranks import joined, launched, own_device
from landscape.recipes import Recipe


def train(
    recipe: Recipe,
    out: str | Path = "traces",
    *,
    data_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    on_update: Callable[[LandscapeProbe], None] = lambda probe: None,
) -> Path:
    """Train a recipe, probing its updates, and record the trace.

    Args:
        recipe: What is trained, such as ``RECIPES["mnist"]`` or a ``dataclasses.replace`` of it.
        out: Folder of traces; the run gets a folder named ``recipe.run`` in it.
        data_dir: Where the files of the data set are, or are put; see :func:`landscape.data.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; by default the GPU where there is one.
        overwrite: Whether a trace of the same name is replaced.
        on_update: Called after every update.

    Returns:
        The run's folder, for :func:`landscape.read_traces`. Its table ``epochs`` holds loss and accuracy on the test
        set and on what was held out.

    Raises:
        UserError: A recipe, device, data set or folder that cannot be used.
    """
    if recipe.ghost_by != "ranks":
        return _trained(Experiment(recipe, data_dir, device), Path(out), overwrite, on_update)
    check_processes(recipe)
    own = own_device(usable_device(device).type)
    with joined(own) as ranks:
        return _trained(Experiment(recipe, data_dir, own, ranks), Path(out), overwrite, on_update)


def check_processes(recipe: Recipe) -> None:
    """Raise a UserError unless torchrun has started as many processes as the recipe is trained by."""
    processes = launched() or 1
    if recipe.ghost_by == "ranks" and processes != recipe.groups:
        raise UserError(
            f"ghost_by='ranks' with groups={recipe.groups} takes as many processes, and there are {processes}: "
            f"`landscape probe --ghost-by ranks` starts them, or `torchrun --nproc-per-node {recipe.groups}`."
        )
    if recipe.ghost_by != "ranks" and processes > 1:
        raise UserError(
            f"torchrun has started {processes} processes, and {recipe.run} is trained by one: take norm ghost and "
            "ghost_by ranks, or leave torchrun out."
        )


def _trained(experiment: Experiment, out: Path, overwrite: bool, on_update: Callable[[LandscapeProbe], None]) -> Path:
    """Train with the probe attached; the folder of the trace."""
    recipe = experiment.recipe
    probe = LandscapeProbe(
        experiment.model,
        experiment.optimizer,
        experiment.criterion,
        step_sizes=recipe.probe_lrs,
        relative=recipe.relative,
        every=recipe.every,
        overhead=recipe.overhead,
        gradients=recipe.gradients,
        engine=recipe.engine,
        trace=out / recipe.run,
        facts=asdict(recipe) | experiment.facts(),
        overwrite=overwrite,
        steps_per_epoch=experiment.updates,
    )
    with probe:
        for epoch in range(1, recipe.epochs + 1):
            losses = []
            for loss in experiment.epoch():
                losses.append(loss)
                on_update(probe)
            probe.trace.append(_after(epoch, losses, experiment), table="epochs")
    return out / recipe.run


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
        UserError: A recipe, device or data set that cannot be used.
    """
    experiment, started = Experiment(recipe, data_dir, device), time.perf_counter()
    row: dict[str, float] = {}
    for epoch in range(1, experiment.recipe.epochs + 1):
        losses, ended = list(experiment.epoch()), epoch == experiment.recipe.epochs
        row = _after(epoch, losses, experiment, ended) | {"seconds": time.perf_counter() - started}
        on_epoch(row)
    return row


def rehearse(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> None:
    """Raise the UserError that :func:`train` would raise, as far as it can be known without training.

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
