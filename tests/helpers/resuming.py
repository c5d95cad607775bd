"""Processes that train and are killed, and what must be true of what they leave behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch

from landscape import read_traces, train
from landscape.traces.schema import TABLES

VARYING = {"seconds", "id", "started", "ended", "resumed", "engine_seconds", "environment"}
"""Columns and facts that differ from one process to the next."""


def trained(recipe, out):
    """What a process does: train, or go on, with as many checkpoints as their cost allows."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    train(recipe, out, device="cpu", resume=True, checkpoint_seconds=0)


def process(recipe, out):
    """A fresh process that trains; it stems from one that has imported torch already, so that lives are cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["landscape.training.train", "landscape.training.models", "landscape.norms.registry"]
    )
    started = context.Process(target=trained, args=(recipe, out))
    started.start()
    return started


def survived(recipe, out, reference, longest, kills, chance):
    """Train to the end in processes that are killed at random moments, at most ``kills``; how many were."""
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
    """The same rows and facts, bit for bit; and nothing in the folder but a run."""
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
    """What is there after a kill are the first rows, without a gap and without a wrong number."""
    for table, columns in TABLES.items():
        if any(folder.glob(f"{table}-*.parquet")):
            names = [column.name for column in columns if column.name not in VARYING]
            found, expected = read_traces(folder, table=table)[names], read_traces(reference, table=table)[names]
            pd.testing.assert_frame_equal(found, expected[: len(found)], check_exact=True)


def command(*options, out):
    """``landscape probe`` in a process of its own."""
    words = [sys.executable, "-W", "error::UserWarning", "-m", "landscape_cli", "probe", "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, **pipes, text=True, env=environment, start_new_session=True)


def ended(started):
    """Exit code, output and errors of a command, which has to end by itself."""
    try:
        output, errors = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        kill_tree(started.pid)
        raise
    return started.returncode, output, errors


def wait_for_checkpoint(run, started):
    """Until the process has written a checkpoint of its own."""
    path, patience = run / "checkpoint.pt", time.monotonic() + 60
    before = path.stat().st_mtime_ns if path.exists() else None
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < patience
        time.sleep(0.02)


def kill_tree(root):
    """Kill a process and all that it has started, at once."""
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
