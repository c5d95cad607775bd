import math
import sqlite3
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState
from sharing import GHOSTS, ROWS, begun, check_that_one_of_two_may_be_killed, runs, score, start, states

from landscape.errors import LandscapeError
from landscape.tuning import trials
from landscape.tuning.database import open_storage
from landscape.tuning.trials import run_trials, study_name


@pytest.fixture
def storage(tmp_path):
    opened = open_storage(f"sqlite:///{tmp_path}/here.sqlite3", heartbeat=1, grace=1)
    yield opened
    opened.engine.dispose()


class Trainer:
    """Notes what it trains; ``then`` may interfere."""

    def __init__(self, then=lambda recipe: score(recipe)):
        self.trained, self.then = [], then

    def __call__(self, recipe, report):
        self.trained.append(recipe.run_name)
        return {"score": self.then(recipe)}


def values(rows):
    return [[row["groups"], row["seed"], row["score"]] for row in rows]


def test_everything_is_trained_once_in_order(storage):
    trainer = Trainer()
    batch = replace(GHOSTS[0], norm="batch")
    rows = run_trials(storage, [*GHOSTS, batch], trainer)
    assert trainer.trained == runs([*GHOSTS, batch])
    assert values(rows[:-1]) == ROWS
    assert "groups" not in rows[-1]
    assert all(row["started"] <= row["ended"] for row in rows)


def test_what_is_complete_is_not_trained_again(storage):
    run_trials(storage, GHOSTS[:3], Trainer())
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS, trainer)) == ROWS
    assert trainer.trained == runs(GHOSTS[3:])
    assert run_trials(storage, GHOSTS, Trainer(pytest.fail)) is not None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, LandscapeError("cannot be"), MemoryError])
def test_what_was_stopped_is_trained_again_and_nothing_else(storage, stop):
    def stopped(recipe):
        if recipe == GHOSTS[2]:
            raise stop
        return score(recipe)

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        run_trials(storage, GHOSTS, Trainer(stopped))
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS[:4], trainer)) == ROWS[:4]
    assert trainer.trained == runs(GHOSTS[2:4])


def test_a_run_that_diverged_is_kept_as_it_is_and_as_the_worst(storage):
    trainer = Trainer(lambda recipe: math.nan if recipe.groups == 4 else score(recipe))
    first, again = run_trials(storage, GHOSTS, trainer), run_trials(storage, GHOSTS, trainer)
    assert len(trainer.trained) == 6
    assert [row["groups"] for row in again if math.isnan(row["score"])] == [4, 4]
    assert str(values(first)) == str(values(again))
    assert optuna.load_study(study_name=study_name(GHOSTS[0]), storage=storage).best_params == {"groups": 8, "seed": 1}


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"lr": 0.2}, {"validation": 0}, {"norm": "seq"}, {"train_samples": 500}]
)
def test_other_settings_are_never_mixed_in(storage, change):
    run_trials(storage, GHOSTS[:1], Trainer())
    trainer = Trainer()
    run_trials(storage, [replace(GHOSTS[0], **change)], trainer)
    assert len(trainer.trained) == 1


def test_trainings_of_the_same_settings_share_a_study_that_says_what_they_are(storage):
    assert len({study_name(recipe) for recipe in GHOSTS}) == 1
    assert study_name(GHOSTS[0]).startswith("classify-digits ghost tuning ")
    assert study_name(replace(GHOSTS[0], validation=0)).startswith("classify-digits ghost test ")
    run_trials(storage, GHOSTS[:1], Trainer())
    settings = optuna.load_study(study_name=study_name(GHOSTS[0]), storage=storage).user_attrs["settings"]
    assert (settings["epochs"], settings["lr"], "seed" in settings) == (20, 0.1, False)


def add(storage, state, recipe=GHOSTS[0]):
    study = optuna.load_study(study_name=study_name(recipe), storage=storage)
    point = {"groups": recipe.groups, "seed": recipe.seed}
    ranges = dict.fromkeys(point, optuna.distributions.IntDistribution(0, trials.LARGEST))
    study.add_trial(optuna.trial.create_trial(state=state, params=point, distributions=ranges))


def test_of_two_workers_that_queue_the_same_training_the_first_has_it(storage):
    run_trials(storage, GHOSTS[1:2], Trainer())
    add(storage, TrialState.WAITING)
    add(storage, TrialState.WAITING)
    trainer = Trainer()
    run_trials(storage, GHOSTS[:3], trainer)
    assert trainer.trained == runs([GHOSTS[0], GHOSTS[2]])
    assert sorted(states(storage)) == ["COMPLETE"] * 3 + ["PRUNED"]


def test_an_empty_queue_trains_nothing(storage):
    worker = trials._Worker(storage, GHOSTS, Trainer(pytest.fail), pytest.fail)
    worker._run(next(iter(worker._wanted)), queue=False)
    assert states(storage) == ["PRUNED"]


def test_a_trial_that_died_before_its_first_sign_of_life_is_run_again(storage):
    run_trials(storage, GHOSTS[1:2], Trainer())
    add(storage, TrialState.RUNNING)
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS[:2], trainer)) == ROWS[:2]
    assert trainer.trained == runs(GHOSTS[:1])
    assert states(storage) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_worker_whose_trial_was_given_up_goes_on_and_nothing_counts_twice(storage, tmp_path):
    """As after a long sleep of the machine: another worker has the trial now, or nobody."""
    other = open_storage(f"sqlite:///{tmp_path}/here.sqlite3", heartbeat=1, grace=1)

    def given_up_once(recipe):
        if len(trainer.trained) == 1:
            study = optuna.load_study(study_name=study_name(recipe), storage=other)
            other.set_trial_state_values(study.trials[0]._trial_id, TrialState.FAIL)
        return score(recipe)

    trainer = Trainer(given_up_once)
    assert values(run_trials(storage, GHOSTS, trainer)) == ROWS
    assert trainer.trained == runs([GHOSTS[0], *GHOSTS])
    assert Counter(states(storage)) == {"FAIL": 1, "COMPLETE": 6}
    other.engine.dispose()


def test_a_transaction_on_sqlite_may_write_from_its_beginning(storage, tmp_path):
    """Or else two workers could both read that a trial is waiting, and both take it."""
    other = sqlite3.connect(tmp_path / "here.sqlite3", timeout=0)
    with storage.engine.begin(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.close()


def test_of_two_processes_one_is_killed_and_the_other_finishes(tmp_path):
    check_that_one_of_two_may_be_killed(f"sqlite:///{tmp_path}/here.sqlite3")


def test_two_processes_share_the_trainings(tmp_path):
    url = f"sqlite:///{tmp_path}/here.sqlite3"
    workers = [start(url, 0.3), start(url, 0.3)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert Counter(begun("".join(outputs))) == Counter(runs(GHOSTS))
    assert [output.splitlines()[-1] for output in outputs] == [str(ROWS)] * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tuning.db", "no address of a database"),
        ("postgresql://nobody@127.0.0.1:1/nothing", "cannot be used: .*refused"),
        ("oracle://here/there", "no driver"),
        ("sqlite:////nowhere/at/all.sqlite3", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_told(url, message):
    with pytest.raises(LandscapeError, match=message):
        open_storage(url)
