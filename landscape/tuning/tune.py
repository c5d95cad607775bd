"""Search for the best groups of each norm, by trainings that several processes share."""

import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from landscape.tuning.strategies import Configuration
from landscape.tuning.trials import OnTrained, run_trials

JOBS_PER_CORE = 8
"""Maximum number of processes per CPU core; more would only use memory."""


@dataclass(frozen=True)
class Outcome:
    """Result of a search.

    Attributes:
        chosen: Best configuration by norm; None if every configuration of a norm had a diverged run.
        trials: One row per training: ``norm``, ``channel_groups``, ``groups``, ``seed``, ``part`` (``"tuning"``, or
            ``"test"`` if trained on the whole training set), losses and accuracies (0 to 1) of the last epoch,
            ``seconds``, the times ``started`` and ``ended``, ``device`` and the versions of the packages.
    """

    chosen: Mapping[str, Configuration | None]
    trials: pd.DataFrame


@dataclass(frozen=True)
class TuningBackend:
    """Database, data folder and device of the trainings.

    Attributes:
        storage: URL of the database; see :func:`landscape.tuning.database.open_storage`.
        data_dir: Folder of the data files; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ...; by default the GPU if there is one.
        heartbeat: Seconds between two heartbeats of a running training.
        grace: Seconds without a heartbeat after which a training counts as dead and is run again.

    Examples:
        >>> TuningBackend("sqlite:///tuning.sqlite3", device="cpu").grace
        60
    """

    storage: str = field(repr=False)  # It may have a password.
    data_dir: Path | None = None
    device: str | None = None
    heartbeat: int = 20
    grace: int = 60


def tune(
    plan: TuningPlan, backend: TuningBackend, *, jobs: int = 1, on_trained: OnTrained = lambda recipe, row: None
) -> Outcome:
    """Choose the groups of each norm, then measure test accuracies.

    Configurations are compared by validation accuracy, and the best one of each norm is trained on the whole training
    set, if there are test samples (Dimitriou & Arandjelovic, arXiv:2007.08554, section 3.2).

    Processes that call this with an equal plan and the same storage, at the same time or later, share the trainings:
    none is run twice, unless the process that ran it died.

    Args:
        plan: Plan of the search, from :func:`landscape.tuning.feasibility.check_feasible`.
        backend: Database, data folder and device of the trainings.
        jobs: Number of processes to start on this machine; they share its CPU cores.
        on_trained: Called with recipe and result after each training of this call, in the process that ran it. It must
            be picklable if ``jobs`` is above 1.

    Raises:
        LandscapeError: The storage cannot be used, or ``jobs`` is out of range.

    Examples:
        >>> from dataclasses import replace
        >>> from landscape import RECIPES
        >>> from landscape.tuning.feasibility import check_feasible
        >>> from landscape.tuning.plan import TuningConfig
        >>> recipe = replace(RECIPES["classify-digits"], epochs=1, train_samples=256)
        >>> plan = check_feasible(TuningConfig(recipe, norms=("batch",), runs=1), device="cpu")
        >>> outcome = tune(plan, TuningBackend("sqlite:///tuning.sqlite3", device="cpu"))
        >>> print(outcome.chosen["batch"])
        BatchNorm
        >>> outcome.trials["part"].tolist()
        ['tuning', 'test']
    """
    most = JOBS_PER_CORE * (os.cpu_count() or 1)
    if not 1 <= jobs <= most:
        raise LandscapeError(f"jobs={jobs}: must be a whole number of processes from 1 to {most} on this machine.")
    open_storage(backend.storage).engine.dispose()  # An invalid URL raises here, before any process starts.
    if jobs > 1:
        _run_jobs(jobs, plan, backend, on_trained)
    # After other jobs this reads their results, and runs what a job that died left unfinished.
    return _work(plan, backend, on_trained)


def _work(plan: TuningPlan, backend: TuningBackend, on_trained: OnTrained) -> Outcome:
    """Run trainings until all are complete, and return every result."""
    storage = open_storage(backend.storage, heartbeat=backend.heartbeat, grace=backend.grace)
    rows: list[dict[str, Any]] = []

    def train(configurations: Sequence[Configuration], whole: bool = False) -> dict[Configuration, list[float]]:
        recipes = plan.tuning.trainings(configurations, whole)
        results = run_trials(storage, recipes, partial(_train, backend), on_trained)
        scores: dict[Configuration, list[float]] = {each: [] for each in configurations}
        for recipe, result in zip(recipes, results, strict=True):
            scores[Configuration(recipe.norm, **recipe.norm_options)].append(result["score"])
            rows.append({"norm": recipe.norm, "part": "test" if whole else "tuning", **result})
        return scores

    try:
        chosen = plan.choose(train)
        if plan.samples["test"]:
            train([each for each in chosen.values() if each is not None], whole=True)
    finally:
        storage.engine.dispose()
    return Outcome(chosen, _frame(rows))


def _train(backend: TuningBackend, recipe: Recipe, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train a recipe; return the last epoch with its score."""
    accuracy = "validation_accuracy" if recipe.validation else "test_accuracy"
    row = classify(
        recipe,
        data_dir=backend.data_dir,
        device=backend.device,
        on_epoch=lambda row: report(int(row["epoch"]), row[accuracy]),
    )
    diverged = not math.isfinite(row["train_loss"])  # Its accuracy is that of a random guess, so it has no score.
    versions = {"landscape": __version__, "torch": str(torch.__version__)}
    origin = {"device": str(resolve_device(backend.device)), **versions}
    return row | {"score": math.nan if diverged else row[accuracy]} | origin


def _run_jobs(jobs: int, plan: TuningPlan, backend: TuningBackend, on_trained: OnTrained) -> None:
    """Run trainings in several processes until all are complete."""
    spawn = multiprocessing.get_context("spawn")  # CUDA and the threads of torch do not survive a fork.
    threads = max(1, torch.get_num_threads() // jobs)
    processes = []
    try:
        for _ in range(jobs):
            process = spawn.Process(target=_job, args=(threads, plan, backend, on_trained), daemon=True)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.join(5)  # Ctrl-C reaches the jobs too, and they mark their trials in the database as failed.
            process.terminate()


def _job(threads: int, plan: TuningPlan, backend: TuningBackend, on_trained: OnTrained) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(KeyboardInterrupt):
        _work(plan, backend, on_trained)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    first = ["norm", "channel_groups", "groups", "seed", "part"]
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=[*first, *(name for name in frame if name not in first)])
    return frame.astype({"channel_groups": "Int64", "groups": "Int64"}).drop(columns="score")
