"""Writes that fail on real file systems: full disk, deleted folder, withdrawn permission."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
from recordings import rows

from landscape.errors import LandscapeError
from landscape.storage import write_queue
from landscape.traces.reader import read_traces
from landscape.traces.writer import TraceWriter


@pytest.fixture
def disk(tmp_path):
    """Mount a small file system in memory; skip the test if that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted (root only): " + made.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Fill the file system to the last byte; return the file that does."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return folder / "filler"


def record(trace, steps):
    for step in steps:
        trace.append({**rows(steps=100)[step], "step": step})


def test_full_disk_is_retried(disk):
    trace = TraceWriter(disk / "run", flush_rows=5)
    record(trace, range(10))
    filler = fill(disk)
    with pytest.warns(UserWarning, match="cannot be written to: No space left on device.*Training continues") as caught:
        record(trace, range(10, 40))
    assert len(caught) == 1
    assert not trace.flush()
    assert list(read_traces(disk).step) == list(range(10))
    assert not [name for name in os.listdir(disk / "run") if name.endswith(".tmp")]
    assert list(trace.frame().step) == list(range(40))
    filler.unlink()
    assert trace.flush()
    record(trace, range(40, 50))
    trace.close()
    assert list(read_traces(disk).step) == list(range(50))


def test_full_disk_at_end(disk):
    trace = TraceWriter(disk / "run", flush_rows=5)
    record(trace, range(10))
    filler = fill(disk)
    with pytest.warns(UserWarning, match="No space left"):
        record(trace, range(10, 23))
    message = "run: .* 13 rows of updates could not be written .No space left on device"
    with pytest.raises(LandscapeError, match=message):
        trace.close()
    assert list(read_traces(disk).step) == list(range(10))
    filler.unlink()
    trace.close()
    assert list(read_traces(disk).step) == list(range(23))
    TraceWriter(disk / "run", resume=True).close()  # The lock was released.


def test_full_disk_keeps_error_of_training(disk):
    def train():
        with TraceWriter(disk / "run") as trace:
            record(trace, range(3))
            fill(disk)
            raise ZeroDivisionError("the training's own")

    with (
        pytest.warns(UserWarning, match="No space left.*Training continues"),
        pytest.warns(UserWarning, match="3 rows of updates could not be written"),
        pytest.raises(ZeroDivisionError),
    ):
        train()


def test_read_only_disk(disk):
    trace = TraceWriter(disk / "run", flush_rows=5)
    record(trace, range(5))
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
    with pytest.warns(UserWarning, match="Read-only file system"):
        record(trace, range(5, 12))
    subprocess.run(["umount", "-l", disk], check=True)
    trace.close()
    assert list(read_traces(disk).step) == list(range(12))


def test_unmounted_disk(disk, tmp_path):
    """Nothing is written to the mount point while the file system is not mounted."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trace = TraceWriter(disk / "run", flush_rows=5)
    record(trace, range(5))
    subprocess.run(["mount", "--bind", disk, elsewhere], check=True)
    subprocess.run(["umount", "-l", disk], check=True)
    with pytest.warns(UserWarning, match="No such file or directory"):
        record(trace, range(5, 12))
    assert os.listdir(disk) == []
    subprocess.run(["mount", "--bind", elsewhere, disk], check=True)
    trace.close()
    assert list(read_traces(disk).step) == list(range(12))
    subprocess.run(["umount", "-l", elsewhere], check=True)


def test_deleted_folder(tmp_path):
    trace = TraceWriter(tmp_path / "run", flush_rows=5)
    record(trace, range(10))
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UserWarning, match="No such file or directory"):
        record(trace, range(10, 17))
    assert not (tmp_path / "run").exists()
    with pytest.raises(LandscapeError, match=r"10 rows of updates were written and have vanished\.$"):
        trace.close()
    with pytest.warns(UserWarning, match="lacks the updates in rows 0 to 9"):
        assert list(read_traces(tmp_path).step) == list(range(10, 17))


WITHDRAWN = """
import sys
from pathlib import Path
from landscape.traces.writer import TraceWriter
from recordings import rows
folder = Path(sys.argv[1])
trace = TraceWriter(folder / "run", flush_rows=5)
for step, row in enumerate(rows(steps=20)):
    if step == 7:
        (folder / "run").chmod(0o500)
    trace.append(row)
(folder / "run").chmod(0o700)
trace.close()
"""


def test_withdrawn_permission(tmp_path):
    command = [sys.executable, "-c", WITHDRAWN, str(tmp_path)]
    if os.geteuid() == 0:  # Root may write anywhere, unless it drops that capability.
        if shutil.which("setpriv") is None:
            pytest.skip("root cannot drop its capabilities (needs setpriv)")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("cannot be written to: Permission denied") == 1
    assert list(read_traces(tmp_path).step) == list(range(20))


def test_queue_memory_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(write_queue, "WAITING_BYTES", 30_000)
    monkeypatch.setattr(write_queue, "BACK_OFF", 0)
    trace = TraceWriter(tmp_path / "run", flush_rows=5)
    record(trace, range(5))
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.warns(UserWarning, match="No such file or directory"):
        record(trace, range(5, 60))
    (tmp_path / "away").rename(tmp_path / "run")
    record(trace, range(60, 65))
    with pytest.raises(LandscapeError, match="rows of updates exceeded the memory limit"):
        trace.close()
    with pytest.warns(UserWarning, match="lacks the updates in rows"):
        steps = list(read_traces(tmp_path).step)
    assert 10 < len(steps) < 55
    assert steps[: len(steps) - 5] == list(range(len(steps) - 5))  # The beginning is complete.
    assert steps[-5:] == list(range(60, 65))


def test_queued_metadata(tmp_path):
    trace = TraceWriter(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.warns(UserWarning, match="No such file"):
        trace.update_metadata(engine="affine")
    (tmp_path / "away").rename(tmp_path / "run")
    record(trace, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.close()
    assert set(read_traces(tmp_path).engine) == {"affine"}


def test_back_off(tmp_path, monkeypatch):
    monkeypatch.setattr(write_queue, "BACK_OFF", 1e9)
    trace = TraceWriter(tmp_path / "run", flush_rows=5)
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.warns(UserWarning, match="No such file or directory"):
        record(trace, range(7))
    (tmp_path / "away").rename(tmp_path / "run")
    record(trace, range(7, 12))
    assert not list((tmp_path / "run").glob("updates-*"))
    assert trace.flush()  # An explicit flush retries at once.
    trace.close()
    assert list(read_traces(tmp_path).step) == list(range(12))
