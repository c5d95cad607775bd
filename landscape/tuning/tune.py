"""Tunes norms by trainings that several processes share, and trains what was chosen on the whole training set."""

import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from landscape import __version__
from landscape.errors import LandscapeError
from landscape.training.experiment import resolve_device
from landscape.training.recipe import Recipe
from landscape.training.train import classify
from landscape.tuning.database import open_storage
from landscape.tuning.plan import TuningPlan
from landscape.tuning.strategies import Configuration, run_strategies
from landscape.tuning.trials import OnTrained, run_trials

JOBS_PER_CORE = 8
"""Processes for each CPU core: more of them would only take its memory."""


@dataclass(frozen=True)
class Outcome:
    """What a tuning came to.

    Attributes:
        chosen: The configuration of each norm; None where every one had a run that diverged.
        trials: One row per training: ``norm``, ``channel_groups``, ``groups``, ``seed``, ``part`` (``tuning``, or
            ``test`` for those on the whole training set), the last epoch's losses and accuracies, ``seconds``, when it
            ``started`` and ``ended``, its ``device`` and the versions of the packages.
    """

    chosen: Mapping[str, Configuration | None]
    trials: pd.DataFrame


@dataclass(frozen=True)
class TuningBackend:
    """Where trainings are kept and run.

    Attributes:
        storage: Address of the database; see :func:`landscape.tuning.database.open_storage`.
        data_dir: Where the files of the data set are; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU where there is one.
        heartbeat: Seconds between the signs of life of a training.
        grace: Seconds without one after which it is run again.
    """

    storage: str
    data_dir: Path | None = None
    device: str | None = None
    heartbeat: int = 20
    grace: int = 60


def tune(
    plan: TuningPlan, place: TuningBackend, *, jobs: int = 1, on_trained: OnTrained = lambda recipe, row: None
) -> Outcome:
    """Choose the groups of each norm by validation accuracy, then train on the whole training set for test accuracy.

    Whoever calls this with an equal plan and the same storage, at the same time or later, shares the trainings: none is
    run twice, unless the process that ran it has died.

    Args:
        plan: What is tuned.
        place: Where trainings are kept and run.
        jobs: How many processes of this machine train; they share its CPU cores.
        on_trained: Called after each training of this call, in the process that ran it; more than one job needs a
            function that can be pickled.

    Raises:
        LandscapeError: The storage cannot be used, or ``jobs`` is out of range.
    """
    most = JOBS_PER_CORE * (os.cpu_count() or 1)
    if not 1 <= jobs <= most:
        raise LandscapeError(f"jobs={jobs} is out of range; give a whole number of processes from 1 to {most} here.")
    open_storage(place.storage).engine.dispose()  # a mistake in the address is told before any process is started
    if jobs > 1:
        _run_jobs(jobs, plan, place, on_trained)
    return _work(plan, place, on_trained)  # after other jobs this only reads; what one that died has left is run here


def _work(plan: TuningPlan, place: TuningBackend, on_trained: OnTrained) -> Outcome:
    """Take part until all is trained, and return all of it."""
    storage = open_storage(place.storage, heartbeat=place.heartbeat, grace=place.grace)
    rows: list[dict[str, Any]] = []

    def run(configurations: Sequence[Configuration], whole: bool) -> dict[Configuration, list[float]]:
        trainings = plan.tuning.trainings(configurations, whole)
        ended = run_trials(storage, trainings, partial(_train, place), on_trained)
        scores: dict[Configuration, list[float]] = {each: [] for each in configurations}
        for training, row in zip(trainings, ended, strict=True):
            configuration = Configuration(training.norm, **training.norm_options)
            scores[configuration].append(row["score"])
            rows.append({"norm": training.norm, "part": "test" if whole else "tuning", **row})
        return scores

    try:
        chosen = run_strategies(
            plan.tuning.strategies(plan.possible), lambda configurations: run(configurations, False)
        )
        if plan.samples["test"]:
            run([each for each in chosen.values() if each is not None], True)
    finally:
        storage.engine.dispose()
    return Outcome(chosen, _frame(rows))


def _train(place: TuningBackend, recipe: Recipe, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train one recipe of a study, to the last epoch's row and what made it."""
    accuracy = "validation_accuracy" if recipe.validation else "test_accuracy"
    row = classify(
        recipe,
        data_dir=place.data_dir,
        device=place.device,
        on_epoch=lambda row: report(int(row["epoch"]), row[accuracy]),
    )
    diverged = not math.isfinite(row["train_loss"])  # then its accuracy, that of a guess, says nothing
    versions = {"landscape": __version__, "torch": str(torch.__version__)}
    made_by = {"device": str(resolve_device(place.device)), **versions}
    return row | {"score": math.nan if diverged else row[accuracy]} | made_by


def _run_jobs(jobs: int, plan: TuningPlan, place: TuningBackend, on_trained: OnTrained) -> None:
    """Let processes of their own take part until all is trained."""
    spawn = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not survive a fork
    threads = max(1, torch.get_num_threads() // jobs)
    processes = []
    try:
        for _ in range(jobs):
            process = spawn.Process(target=_job, args=(threads, plan, place, on_trained), daemon=True)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.join(5)  # Ctrl-C reaches them too, and they tell the database that their trials are free
            process.terminate()


def _job(threads: int, plan: TuningPlan, place: TuningBackend, on_trained: OnTrained) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(KeyboardInterrupt):
        _work(plan, place, on_trained)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    first = ["norm", "channel_groups", "groups", "seed", "part"]
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=[*first, *(name for name in frame if name not in first)])
    return frame.astype({"channel_groups": "Int64", "groups": "Int64"}).drop(columns="score")
