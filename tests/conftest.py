import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker of pytest-xdist has a core of its own

from contextlib import suppress
from pathlib import Path

import desk
import pytest
from nonsense import TRIED

MARKED = {
    "slow": (
        "cli/test_tune.py",
        "device",
        "distributed",
        "fuzz",
        "integrations",
        "paper/test_figures4_5.py",
        "storage/test_object_store.py",
        "test_benchmarks.py",
        "training/test_checkpoint.py",
        "training/test_resume.py",
        "tuning/test_postgres.py",
        "tuning/test_trials.py",
        "tuning/test_tune.py",
    ),
    "gpu": ("probe/test_schedule.py::test_timer_gpu",),
    "multiprocess": ("distributed", "tuning/test_postgres.py"),
}
"""Folders, files and tests by the mark that they get here; other tests have their marks themselves."""

MARKED_FIXTURES = {"disk": "root", "mirror": "network", "other_writer": "multiprocess", "server": "network"}
"""Fixtures by name, with the mark of the tests that use them."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here)
        names = {f"{place}::{item.originalname}", str(place), *map(str, place.parents)}
        for mark, marked in MARKED.items():
            if not names.isdisjoint(marked):
                item.add_marker(mark)
        for fixture in MARKED_FIXTURES.keys() & item.fixturenames:
            item.add_marker(MARKED_FIXTURES[fixture])


def pytest_collection_finish(session):
    """Load the toy device before any test makes a backward pass."""
    if any(Path(__file__).parent / "device" in item.path.parents for item in session.items):
        with suppress(desk.MissingCompilerError):  # The tests that need it are skipped.
            desk.load()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    """Report how much nonsense was tried."""
    if TRIED:
        each = ", ".join(f"{count:,} {name}" for name, count in TRIED.items())
        terminalreporter.write_line(f"Cases of nonsense: {sum(TRIED.values()):,} ({each})")
