"""Check which configurations can be trained, and estimate the time, before starting."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

from landscape.data.dataset import Dataset, Samples, load_dataset
from landscape.errors import LandscapeError
from landscape.training.experiment import Experiment, initial_model, resolve_device
from landscape.training.recipe import Recipe
from landscape.tuning.plan import TuningConfig, TuningPlan
from landscape.tuning.strategies import Configuration, candidates

LONG_ENOUGH = 1.0
"""Seconds of an update from which on larger batches are extrapolated."""
SMALLEST = 64
"""First batch that is timed, as a part of the recipe's."""
FORWARD = 1 / 3
"""Cost of a forward pass as a share of that of an update."""


def check_feasible(tuning: TuningConfig, data_dir: str | Path | None = None, device: str | None = None) -> TuningPlan:
    """Return a plan with the configurations that can be trained.

    A configuration can be trained if its model runs a forward pass on the first batch; GhostNorm with 128 groups of a
    batch of 128 cannot, for example. The model runs on the device ``meta``, which computes shapes but no values.

    Args:
        tuning: Configuration of the search.
        data_dir: Folder of the data files, to which missing ones are downloaded; see
            :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU if there is one.

    Raises:
        LandscapeError: A value is out of range, the recipe cannot be trained, or a norm has no possible configuration.

    Examples:
        >>> from landscape import RECIPES
        >>> plan = check_feasible(TuningConfig(RECIPES["classify-digits"], norms=("ghost",), groups=(4, 128)))
        >>> print(*plan.possible["ghost"])
        GhostNorm (G=4)
        >>> print(*plan.impossible)
        GhostNorm (G=128)
        >>> plan.samples
        {'train': 1200, 'validation': 300, 'test': 297}
    """
    tuning = replace(tuning, norms=tuple(dict.fromkeys(tuning.norms)))
    tuning.check()
    recipe = tuning.recipe.resolve()
    data = load_dataset(recipe.dataset, data_dir, resolve_device(device)).split(recipe.validation, recipe.train_samples)
    samples = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    data = replace(data, train=Samples(data.train.inputs.to("meta"), data.train.targets.to("meta")))
    possible: dict[str, tuple[Configuration, ...]] = {}
    impossible: dict[Configuration, str] = {}
    for norm in tuning.norms:
        requested = candidates(norm, tuning.channel_groups, tuning.groups)
        impossible |= {each: reason for each in requested if (reason := _refusal(tuning.trainings([each])[0], data))}
        possible[norm] = tuple(each for each in requested if each not in impossible)
        if not possible[norm]:
            reason = impossible[requested[0]] if requested else "no numbers of groups were given. Give at least one."
            raise LandscapeError(f"norm={norm!r}: no configuration can be trained: {reason}")
    return TuningPlan(tuning, possible, impossible, samples)


def _refusal(recipe: Recipe, data: Dataset) -> str | None:
    """Return why a recipe cannot be trained, or None."""
    try:
        initial_model(recipe.resolve(), data)
    except LandscapeError as error:
        return str(error)
    return None


def seconds_per_training(plan: TuningPlan, data_dir: str | Path | None = None, device: str | None = None) -> float:
    """Estimate the seconds that one training takes on this device.

    The time of an update by the numbers of updates and of evaluated samples. An update of a large model is timed with a
    part of the batch, and counted as if its time grew with the batch.

    Args:
        plan: Plan of the search.
        data_dir: Folder of the data files; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU if there is one.
    """
    recipe = plan.tuning.trainings(plan.possible[plan.tuning.norms[-1]][-1:])[0]
    per_update = _extrapolated(lambda part: _seconds_of_update(recipe, part, data_dir, device), recipe.batch_size)
    evaluated = recipe.epochs * plan.samples["validation"] + plan.samples["test"]
    updates = recipe.epochs * (plan.samples["train"] // recipe.batch_size)
    return per_update * (updates + FORWARD * evaluated / recipe.batch_size)


def _extrapolated(seconds: Callable[[int], float], batch: int) -> float:
    """Return the seconds of an update with the whole batch.

    Parts of the batch are timed, each 8 times the last, until one takes long enough.
    """
    part = max(2, batch // SMALLEST)
    while True:
        part = min(part, batch)
        taken = seconds(part)
        if part == batch or taken > LONG_ENOUGH:
            return taken * batch / part
        part *= 8


def _seconds_of_update(recipe: Recipe, samples: int, data_dir: str | Path | None, device: str | None) -> float:
    if samples < recipe.batch_size:  # The groups of the recipe may not fit.
        recipe = replace(recipe, norm="batch", devices=1, batch_size=samples)
    # The learning rate schedule must cover several updates.
    experiment = Experiment(replace(recipe, epochs=max(2, recipe.epochs)), data_dir, device)
    seconds, started = [], time.perf_counter()
    for loss in islice(experiment.epoch(), 12):
        loss.item()  # Synchronizes the device.
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > LONG_ENOUGH:
            break
        started = time.perf_counter()
    return median(seconds[2:] or seconds[-1:])  # The first two updates are the slowest.
