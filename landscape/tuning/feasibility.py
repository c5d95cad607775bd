"""What of a tuning can be trained, and how long that takes, found out before any of it begins."""

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
"""Seconds after which the mean time of an update is taken for known."""


def check_feasible(tuning: TuningConfig, data_dir: str | Path | None = None, device: str | None = None) -> TuningPlan:
    """Find out which configurations can be trained.

    Args:
        tuning: What is asked for.
        data_dir: Where the files of the data set are, or are put; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU where there is one.

    Raises:
        LandscapeError: A value is out of range, the recipe cannot be trained, or no configuration of a norm is possible.
    """
    tuning = replace(tuning, norms=tuple(dict.fromkeys(tuning.norms)))
    tuning.check()
    possible: dict[str, tuple[Configuration, ...]] = {}
    impossible: dict[Configuration, str] = {}
    recipe = tuning.recipe.resolve()
    data = load_dataset(recipe.dataset, data_dir, resolve_device(device)).split(recipe.validation, recipe.train_samples)
    for norm in tuning.norms:
        asked = candidates(norm, tuning.channel_groups, tuning.groups)
        for each in asked:
            try:
                initial_model(tuning.trainings([each])[0].resolve(), data)
            except LandscapeError as error:
                impossible[each] = str(error)
        possible[norm] = tuple(each for each in asked if each not in impossible)
        if not possible[norm]:
            why = impossible[asked[0]] if asked else "there are no groups to try; give some."
            raise LandscapeError(f"Nothing can be trained with the norm {norm!r}: {why}")
    samples = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return TuningPlan(tuning, possible, impossible, samples)


def seconds_per_training(plan: TuningPlan, data_dir: str | Path | None = None, device: str | None = None) -> float:
    """How long a training takes on this device, told from a few updates and one evaluation of one configuration."""
    configurations: Sequence[Configuration] = plan.possible[plan.tuning.norms[-1]]
    recipe = plan.tuning.trainings(configurations[-1:])[0]
    # Two epochs are begun here, and the learning rate has to reach as far.
    experiment = Experiment(replace(recipe, epochs=max(2, recipe.epochs)), data_dir, device)
    for loss in islice(experiment.epoch(), 2):
        loss.item()  # waits for the device; the first updates are slower than all others
    begun = time.perf_counter()
    updates = 0
    for loss in islice(experiment.epoch(), 10):
        loss.item()
        updates += 1
        if time.perf_counter() - begun > LONG_ENOUGH:
            break
    per_update = (time.perf_counter() - begun) / updates
    begun = time.perf_counter()
    for samples in (experiment.data.validation, experiment.data.test):
        experiment.evaluate(samples)
    per_evaluation = time.perf_counter() - begun
    return recipe.epochs * (experiment.updates * per_update + per_evaluation)
