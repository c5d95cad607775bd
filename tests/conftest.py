import pytest

from landscape import products


@pytest.fixture(autouse=True)
def _share_whatever_can_be_shared(monkeypatch):
    """The models of the tests are so small that sharing would not pay; that it is right is to be seen all the same."""
    monkeypatch.setattr(products, "LONG_SUM", 1)
