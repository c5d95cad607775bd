import math
import sqlite3
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState
from sharing import GHOSTS, ROWS, check_killed_worker, run_names, score, start_worker, started, trial_states

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
    """Training function that lists the recipes it trained; ``then`` computes the score."""

    def __init__(self, then=lambda recipe: score(recipe)):
        self.trained, self.then = [], then

    def __call__(self, recipe, report):
        self.trained.append(recipe.run_name)
        return {"score": self.then(recipe)}


def values(rows):
    return [[row["groups"], row["seed"], row["score"]] for row in rows]


def test_run_trials_in_order(storage):
    trainer = Trainer()
    batch = replace(GHOSTS[0], norm="batch")
    rows = run_trials(storage, [*GHOSTS, batch], trainer)
    assert trainer.trained == run_names([*GHOSTS, batch])
    assert values(rows[:-1]) == ROWS
    assert "groups" not in rows[-1]
    assert all(row["started"] <= row["ended"] for row in rows)


def test_run_trials_reuses_results(storage):
    run_trials(storage, GHOSTS[:3], Trainer())
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS, trainer)) == ROWS
    assert trainer.trained == run_names(GHOSTS[3:])
    assert run_trials(storage, GHOSTS, Trainer(pytest.fail)) is not None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, LandscapeError("cannot be"), MemoryError])
def test_run_trials_resumes_after_error(storage, stop):
    def stopped(recipe):
        if recipe == GHOSTS[2]:
            raise stop
        return score(recipe)

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        run_trials(storage, GHOSTS, Trainer(stopped))
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS[:4], trainer)) == ROWS[:4]
    assert trainer.trained == run_names(GHOSTS[2:4])


def test_run_trials_diverged_run(storage):
    trainer = Trainer(lambda recipe: math.nan if recipe.groups == 4 else score(recipe))
    first, again = run_trials(storage, GHOSTS, trainer), run_trials(storage, GHOSTS, trainer)
    assert len(trainer.trained) == 6
    assert [row["groups"] for row in again if math.isnan(row["score"])] == [4, 4]
    assert str(values(first)) == str(values(again))
    assert optuna.load_study(study_name=study_name(GHOSTS[0]), storage=storage).best_params == {"groups": 8, "seed": 1}


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"lr": 0.2}, {"validation": 0}, {"norm": "seq"}, {"train_samples": 500}]
)
def test_run_trials_separates_settings(storage, change):
    run_trials(storage, GHOSTS[:1], Trainer())
    trainer = Trainer()
    run_trials(storage, [replace(GHOSTS[0], **change)], trainer)
    assert len(trainer.trained) == 1


def test_study_name_and_settings(storage):
    assert len({study_name(recipe) for recipe in GHOSTS}) == 1
    assert study_name(GHOSTS[0]).startswith("classify-digits ghost tuning ")
    assert study_name(replace(GHOSTS[0], validation=0)).startswith("classify-digits ghost test ")
    run_trials(storage, GHOSTS[:1], Trainer())
    settings = optuna.load_study(study_name=study_name(GHOSTS[0]), storage=storage).user_attrs["settings"]
    assert (settings["epochs"], settings["lr"], "seed" in settings) == (20, 0.1, False)


def add_trial(storage, state, recipe=GHOSTS[0]):
    study = optuna.load_study(study_name=study_name(recipe), storage=storage)
    params = {"groups": recipe.groups, "seed": recipe.seed}
    ranges = dict.fromkeys(params, optuna.distributions.IntDistribution(0, trials.MAX_VALUE))
    study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=ranges))


def test_run_trials_prunes_duplicate(storage):
    run_trials(storage, GHOSTS[1:2], Trainer())
    add_trial(storage, TrialState.WAITING)
    add_trial(storage, TrialState.WAITING)
    trainer = Trainer()
    run_trials(storage, GHOSTS[:3], trainer)
    assert trainer.trained == run_names([GHOSTS[0], GHOSTS[2]])
    assert sorted(trial_states(storage)) == ["COMPLETE"] * 3 + ["PRUNED"]


def test_worker_empty_queue(storage):
    worker = trials._Worker(storage, GHOSTS, Trainer(pytest.fail), pytest.fail)
    worker._run_next(worker._keys[0], queue=False)
    assert trial_states(storage) == ["PRUNED"]


def test_run_trials_death_before_first_heartbeat(storage):
    run_trials(storage, GHOSTS[1:2], Trainer())
    add_trial(storage, TrialState.RUNNING)
    trainer = Trainer()
    assert values(run_trials(storage, GHOSTS[:2], trainer)) == ROWS[:2]
    assert trainer.trained == run_names(GHOSTS[:1])
    assert trial_states(storage) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_run_trials_own_trial_marked_as_failed(storage, tmp_path):
    """This happens after a suspend of the machine, when another worker has marked the trial as failed."""
    other = open_storage(f"sqlite:///{tmp_path}/here.sqlite3", heartbeat=1, grace=1)

    def fail_first(recipe):
        if len(trainer.trained) == 1:
            study = optuna.load_study(study_name=study_name(recipe), storage=other)
            other.set_trial_state_values(study.trials[0]._trial_id, TrialState.FAIL)
        return score(recipe)

    trainer = Trainer(fail_first)
    assert values(run_trials(storage, GHOSTS, trainer)) == ROWS
    assert trainer.trained == run_names([GHOSTS[0], *GHOSTS])
    assert Counter(trial_states(storage)) == {"FAIL": 1, "COMPLETE": 6}
    other.engine.dispose()


def test_sqlite_transaction_takes_write_lock(storage, tmp_path):
    """Without the lock two workers could both read that a trial is waiting, and both run it."""
    other = sqlite3.connect(tmp_path / "here.sqlite3", timeout=0)
    with storage.engine.begin(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.close()


@pytest.mark.multiprocess
def test_run_trials_killed_worker(tmp_path):
    check_killed_worker(f"sqlite:///{tmp_path}/here.sqlite3")


@pytest.mark.multiprocess
def test_run_trials_two_workers(tmp_path):
    url = f"sqlite:///{tmp_path}/here.sqlite3"
    workers = [start_worker(url, 0.3), start_worker(url, 0.3)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert Counter(started("".join(outputs))) == Counter(run_names(GHOSTS))
    assert [output.splitlines()[-1] for output in outputs] == [str(ROWS)] * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tuning.db", "storage='tuning.db'"),
        ("postgresql://nobody@127.0.0.1:1/nothing", "cannot be used: .*refused"),
        ("oracle://here/there", "storage='oracle://here/there'.*tune"),
        ("sqlite:////nowhere/at/all.sqlite3", "unable to open database file"),
    ],
)
def test_open_storage_errors(url, message):
    with pytest.raises(LandscapeError, match=message):
        open_storage(url)


@pytest.mark.parametrize("start", ["oracle://me:hidden@", "nonsense://me:hidden@", "postgresql://me:hid@den@"])
def test_open_storage_hides_passwords(start):
    with pytest.raises(LandscapeError) as caught:
        open_storage(f"{start}host/name")
    assert "hid" not in str(caught.value)
    assert "den@" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+pysqlite:///:memory:",
        "sqlite:///file::memory:?cache=shared&uri=true",
        "sqlite:///file:tuning?mode=memory&cache=shared&uri=true",
    ],
)
def test_open_storage_in_memory(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LandscapeError, match=r"storage=.sqlite.*in memory.*sqlite:///tuning.sqlite3"):
        open_storage(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tuning.sqlite3", "试验 memory.sqlite3"])
def test_open_storage_in_the_home_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage(f"sqlite:///~/{name}").engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_open_storage_hides_passwords_of_options():
    with pytest.raises(LandscapeError, match="cannot be used") as caught:
        open_storage("postgresql://127.0.0.1:1/nothing?user=me&password=hidden")
    assert "hidden" not in str(caught.value)


def test_open_storage_that_is_no_database(tmp_path):
    (tmp_path / "tuning.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(LandscapeError, match=r"storage='sqlite:.*tuning.sqlite3': cannot be used: .*PostgreSQL"):
        open_storage(f"sqlite:///{tmp_path}/tuning.sqlite3")
