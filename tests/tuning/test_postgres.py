"""Workers that share trainings through a real PostgreSQL server."""

import os
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sharing import GHOSTS, ROWS, begun, check_that_one_of_two_may_be_killed, runs, start

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))


@pytest.fixture(scope="module")
def server():
    """A server on a free port of this machine; makes a database of a name, and gives its address."""
    if not BINARIES:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: install the package postgresql")
    # The server does not run as root, and other users do not get into pytest's folders.
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


def test_of_two_workers_one_is_killed_and_the_other_finishes(server):
    check_that_one_of_two_may_be_killed(server("killed"))


def test_three_workers_share_the_trainings(server):
    url = server("shared")
    workers = [start(url, 0.2) for _ in range(3)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert Counter(begun("".join(outputs))) == Counter(runs(GHOSTS))
    assert [output.splitlines()[-1] for output in outputs] == [str(ROWS)] * 3
