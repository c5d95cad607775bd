"""Real processes: their devices, and the trace when one of them is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import rank_deaths
import torch

from landscape import read_traces
from landscape.distributed.setup import local_device, world_size

SCRIPT = Path(rank_deaths.__file__)
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | {"OMP_NUM_THREADS": "1"}


def test_environment_of_torchrun(monkeypatch):
    assert world_size() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_size() == 4
    assert local_device("cpu") == torch.device("cpu")
    assert local_device("cuda") == torch.device("cuda", 1)


def torchrun(*arguments):
    """Run a command under torchrun, in a subprocess because torchrun replaces signal handlers."""
    code = f"""
import sys
from landscape.errors import LandscapeError
from landscape_cli.torchrun import torchrun
try:
    sys.exit(torchrun({arguments!r}, 2))
except LandscapeError as mistake:
    sys.exit(f"Error: {{mistake}}")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_command_prints_once():
    answer = torchrun("--version")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.count("landscape ") == 1


def test_command_prints_an_error_once():
    answer = torchrun("probe", "--recipe", "cats")
    assert answer.stderr.startswith("Error: Invalid value for '--recipe': 'cats' is not one of ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("victim", [2, 0])
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by its environment in /proc")
def test_killed_process_ends_command(tmp_path, victim):
    options = ["--norm", "ghost", "--groups", "4", "--ghost-by", "ranks", "--epochs", "10000"]
    options += ["--checkpoint-seconds", "0.1", "--out", tmp_path]
    command = [sys.executable, "-m", "landscape_cli", "probe", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ALONE, **pipes) as running:
        until(lambda: list(tmp_path.glob("*/checkpoint.pt")), running)
        processes = children(running.pid)
        os.kill(processes[victim], signal.SIGKILL)
        out, err = running.communicate(timeout=25)  # torchrun kills processes after 30 s
    assert (running.returncode, out) == (128 + signal.SIGKILL, "")
    assert re.fullmatch(f"Process {victim} was killed by SIGKILL.* others were stopped.*--resume.*{tmp_path}.*\n", err)
    assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
    with pytest.warns(UserWarning, match="killed") if victim == 0 else nullcontext():
        steps = list(read_traces(tmp_path).step)
    assert steps == list(range(len(steps)))
    (run,) = tmp_path.iterdir()
    kinds = {re.sub(r"\d+", "", path.name) for path in run.glob("[!.]*")}
    assert kinds - {"epochs-.parquet"} == {"updates-.parquet", "run.json", "checkpoint.pt"}


def until(condition, running):
    """Wait until a condition holds, while a process runs."""
    ended = time.monotonic() + 120
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < ended
        time.sleep(0.05)


def children(parent):
    """Return the processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"\nPPid:\t{parent}\n" in (folder / "status").read_text()
            variables = (folder / "environ").read_text().split("\0") if is_child else []
        except OSError:
            continue  # it has ended
        ranks = [int(variable.removeprefix("RANK=")) for variable in variables if variable.startswith("RANK=")]
        found |= dict.fromkeys(ranks, int(folder.name))
    return found


@pytest.mark.parametrize(
    ("kind", "moment", "victim"), [("copies", "probing", 2), ("sharded", "probing", 2), ("copies", "training", 0)]
)
def test_killed_process_keeps_trace(tmp_path, kind, moment, victim):
    """Without torchrun, which would end the other processes before they raise."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, SCRIPT, kind, moment, str(victim), tmp_path]
    ranks = [
        subprocess.Popen(command, env=ALONE | place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    words = [process.communicate(timeout=120)[1] for process in ranks]
    assert 0 not in [process.returncode for process in ranks]
    failed = "RankFailedError: A process that trains the model no longer responds"
    assert [failed in word for word in words] == [rank != victim and moment == "probing" for rank in range(3)]
    rows = rank_deaths.STEP if victim else rank_deaths.FLUSHED
    with pytest.warns(UserWarning, match="killed") if victim == 0 else nullcontext():
        assert list(read_traces(tmp_path).step) == list(range(rows))
    assert sorted(path.name for path in (tmp_path / "run").glob("[!.]*"))[0] == "run.json"


def test_killed_process_under_torchrun_keeps_trace(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", SCRIPT]
    answer = subprocess.run(
        [*command, "copies", "training", "2", tmp_path], env=ALONE, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 1
    with pytest.warns(UserWarning, match="killed"):
        steps = list(read_traces(tmp_path).step)
    assert steps == list(range(len(steps)))
    assert rank_deaths.FLUSHED <= len(steps) <= rank_deaths.STEP
