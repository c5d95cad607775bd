import time
from contextlib import nullcontext

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


@pytest.mark.parametrize("first", [1.5, 10.0, 60.0])
def test_first_probe_is_spread_over_the_run(first):
    """Half of the budget pays for later probes from the beginning."""
    budget, probed = OverheadBudget(0.3), []
    for update in range(500):
        if budget.allows_probe():
            budget.add_probe(1.5 if probed else first)
            probed.append(update)
        budget.add_training(1.0)
    assert len([update for update in probed if update < 250]) >= 0.3 * 250 / 1.5 / 2 - max(2, first / 8)


def test_share_that_pays_for_enough_probes():
    budget = OverheadBudget(0.01)
    budget.add_probe(10.0)
    budget.add_training(400.0)
    assert not budget.allows_probe()
    budget.add_probe(1.5)
    assert budget.share_for(30) == pytest.approx((10.0 + 29 * 1.5) / 400.0)
    enough = OverheadBudget(budget.share_for(30))
    for _ in range(400):
        if enough.allows_probe():
            enough.add_probe(1.5 if enough.probes else 10.0)
        enough.add_training(1.0)
    assert 28 <= enough.probes <= 31


def test_budget_of_a_resumed_run():
    budget, resumed = OverheadBudget(0.1), OverheadBudget(0.1)
    for seconds in (10.0, 1.5, 1.4):
        budget.add_training(100.0)
        budget.add_probe(seconds)
    resumed.load_state_dict(budget.state_dict())
    assert vars(resumed) == vars(budget)
    resumed.load_state_dict({"training": 140.0, "probing": 12.9, "last": 1.4})  # of an earlier version
    assert not resumed.allows_probe()
    resumed.add_training(1000.0)
    assert resumed.allows_probe()


@pytest.mark.parametrize(("updates", "enough"), [(100, 30), (7, 7)])
def test_facts_of_too_few_probes(updates, enough):
    schedule = ProbeSchedule(1, 1e-9, CPU)
    for _ in range(updates):
        with schedule.probing() if schedule.due else nullcontext():
            time.sleep(0.001)
        schedule.advance(0.0)
    facts = schedule.facts()["budget"]
    assert (facts["probes"], facts["enough_probes"]) == (1, enough)
    assert facts["enough_share"] > facts["probing_seconds"] / facts["training_seconds"]
    assert round(facts["enough_share"] * 20, 6) % 1 == 0


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
