"""Trainers of other libraries with two processes."""

import pytest
from rank_worker import launch

for name in ("accelerate", "lightning", "transformers"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("trainers", 2, tmp_path_factory.mktemp("trainers"))


@pytest.mark.parametrize("host", ["accelerate", "transformers", "lightning"])
def test_rows_are_means_over_the_processes(ranks, host):
    for rank in ranks:
        rows, expected = rank[f"{host}_rows"]
        assert len(rows) == len(expected) >= 4
        for one, other in zip(rows, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
