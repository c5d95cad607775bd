import time

import pytest
import torch
from torch import nn

from landscape import LandscapeError, LandscapeProbe
from landscape.probe.schedule import DeviceTimer, OverheadBudget, ProbeSchedule

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("first", [1.0, 10.0])
def test_budget_of_500_steps(share, first):
    """A probe takes 1.5 steps, and the first one longer because of its checks."""
    budget, probes = OverheadBudget(share), 0
    for _ in range(500):
        if budget.allows_probe():
            budget.add_probe(first if probes == 0 else 1.5)
            probes += 1
        budget.add_training(1.0)
    assert budget.training == 500
    assert 0.8 * min(share, 1.5 + (first - 1.5) / 500) <= budget.probing / budget.training <= share


def test_every():
    schedule, due = ProbeSchedule(3, None, CPU), []
    for _ in range(7):
        due.append(schedule.due)
        schedule.advance(0.0)
    assert due == [True, False, False, True, False, False, True]
    assert schedule.facts() == {}


def test_probing_is_not_training():
    schedule = ProbeSchedule(1, 0.5, CPU)
    with schedule.probing():
        time.sleep(0.05)
    schedule.advance(0.01)
    facts = schedule.facts()["budget"]
    assert facts["probing_seconds"] >= 0.06
    assert facts["training_seconds"] < facts["probing_seconds"]
    assert (facts["share"], facts["probes"], facts["updates"]) == (0.5, 1, 1)
    assert not schedule.due


def test_timer_after_error():
    timer = DeviceTimer(CPU)
    with pytest.raises(KeyError), timer.running():
        raise KeyError
    assert len(timer.pop()) == 1
    assert timer.pop() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_timer_gpu():
    timer = DeviceTimer(torch.device("cuda"))
    with timer.running():
        torch.cuda._sleep(100_000_000)
    assert timer.pending()
    torch.cuda.synchronize()
    assert timer.pop()[0] > 0.01


def test_probe_overhead():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.5, 1.0], overhead=1e-9) as probe:
        for _ in range(20):
            optimizer.zero_grad()
            criterion(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
            optimizer.step()
    assert list(probe.frame()["step"]) == [0]
    assert list(probe.frame()["overhead"]) == [1e-9]


@pytest.mark.parametrize("overhead", [0, -0.1, float("nan"), float("inf")])
def test_overhead_out_of_range(overhead):
    model = nn.Linear(1, 1)
    with pytest.raises(LandscapeError, match=r"overhead=.*share"):
        LandscapeProbe(model, torch.optim.SGD(model.parameters()), step_sizes=[1.0], overhead=overhead)
