import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker of pytest-xdist has a core of its own

import pytest
from nonsense import TRIED

from landscape.ray import ray
from landscape.ray.engines import products


def pytest_terminal_summary(terminalreporter):
    """Report how much nonsense was tried, where it ran in this process."""
    if TRIED:
        each = ", ".join(f"{count:,} {name}" for name, count in TRIED.items())
        terminalreporter.write_line(f"Cases of nonsense: {sum(TRIED.values()):,} ({each})")


@pytest.fixture(autouse=True)
def _share_small_layers(monkeypatch):
    """Evaluate small layers by the fast paths, which only large ones take outside of tests."""
    monkeypatch.setattr(products, "LONG_SUM", 1)
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(ray, "BLOCK", 100)
