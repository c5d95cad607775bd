"""Trainings as trials of Optuna studies: taken by one worker each, run again after a death, kept for the next time."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from landscape.training.recipe import Recipe
from landscape.tuning.database import quiet

if TYPE_CHECKING:  # an extra
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial


Train = Callable[[Recipe, Callable[[int, float], None]], Mapping[str, Any]]
"""Trains a recipe, reporting (epoch, score) on the way; returns what is kept of it, of which ``score`` is its value."""
OnTrained = Callable[[Recipe, Mapping[str, Any]], None]

LARGEST = 2**31
"""Of the groups and seeds of a trial; Optuna asks for a range."""
POLL = 1.0
"""Seconds between looks at what other workers do."""
KEPT = "result"
"""The attribute of a trial that holds what is kept of it."""
ALIVE = ("WAITING", "RUNNING", "COMPLETE")
_Key = tuple[str, tuple[tuple[str, int], ...]]


def study_name(recipe: Recipe) -> str:
    """The study of a training, such as ``classify-digits ghost tuning 1f0c9a3e``: all but groups and seed in common.

    The number at the end is that of all settings, so what was trained with other ones is never mixed in.
    """
    part = "tuning" if recipe.validation else "test"
    settings = json.dumps(_settings(recipe), sort_keys=True).encode()
    return f"{recipe.recipe} {recipe.norm} {part} {hashlib.sha256(settings).hexdigest()[:8]}"


def run_trials(
    storage: "RDBStorage",
    recipes: Sequence[Recipe],
    train: Train,
    on_trained: OnTrained = lambda recipe, kept: None,
) -> list[dict[str, Any]]:
    """Return when every recipe is trained, having trained those that no other worker has taken.

    Args:
        storage: As :func:`landscape.tuning.database.open_storage` gives it; workers on several machines may share it.
        recipes: What is trained, each once.
        train: See ``Train``; a score of NaN, that of a run which diverged, is kept as the lowest there is.
        on_trained: Called with each recipe that was trained here and what is kept of it, once it is kept.

    Returns:
        For each recipe its groups and seed, what ``train`` returned, and when it ``started`` and ``ended``.
    """
    with quiet():
        return _Worker(storage, recipes, train, on_trained).finish()


class _Worker:
    """One of the processes that share the trainings."""

    def __init__(self, storage: "RDBStorage", recipes: Sequence[Recipe], train: Train, on_trained: OnTrained) -> None:
        import optuna

        self._storage, self._train, self._on_trained = storage, train, on_trained
        self._wanted = {_key(study_name(recipe), _point(recipe)): recipe for recipe in recipes}
        self._recipes = {study_name(recipe): recipe for recipe in recipes}
        self._studies: dict[str, Study] = {}
        self._greeted: set[tuple[str, int]] = set()
        for name, recipe in self._recipes.items():
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="maximize")
            study.set_user_attr("settings", _settings(recipe))
            self._studies[name] = study

    def finish(self) -> list[dict[str, Any]]:
        while True:
            trials = self._trials()
            states = {key: trials[key].state.name if key in trials else "MISSING" for key in self._wanted}
            if (key := _first(states, "WAITING", "MISSING")) is not None:
                self._run(key, queue=states[key] == "MISSING")
            elif "RUNNING" in states.values():
                self._greet({(key[0], trials[key].number) for key, state in states.items() if state == "RUNNING"})
                time.sleep(POLL)
            else:
                return [_row(trials[key]) for key in self._wanted]

    def _trials(self) -> dict[_Key, "FrozenTrial"]:
        """The trial of each training that counts, where it has one; trials without a sign of life are given up."""
        import optuna

        trials = {}
        for study in self._studies.values():
            optuna.storages.fail_stale_trials(study)
            trials |= _counted(study)
        return trials

    def _greet(self, running: set[tuple[str, int]]) -> None:
        """Give each running trial one sign of life: Optuna never gives up a trial that died before its first."""
        for name, number in running - self._greeted:
            study_id = self._storage.get_study_id_from_name(name)
            self._storage.record_heartbeat(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))
        self._greeted |= running

    def _run(self, key: _Key, queue: bool) -> None:
        """Run the first trial in the queue of a study, after putting one there if need be.

        One at a time: a queue that is left behind would be run by the next command, which may ask for less.
        """
        import optuna

        study, kept, lost = self._studies[key[0]], [], []
        if queue:
            study.add_trial(_waiting(dict(key[1])))

        def objective(trial: "Trial") -> float:
            # Workers that look at the same moment queue the same training, and the first of these trials counts; the
            # queue is empty where another worker was faster.
            first = _counted(study).get(_key(study.study_name, trial.params))
            if not trial.params or (first is not None and first.number < trial.number):
                raise optuna.TrialPruned
            recipe = replace(self._recipes[key[0]], **trial.params)
            try:
                kept.append((recipe, self._trained(trial, recipe)))
            except optuna.exceptions.UpdateFinishedTrialError:
                lost.append(trial.number)
                raise
            score = kept[0][1]["score"]
            return score if math.isfinite(score) else -math.inf

        try:
            study.optimize(objective, n_trials=1)
        except ValueError:  # Optuna's, at the end of a trial that another worker has given up meanwhile
            if not kept and not lost:
                raise
        else:
            for recipe, result in kept:
                self._on_trained(recipe, result)

    def _trained(self, trial: "Trial", recipe: Recipe) -> Mapping[str, Any]:
        def report(epoch: int, score: float) -> None:
            if math.isfinite(score):
                trial.report(score, epoch)

        kept = self._train(recipe, report)
        trial.set_user_attr(KEPT, dict(kept))  # at once: each write waits for the disk
        return kept


def _settings(recipe: Recipe) -> dict[str, Any]:
    special = ("groups", "channel_groups", "seed")
    return {name: value for name, value in asdict(recipe.resolve()).items() if name not in special}


def _point(recipe: Recipe) -> dict[str, int]:
    return recipe.norm_options | {"seed": recipe.seed}


def _key(study: str, point: Mapping[str, int]) -> _Key:
    return study, tuple(sorted(point.items()))


def _first(states: Mapping[_Key, str], *wanted: str) -> _Key | None:
    return next((key for key, state in states.items() if state in wanted), None)


def _counted(study: "Study") -> dict[_Key, "FrozenTrial"]:
    """The trial of each training that counts: the first that is alive. Numbers are unique, whoever adds a trial."""
    last_to_first = sorted(study.get_trials(deepcopy=False), key=lambda trial: -trial.number)
    return {_key(study.study_name, trial.params): trial for trial in last_to_first if trial.state.name in ALIVE}


def _waiting(point: Mapping[str, int]) -> "FrozenTrial":
    """A trial for the queue; its parameters come with it, so which trial of a training is first is never in doubt."""
    import optuna

    ranges = dict.fromkeys(point, optuna.distributions.IntDistribution(0, LARGEST))
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING, params=dict(point), distributions=dict(ranges)
    )


def _row(trial: "FrozenTrial") -> dict[str, Any]:
    return {
        **trial.params,
        **trial.user_attrs[KEPT],
        "started": trial.datetime_start,
        "ended": trial.datetime_complete,
    }
