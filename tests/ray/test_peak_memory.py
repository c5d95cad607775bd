import torch

from landscape.ray.peak_memory import PeakMemory


def test_the_peak_is_of_what_lives_at_one_time():
    kept = torch.ones(1000)  # was there before
    with PeakMemory() as meter:
        for _ in range(3):
            a = kept + 1
            b = a + 1
            del a, b
        a = kept.view(10, 100)[3:]
        a.mul_(2)
    assert meter.peak == 2 * 4000


def test_a_view_holds_what_it_looks_at():
    with PeakMemory() as meter:
        small = torch.ones(1000)[:1]
        more = torch.ones(500)
    assert meter.peak == 4000 + 2000
    del small, more


def test_memory_inside_vmap_is_seen():
    x = torch.ones(10, 100)
    with PeakMemory() as meter:
        torch.vmap(lambda row: (row * 2).square())(x)
    assert meter.peak == 2 * 4000
