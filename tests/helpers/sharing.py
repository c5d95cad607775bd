"""Worker processes that share trainings, and a test that kills one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import optuna

from landscape.training.presets import RECIPES
from landscape.tuning.database import open_storage
from landscape.tuning.trials import run_trials, study_name

DIGITS = replace(RECIPES["classify-digits"], norm="ghost")
GHOSTS = [replace(DIGITS, groups=groups, seed=seed) for groups in (2, 4, 8) for seed in (0, 1)]


def score(recipe):
    return 0.5 + 0.01 * recipe.groups + 0.001 * recipe.seed


ROWS = [[recipe.groups, recipe.seed, score(recipe)] for recipe in GHOSTS]


def run_names(recipes):
    return [recipe.run_name for recipe in recipes]


def trial_states(storage, recipe=GHOSTS[0]):
    trials = optuna.load_study(study_name=study_name(recipe), storage=storage).trials
    return [trial.state.name for trial in trials]


def run_worker(url, seconds):
    """Run a worker that prints each training that it starts, and all results at the end."""

    def train(recipe, report):
        print("start", recipe.run_name, flush=True)
        time.sleep(float(seconds))
        report(1, score(recipe))
        return {"score": score(recipe)}

    rows = run_trials(open_storage(url, heartbeat=1, grace=2), GHOSTS, train)
    print(json.dumps([[row["groups"], row["seed"], row["score"]] for row in rows]), flush=True)


def start_worker(url, seconds):
    command = [sys.executable, "-W", "error", __file__, url, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def started(output):
    return [line.removeprefix("start ") for line in output.splitlines() if line.startswith("start ")]


def check_killed_worker(url):
    """Check that all trainings complete if one of two workers is killed during its second training."""
    killed, other = start_worker(url, 0.6), start_worker(url, 0.6)
    started_by_killed = started(killed.stdout.readline() + killed.stdout.readline())
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    output, _ = other.communicate(timeout=60)
    assert output.splitlines()[-1] == str(ROWS)
    assert Counter(started_by_killed + started(output)) == Counter(run_names(GHOSTS) + started_by_killed[-1:])
    storage = open_storage(url)
    assert Counter(trial_states(storage)) - Counter("PRUNED" for _ in GHOSTS) == {"COMPLETE": 6, "FAIL": 1}
    storage.engine.dispose()


if __name__ == "__main__":
    run_worker(*sys.argv[1:])
