import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest
from recordings import rows

from landscape.errors import LandscapeError
from landscape.storage import lock as lock_module
from landscape.storage.filesystem import Folder, Memory
from landscape.storage.lock import LEASE_SECONDS, Lock, writer_of
from landscape.traces.reader import read_traces
from landscape.traces.writer import TraceWriter

HOLD = """
import sys, time
from landscape.traces.writer import TraceWriter
from recordings import rows
trace = TraceWriter(sys.argv[1], {"norm": "ghost"})
trace.append(rows()[0])
trace.flush()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_writer(tmp_path):
    """Another process that writes a trace in ``tmp_path / "run"``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_lock_refuses_second_writer(tmp_path, other_writer, options):
    expected = rf"run: is being written by process {other_writer.pid} on host {platform.node()}\. Stop it"
    with pytest.raises(LandscapeError, match=expected):
        TraceWriter(tmp_path / "run", **options)
    assert len(read_traces(tmp_path)) == 1


def test_lock_of_dead_process(tmp_path, other_writer):
    other_writer.kill()
    other_writer.wait()
    assert (tmp_path / "run" / ".owner.json").exists()
    with TraceWriter(tmp_path / "run", resume=True) as trace:
        trace.append(rows()[1])
    assert list(read_traces(tmp_path).step) == [0, 1]
    assert not (tmp_path / "run" / ".owner.json").exists()


def test_lock_refuses_second_writer_of_same_process(tmp_path):
    first = TraceWriter(tmp_path)
    with pytest.raises(LandscapeError, match=rf"process {os.getpid()} on host .*Close its writer"):
        TraceWriter(tmp_path, overwrite=True)
    first.close()
    TraceWriter(tmp_path, overwrite=True).close()


class Lockless(Memory):
    """A store without locks, like an object store."""

    def write_owner(self, **owner):
        self.write(".owner.json", json.dumps(owner).encode())


ELSEWHERE = {"host": "node17", "process": 4711, "token": "theirs"}


def test_lease_expires():
    store = Lockless()
    store.write_owner(**ELSEWHERE, time=time.time() - LEASE_SECONDS / 2)
    with pytest.raises(LandscapeError, match="process 4711 on host node17"):
        Lock(store)
    store.write_owner(**ELSEWHERE, time=time.time() - LEASE_SECONDS - 1)
    Lock(store).release()
    assert store.names() == []


def test_lease_of_dead_process():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    store = Lockless()
    store.write_owner(host=platform.node(), process=process.pid, token="theirs", time=time.time())
    assert writer_of(store) is None
    Lock(store).release()
    assert store.names() == []


def test_lease_of_this_process():
    store = Lockless()
    lock = Lock(store)
    assert writer_of(store) == f"process {os.getpid()} on host {platform.node()}"
    with pytest.raises(LandscapeError, match=rf"process {os.getpid()} on host .*Close its writer"):
        Lock(store)
    lock.refresh()
    lock.release()
    Lock(store).release()


def test_lease_of_earlier_process_with_the_same_id():
    """A restarted container has the host name and the process ids of its former life."""
    store = Lockless()
    store.write_owner(host=platform.node(), process=os.getpid(), token="former", time=time.time())
    assert writer_of(store) is None
    Lock(store).release()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        owner = {"host": platform.node(), "process": other.pid, "token": "former", "time": time.time()}
        store.write_owner(**owner)  # as written by earlier versions
        with pytest.raises(LandscapeError, match=f"process {other.pid} "):
            Lock(store)
        store.write_owner(**owner, began=lock_module._began(other.pid))
        with pytest.raises(LandscapeError, match=f"process {other.pid} "):
            Lock(store)
        store.write_owner(**owner, began="former-boot:4711")
        if lock_module._began(other.pid) is not None:
            assert writer_of(store) is None
            Lock(store).release()
        other.communicate(b"\n")


def test_lease_of_killed_process_says_when_it_ends():
    store = Lockless()
    store.write_owner(**ELSEWHERE, time=time.time() - LEASE_SECONDS + 100)
    with pytest.raises(LandscapeError, match=r"again in (9\d|100) s"):
        Lock(store)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP, errno.EINVAL, errno.ESTALE])
def test_file_system_without_locks(tmp_path, monkeypatch, code):
    """As NFS without its lock service, Lustre without -o flock, and FUSE file systems."""

    def flock(_file, _operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with TraceWriter(tmp_path / "run", flush_rows=1) as trace:
        trace.append(rows()[0])
        with pytest.raises(LandscapeError, match="Close its writer"):
            TraceWriter(tmp_path / "run", resume=True)
    with TraceWriter(tmp_path / "run", resume=True) as trace:
        trace.append(rows()[1])
    assert list(read_traces(tmp_path).step) == [0, 1]
    Folder(tmp_path / "run").write(".owner.json", json.dumps({**ELSEWHERE, "time": time.time()}).encode())
    with pytest.raises(LandscapeError, match="process 4711 on host node17"):
        TraceWriter(tmp_path / "run", resume=True)


def test_locks_that_are_lost(tmp_path, monkeypatch):
    """Closing does not fail if the file system cannot unlock."""
    trace = TraceWriter(tmp_path / "run")
    trace.append(rows()[0])

    def flock(_file, _operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        trace.close()
    assert len(read_traces(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"process": "x"}', b'{"time": "soon"}', b"[" * 100_000])
def test_lease_damaged_owner_file(content):
    store = Lockless()
    store.write(".owner.json", content)
    Lock(store).release()


def test_lease_taken_over():
    store = Lockless()
    lock = Lock(store)
    lock.refresh()
    store.write_owner(**ELSEWHERE, time=time.time())
    with pytest.raises(OSError, match="taken over by process 4711 on host node17"):
        lock.refresh()
    lock.release()
    assert store.names() == [".owner.json"]


def test_lock_of_recreated_folder(tmp_path, recwarn):
    first = TraceWriter(tmp_path / "run", {"norm": "first"}, flush_rows=1)
    shutil.rmtree(tmp_path / "run")
    second = TraceWriter(tmp_path / "run", {"norm": "second"}, flush_rows=1)
    for row in rows(steps=3):
        first.append(row)
    assert "taken over by process" in str(recwarn.pop().message)
    for row in rows(steps=2):
        second.append(row)
    second.close()
    assert list(read_traces(tmp_path).norm) == ["second", "second"]
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").mkdir()
    first.close()  # The new folder is not locked.
    assert list(read_traces(tmp_path / "run").norm) == ["first"] * 3


def test_lock_without_owner_file(tmp_path):
    lock = Lock(Folder(tmp_path))
    (tmp_path / ".owner.json").unlink()
    with pytest.raises(LandscapeError, match=r"being written by process \(unknown\)"):
        Lock(Folder(tmp_path))
    lock.release()
