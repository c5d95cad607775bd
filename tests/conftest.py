import pytest

from landscape import products, walk


@pytest.fixture(autouse=True)
def _share_whatever_can_be_shared(monkeypatch):
    """The models of the tests are so small that sharing would not pay; that it is right is to be seen all the same."""
    monkeypatch.setattr(products, "LONG_SUM", 1)
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(walk, "BLOCK", 100)
