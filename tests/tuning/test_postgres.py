"""Workers that share trainings through a PostgreSQL server."""

import os
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sharing import GHOSTS, ROWS, check_killed_worker, run_names, start_worker, started

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))


@pytest.fixture(scope="module")
def server():
    """Start a server on a free port; yield a function that creates a database and returns its URL."""
    if not BINARIES:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: install the package postgresql")
    # The server refuses to run as root, and other users cannot read the folders of pytest.
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    unprivileged = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        subprocess.run([*unprivileged, BINARIES[-1] / program, *arguments], check=True, cwd="/", capture_output=True)

    if unprivileged:
        subprocess.run(["chown", "postgres", folder], check=True)
    call("initdb", "-D", folder / "data", "-U", "tester", "--auth=trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    call("pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start")

    def database(name):
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "tester", name)
        return f"postgresql://tester@127.0.0.1:{port}/{name}"

    try:
        yield database
    finally:
        call("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
        subprocess.run(["rm", "-r", folder], check=True)


def test_run_trials_killed_worker(server):
    check_killed_worker(server("killed"))


def test_run_trials_three_workers(server):
    url = server("shared")
    workers = [start_worker(url, 0.2) for _ in range(3)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert Counter(started("".join(outputs))) == Counter(run_names(GHOSTS))
    assert [output.splitlines()[-1] for output in outputs] == [str(ROWS)] * 3
