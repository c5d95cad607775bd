import torch

from landscape.ray.peak_memory import PeakMemory


def test_peak_counts_live_tensors():
    kept = torch.ones(1000)  # made before, so not counted
    with PeakMemory() as memory:
        for _ in range(3):
            a = kept + 1
            b = a + 1
            del a, b
        a = kept.view(10, 100)[3:]
        a.mul_(2)
    assert memory.peak == 2 * 4000


def test_view_holds_its_base():
    with PeakMemory() as memory:
        small = torch.ones(1000)[:1]
        more = torch.ones(500)
    assert memory.peak == 4000 + 2000
    del small, more


def test_memory_within_vmap():
    x = torch.ones(10, 100)
    with PeakMemory() as memory:
        torch.vmap(lambda row: (row * 2).square())(x)
    assert memory.peak == 2 * 4000
