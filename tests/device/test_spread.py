"""Sums, rows and clocks of more than one device."""

import math

import pytest
import torch
from torch import nn

from landscape.distributed.devices import common_device, stacked
from landscape.distributed.group import RankGroup
from landscape.distributed.parameter_space import ShardedParameters, WholeParameters
from landscape.probe.rows import to_host
from landscape.probe.schedule import DeviceTimer
from landscape.ray.objective import Objective


@pytest.fixture
def spread(desks):
    """Tensors of three devices and two types."""
    torch.manual_seed(0)
    numbers = torch.randn(5, 4, dtype=torch.float64)
    places = [torch.device("cpu"), *desks, desks[0], desks[1]]
    return {str(at): row.to(place) for at, (row, place) in enumerate(zip(numbers, places, strict=True))}, numbers


def test_common_device_is_an_accelerator(desks):
    host, first, second = (torch.ones((), device=place) for place in ("cpu", *desks))
    assert common_device([host, second, first]) == desks[1]
    assert common_device([host]) == torch.device("cpu")
    torch.desk.set_sync_debug_mode("error")
    found = stacked([host, second, first])
    torch.desk.set_sync_debug_mode("default")
    assert (found.device, found.tolist()) == (desks[1], [1, 1, 1])


class Shards(ShardedParameters):
    """Shards of which each process of a group of one holds all."""

    def __init__(self, names):
        self._names, self._ranks = names, RankGroup()

    def parameters(self):
        return {name: nn.Parameter(torch.ones(1)) for name in self._names}


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_norm_and_inner_product(kind, spread):
    """As of parameters that FSDP has offloaded to the host in a part of the model."""
    tensors, numbers = spread
    space = WholeParameters(nn.Linear(1, 1)) if kind == "whole" else Shards(tensors)
    torch.desk.set_sync_debug_mode("error")
    norm, inner = space.norm(tensors), space.inner(tensors, tensors)
    torch.desk.set_sync_debug_mode("default")
    assert {norm.device.type, inner.device.type} == {"desk"}
    assert norm.item() == pytest.approx(numbers.norm().item(), rel=1e-12)
    assert inner.item() == pytest.approx(numbers.square().sum().item(), rel=1e-12)


def test_rows_are_read_once_from_each_device(spread, desks):
    tensors, numbers = spread
    row = {**tensors, "single": tensors["1"][0].float(), "flag": torch.tensor(True, device=desks[0]), "plain": 3}
    before = torch.desk.syncs()
    first, second = to_host([row, {"scalar": tensors["2"][1]}])
    assert torch.desk.syncs() - before == 2
    assert [first[str(at)] for at in range(5)] == numbers.tolist()
    assert (first["plain"], first["flag"], second) == (3, 1.0, {"scalar": numbers[2, 1].item()})


def test_means_over_ranks_are_on_the_device_of_each(spread):
    tensors, _ = spread

    class Pair(RankGroup):
        """A group of two, of which the other one has the same numbers."""

        def __init__(self):
            super().__init__()
            self.size, self._group = 2, "a group"

        def run_on_all(self, compute, must_match=lambda result: None):
            return compute()

        def all_reduce_mean_(self, tensor):
            return tensor.mul_(2).div_(2)

    found = Pair().all_mean(lambda: tensors)
    assert {name: one.device for name, one in found.items()} == {name: one.device for name, one in tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_terms_of_two_devices(desks):
    layers = [nn.Linear(3, 1).to(device) for device in desks]
    objectives = [Objective.of(layer, lambda model: sum(p.sum() for p in model.parameters())) for layer in layers]
    losses = [objective(dict(layer.named_parameters())) for objective, layer in zip(objectives, layers, strict=True)]
    terms = [term for objective in objectives for term in objective.terms]
    assert math.isclose(Objective(terms).weighted_sum(losses).item(), sum(loss.item() for loss in losses), rel_tol=1e-6)


@pytest.mark.parametrize("at", [0, 1])
def test_timer_of_another_than_the_current_device(at, desks):
    timer = DeviceTimer(desks[at])
    with timer.running():
        torch.desk.set_device(desks[1 - at])
    assert {event.device for event in timer._running[0]} == {desks[at]}
    assert timer.pop()[0] >= 0
    assert not timer.pending()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_timer_of_the_second_gpu():
    timer = DeviceTimer(torch.device("cuda", 1))
    with timer.running(), torch.cuda.device(1):
        torch.cuda._sleep(100_000_000)
    torch.cuda.synchronize(1)
    assert timer.pop()[0] > 0.01
