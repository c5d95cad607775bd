"""Check which configurations can be trained, and estimate the time, before starting."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from landscape.data.dataset import load_dataset
from landscape.errors import LandscapeError
from landscape.training.experiment import Experiment, initial_model, resolve_device
from landscape.tuning.plan import TuningConfig, TuningPlan
from landscape.tuning.strategies import Configuration, candidates

LONG_ENOUGH = 5.0
"""Seconds after which the mean time of an update is considered accurate."""


def check_feasible(tuning: TuningConfig, data_dir: str | Path | None = None, device: str | None = None) -> TuningPlan:
    """Return a plan with the configurations that can be trained.

    A configuration can be trained if its model runs a forward pass on the first batch; GhostNorm with 128 groups of a
    batch of 128 cannot, for example. Nothing is trained.

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
    possible: dict[str, tuple[Configuration, ...]] = {}
    impossible: dict[Configuration, str] = {}
    recipe = tuning.recipe.resolve()
    data = load_dataset(recipe.dataset, data_dir, resolve_device(device)).split(recipe.validation, recipe.train_samples)
    for norm in tuning.norms:
        requested = candidates(norm, tuning.channel_groups, tuning.groups)
        for each in requested:
            try:
                initial_model(tuning.trainings([each])[0].resolve(), data)
            except LandscapeError as error:
                impossible[each] = str(error)
        possible[norm] = tuple(each for each in requested if each not in impossible)
        if not possible[norm]:
            reason = impossible[requested[0]] if requested else "no numbers of groups were given. Give at least one."
            raise LandscapeError(f"norm={norm!r}: no configuration can be trained: {reason}")
    samples = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return TuningPlan(tuning, possible, impossible, samples)


def seconds_per_training(plan: TuningPlan, data_dir: str | Path | None = None, device: str | None = None) -> float:
    """Estimate the seconds that one training takes on this device.

    epochs * (updates per epoch * seconds per update + seconds per evaluation), measured by up to 10 updates and one
    evaluation of one configuration.

    Args:
        plan: Plan of the search.
        data_dir: Folder of the data files; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU if there is one.
    """
    configurations: Sequence[Configuration] = plan.possible[plan.tuning.norms[-1]]
    recipe = plan.tuning.trainings(configurations[-1:])[0]
    # The learning rate schedule must cover the two epochs that are started here.
    experiment = Experiment(replace(recipe, epochs=max(2, recipe.epochs)), data_dir, device)
    for loss in islice(experiment.epoch(), 2):
        loss.item()  # Synchronizes the device. The first two updates are not timed, because they are the slowest.
    start = time.perf_counter()
    updates = 0
    for loss in islice(experiment.epoch(), 10):
        loss.item()
        updates += 1
        if time.perf_counter() - start > LONG_ENOUGH:
            break
    per_update = (time.perf_counter() - start) / updates
    start = time.perf_counter()
    for samples in (experiment.data.validation, experiment.data.test):
        experiment.evaluate(samples)
    per_evaluation = time.perf_counter() - start
    return recipe.epochs * (experiment.updates * per_update + per_evaluation)
