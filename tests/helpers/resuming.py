"""Trainings in processes that are killed, and comparisons of their traces."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
from processes import PATIENCE, landscape

from landscape import read_traces, train
from landscape.traces.schema import TABLES

VARYING = {"seconds", "id", "started", "ended", "resumed", "environment"}
"""Columns and metadata that differ between processes."""


def resume_training(recipe, out):
    """Train or resume, with as many checkpoints as their cost allows."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "No state was loaded")  # killed before its first checkpoint
    train(recipe, out, device="cpu", resume=True, checkpoint_seconds=0)


def process(recipe, out):
    """Start a process that trains, forked from one that has imported torch, which saves time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["landscape.training.train", "landscape.training.models", "landscape.norms.registry"]
    )
    started = context.Process(target=resume_training, args=(recipe, out))
    started.start()
    return started


def train_with_kills(recipe, out, reference, longest, kills, chance):
    """Train to the end in processes that are killed at random times; return the number of kills, at most ``kills``."""
    run, killed = out / recipe.run_name, 0
    started = process(recipe, out)
    while killed < kills:
        started.join(chance.uniform(0, longest))
        if not started.is_alive():
            break
        started.kill()
        started.join()
        killed += 1
        check_beginning(run, reference / recipe.run_name)
        started = process(recipe, out)
    started.join()
    assert started.exitcode == 0
    check_same(run, reference / recipe.run_name)
    return killed


def check_same(folder, reference):
    """Assert that two runs have the same rows and metadata, bit for bit, and that the folder holds nothing else."""
    for table in (table for table in TABLES if any(reference.glob(f"{table}-*.parquet"))):
        found, expected = (
            frame.drop(columns=[*VARYING.intersection(frame)])
            for frame in (read_traces(place, table=table) for place in (folder, reference))
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    found, expected = (json.loads((place / "run.json").read_text()) for place in (folder, reference))
    differing = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)} - VARYING
    assert not differing, {name: (found.get(name), expected.get(name)) for name in differing}
    assert {path.name for path in folder.iterdir() if path.suffix != ".parquet"} == {".lock", "run.json"}


def check_beginning(folder, reference):
    """Assert that the rows of a killed run are the first rows of the reference."""
    for table, columns in TABLES.items():
        if any(folder.glob(f"{table}-*.parquet")):
            names = [column.name for column in columns if column.name not in VARYING]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was killed", UserWarning)
                found = read_traces(folder, table=table)[names]
            expected = read_traces(reference, table=table)[names]
            pd.testing.assert_frame_equal(found, expected[: len(found)], check_exact=True)


def start_probe(*options, out):
    """Start ``landscape probe``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return landscape("probe", "--out", str(out), *options, env=environment, start_new_session=True)


def finish(started):
    """Return exit code, output and errors of a process."""
    try:
        output, errors = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill_tree(started.pid)
        raise
    return started.returncode, output, errors


def wait_for_checkpoint(run, started):
    """Block until the process has written a checkpoint."""
    path, deadline = run / "checkpoint.pt", time.monotonic() + PATIENCE
    before = path.stat().st_mtime_ns if path.exists() else None
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_tree(root):
    """Kill a process and its descendants."""
    parents = {int(stat.parent.name): parent_of(stat) for stat in Path("/proc").glob("[0-9]*/stat")}
    doomed = {root}
    while more := {child for child, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for number in doomed:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def parent_of(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
