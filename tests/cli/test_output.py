"""Lines that cannot be written, and how many lines there are."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from landscape_cli.main import main
from processes import PATIENCE, landscape
from recordings import rows

from landscape import read_traces
from landscape.traces.writer import TraceWriter

TWO_RUNS = ["probe", "--norm", "none", "--norm", "batch", "--epochs", "1", "--device", "cpu"]


def record(folder):
    with TraceWriter(folder, {"norm": "batch"}) as trace:
        for row in rows(steps=3):
            trace.append(row)


def test_closed_pipe_loses_no_training(tmp_path):
    """As in ``landscape probe | head -1``."""
    with landscape(*TWO_RUNS, cwd=tmp_path) as process:
        first = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "digits-none-seed0" in first
    assert not errors
    assert set(read_traces(tmp_path / "traces")["norm"]) == {"none", "batch"}


@pytest.mark.parametrize("arguments", [["list", "run"], ["plot", "run"], ["list", "missing"], ["--help"]])
def test_closed_pipe_is_silent(tmp_path, arguments):
    record(tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)
    process = landscape_into(writing, *arguments, cwd=tmp_path)
    _, errors = process.communicate(timeout=PATIENCE)
    os.close(writing)
    assert [line.split()[0] for line in errors.splitlines()] == (["Error:"] if "missing" in arguments else [])
    assert (tmp_path / "landscape.png").exists() == (arguments[0] == "plot")


def landscape_into(descriptor, *arguments, cwd):
    words = [sys.executable, "-m", "landscape_cli", *arguments]
    return subprocess.Popen(words, stdout=descriptor, stderr=subprocess.PIPE, text=True, cwd=cwd)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [TWO_RUNS, ["list", "run"]])
def test_full_disk_loses_no_training(tmp_path, arguments):
    record(tmp_path / "run")
    with open("/dev/full", "w") as full:
        process = landscape_into(full, *arguments, cwd=tmp_path)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert errors.startswith("Error: ")
    assert len(errors.splitlines()) == 1
    if arguments is TWO_RUNS:
        assert set(read_traces(tmp_path / "traces")["norm"]) == {"none", "batch"}


def test_quiet_and_verbose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "run")
    training = ["probe", "--norm", "batch", "--epochs", "2", "--device", "cpu", "--overwrite"]
    usual, quiet, verbose = (CliRunner().invoke(main, [*training, *more]) for more in ([], ["-q"], ["-v"]))
    assert (usual.exit_code, quiet.exit_code, verbose.exit_code) == (0, 0, 0)
    assert quiet.output == ""
    assert verbose.stdout == usual.stdout
    assert usual.stderr == ""
    assert [line.split(":")[0] for line in verbose.stderr.splitlines()] == ["digits-batch-seed0"] * 2
    table = CliRunner().invoke(main, ["plot", "run", "--quiet"])
    assert "mean_range" in table.output
    assert "landscape.png" not in table.output
    wrong = CliRunner().invoke(main, ["plot", "missing", "--quiet"])
    assert wrong.stderr.startswith("Error: missing")
