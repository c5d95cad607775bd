"""Trainings as trials of Optuna studies: each is run by one worker, and run again if the worker dies."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from landscape.training.recipe import Recipe
from landscape.tuning.database import quiet

if TYPE_CHECKING:  # Optuna is an optional dependency.
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial


Train = Callable[[Recipe, Callable[[int, float], None]], Mapping[str, Any]]
"""Function (recipe, report) -> result. It calls ``report(epoch, score)``; its result has the key ``score``."""
OnTrained = Callable[[Recipe, Mapping[str, Any]], None]
"""Function (recipe, result) -> None, called after each training."""

MAX_VALUE = 2**31
"""Upper bound of the groups and seeds of a trial; Optuna requires a range."""
POLL = 1.0
"""Seconds between two queries of the trials that other workers run."""
RESULT = "result"
"""User attribute of a trial with the result of its training."""
ALIVE = ("WAITING", "RUNNING", "COMPLETE")
_Key = tuple[str, tuple[tuple[str, int], ...]]
"""Name of the study, and parameters of the trial."""


def study_name(recipe: Recipe) -> str:
    """Return the name of the study of a training.

    Its trainings differ only in groups and seed. The name ends in a hash of all other settings, so trainings with
    different settings are never mixed.

    Examples:
        >>> from landscape import RECIPES
        >>> study_name(RECIPES["classify-digits"])
        'classify-digits batch tuning ...'
    """
    part = "tuning" if recipe.validation else "test"
    settings = json.dumps(_settings(recipe), sort_keys=True).encode()
    return f"{recipe.name} {recipe.norm} {part} {hashlib.sha256(settings).hexdigest()[:8]}"


def run_trials(
    storage: "RDBStorage",
    recipes: Sequence[Recipe],
    train: Train,
    on_trained: OnTrained = lambda recipe, result: None,
) -> list[dict[str, Any]]:
    """Train recipes that no other worker trains; return all results.

    The call blocks until every recipe is trained, here or by another worker with the same database. A recipe that was
    trained before is not trained again; one whose worker sends no heartbeat within the grace period is.

    Args:
        storage: Database, from :func:`landscape.tuning.database.open_storage`.
        recipes: Recipes to train, each once.
        train: Function (recipe, report) -> result; the result must have the key ``score``, and may be stored as JSON. A
            score of NaN, for a run that diverged, is the lowest score of the study.
        on_trained: Called with recipe and result after each training of this worker, once the result is stored.

    Returns:
        For each recipe: its groups and seed, its result, and the times ``started`` and ``ended``.

    Examples:
        >>> from landscape import RECIPES
        >>> from landscape.tuning.database import open_storage
        >>> recipes = [replace(RECIPES["classify-digits"], seed=seed) for seed in (0, 1)]
        >>> storage = open_storage("sqlite:///tuning.sqlite3")
        >>> rows = run_trials(storage, recipes, lambda recipe, report: {"score": 0.5 + 0.1 * recipe.seed})
        >>> [(row["seed"], row["score"]) for row in rows]
        [(0, 0.5), (1, 0.6)]
        >>> storage.engine.dispose()
    """
    with quiet():
        return _Worker(storage, recipes, train, on_trained).run()


class _Worker:
    """One of the processes that share the trainings."""

    def __init__(self, storage: "RDBStorage", recipes: Sequence[Recipe], train: Train, on_trained: OnTrained) -> None:
        import optuna

        self._storage, self._train, self._on_trained = storage, train, on_trained
        self._keys = list(dict.fromkeys(_key(study_name(recipe), _parameters(recipe)) for recipe in recipes))
        self._recipes = {study_name(recipe): recipe for recipe in recipes}
        self._studies: dict[str, Study] = {}
        self._touched: set[tuple[str, int]] = set()
        for name, recipe in self._recipes.items():
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="maximize")
            study.set_user_attr("settings", _settings(recipe))
            self._studies[name] = study

    def run(self) -> list[dict[str, Any]]:
        while True:
            trials = self._trials()
            states = {key: trials[key].state.name if key in trials else "MISSING" for key in self._keys}
            if (key := _first(states, "WAITING", "MISSING")) is not None:
                self._run_next(key, queue=states[key] == "MISSING")
            elif "RUNNING" in states.values():
                self._touch_heartbeat(
                    {(key[0], trials[key].number) for key, state in states.items() if state == "RUNNING"}
                )
                time.sleep(POLL)
            else:
                return [_row(trials[key]) for key in self._keys]

    def _trials(self) -> dict[_Key, "FrozenTrial"]:
        """Mark stale trials as failed; return the valid ones."""
        import optuna

        trials = {}
        for study in self._studies.values():
            optuna.storages.fail_stale_trials(study)
            trials |= _valid_trials(study)
        return trials

    def _touch_heartbeat(self, running: set[tuple[str, int]]) -> None:
        """Record a first heartbeat of each running trial.

        Optuna never marks a trial as failed whose worker died before the first heartbeat.
        """
        for name, number in running - self._touched:
            study_id = self._storage.get_study_id_from_name(name)
            self._storage.record_heartbeat(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))
        self._touched |= running

    def _run_next(self, key: _Key, queue: bool) -> None:
        """Run the first waiting trial of a study.

        If ``queue`` is true, a trial with the parameters of the key is queued first. Trials are queued one at a time,
        because the next command would run a queue left behind, even if that command requests fewer trainings.
        """
        import optuna

        study, trained, lost = self._studies[key[0]], [], []
        if queue:
            study.add_trial(_waiting_trial(dict(key[1])))

        def objective(trial: "Trial") -> float:
            # Two workers may queue the same training at the same time:
            #   worker A: reads MISSING, queues trial 7          runs trial 7
            #   worker B: reads MISSING,         queues trial 8               prunes trial 8, since 7 is valid
            # If another worker has emptied the queue, the trial has no parameters and is pruned too.
            valid = _valid_trials(study).get(_key(study.study_name, trial.params))
            if not trial.params or (valid is not None and valid.number < trial.number):
                raise optuna.TrialPruned
            recipe = replace(self._recipes[key[0]], **trial.params)
            try:
                trained.append((recipe, self._run_training(trial, recipe)))
            except optuna.exceptions.UpdateFinishedTrialError:
                lost.append(trial.number)
                raise
            score = trained[0][1]["score"]
            return score if math.isfinite(score) else -math.inf

        try:
            study.optimize(objective, n_trials=1)
        except ValueError:  # Optuna raises it at the end of a trial that another worker has marked as failed.
            if not trained and not lost:
                raise
        else:
            for recipe, result in trained:
                self._on_trained(recipe, result)

    def _run_training(self, trial: "Trial", recipe: Recipe) -> Mapping[str, Any]:
        def report(epoch: int, score: float) -> None:
            if math.isfinite(score):
                trial.report(score, epoch)

        result = self._train(recipe, report)
        trial.set_user_attr(RESULT, dict(result))  # One attribute, since each write is synced to disk.
        return result


def _settings(recipe: Recipe) -> dict[str, Any]:
    parameters = ("groups", "channel_groups", "seed")
    settings = recipe.resolve().metadata()
    settings["probe_lrs"] = settings.pop("step_sizes")  # The hash of version 0.1, whose studies are continued.
    for name, earlier in {"devices": 1, "clip_norm": None, "critical": False}.items():  # settings that came later
        if settings[name] == earlier:
            del settings[name]
    return {name: value for name, value in settings.items() if name not in parameters}


def _parameters(recipe: Recipe) -> dict[str, int]:
    return recipe.norm_options | {"seed": recipe.seed}


def _key(study: str, parameters: Mapping[str, int]) -> _Key:
    return study, tuple(sorted(parameters.items()))


def _first(states: Mapping[_Key, str], *wanted: str) -> _Key | None:
    return next((key for key, state in states.items() if state in wanted), None)


def _valid_trials(study: "Study") -> dict[_Key, "FrozenTrial"]:
    """Return the valid trial of each training.

    It is the first that is alive. Numbers of trials are unique, even if several workers add trials at the same time.
    """
    last_to_first = sorted(study.get_trials(deepcopy=False), key=lambda trial: -trial.number)
    return {_key(study.study_name, trial.params): trial for trial in last_to_first if trial.state.name in ALIVE}


def _waiting_trial(parameters: Mapping[str, int]) -> "FrozenTrial":
    """Return a trial for the queue, with its parameters.

    A trial of ``study.enqueue_trial`` gets its parameters only when it starts, so until then it would be unclear which
    training it is for.
    """
    import optuna

    ranges = dict.fromkeys(parameters, optuna.distributions.IntDistribution(0, MAX_VALUE))
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING, params=dict(parameters), distributions=dict(ranges)
    )


def _row(trial: "FrozenTrial") -> dict[str, Any]:
    return {
        **trial.params,
        **trial.user_attrs[RESULT],
        "started": trial.datetime_start,
        "ended": trial.datetime_complete,
    }
