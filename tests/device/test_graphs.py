"""Programs of replays on an accelerator: captured on a GPU, and run as they are on the toy device."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twin import check_rows, train

from landscape import make_norm
from landscape.ray.engines import graphs


def network(norm):
    torch.manual_seed(0)
    options = {"groups": 3} if norm == "ghost" else {}
    return nn.Sequential(nn.Linear(6, 8), make_norm(norm, **options)(8), nn.ReLU(), nn.Linear(8, 3)).double()


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def programs(device, monkeypatch):
    """List of the programs that are made."""
    made = []
    if device.type == "desk":
        monkeypatch.setattr(graphs, "DEVICES", {"desk"})
        monkeypatch.setattr(graphs, "capture_on_cuda", lambda run: run)
    init = graphs.Program.__init__
    monkeypatch.setattr(graphs.Program, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    return made


def batches(device, updates):
    generator = torch.Generator("cpu").manual_seed(1)
    numbers = torch.randn(updates, 12, 6, dtype=torch.float64, generator=generator, device="cpu").to(device)
    return [(x, torch.arange(12, device=device) % 3) for x in numbers]


@pytest.mark.parametrize("norm", ["none", "batch", "ghost"])
def test_rows_by_a_program_equal_moved_copies(norm, device, programs):
    model = network(norm).to(device)
    probe, expected = train(model, loss_of, batches(device, 6))
    check_rows(probe, expected)
    assert len(programs) == 1


@pytest.mark.parametrize("default", [False, True])
def test_programs_do_not_wait(default, device, programs, forbids_waiting):
    model, data = network("ghost").to(device), batches(device, 8)
    with device if default else nullcontext():
        probe, _ = train(model, loss_of, data, checks_from=4, forbidden=forbids_waiting)
    assert len(probe.frame()) == 8
    assert len(programs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_program_on_another_than_the_current_gpu():
    device = torch.device("cuda", 1)
    probe, expected = train(network("batch").to(device), loss_of, batches(device, 6))
    check_rows(probe, expected)
