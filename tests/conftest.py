import pytest
from nonsense import TRIED

from landscape.ray import ray
from landscape.ray.engines import products


def pytest_terminal_summary(terminalreporter):
    """Say how much nonsense was tried."""
    if TRIED:
        each = ", ".join(f"{count:,} {name}" for name, count in TRIED.items())
        terminalreporter.write_line(f"Cases of nonsense: {sum(TRIED.values()):,} ({each})")


@pytest.fixture(autouse=True)
def _share_whatever_can_be_shared(monkeypatch):
    """The models of the tests are so small that sharing would not pay; that it is right is to be seen all the same."""
    monkeypatch.setattr(products, "LONG_SUM", 1)
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(ray, "BLOCK", 100)
