"""Tests that need a GPU: ``pytest tests/probe/test_cuda.py``."""

import pytest
import torch
from cases import CASES
from rays import ENGINES, STEP_SIZES, moved_losses
from torch import nn

from landscape import LandscapeProbe, make_norm, ray_losses
from landscape.training.models import SimpleNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_engines_against_moved_copies(name, engine):
    with torch.device("cuda"):
        case = CASES[name]()
        direction = case.direction()
        expected = moved_losses(case, direction, STEP_SIZES)
        torch.manual_seed(1)
        losses = ray_losses(case.model, case.closure, direction, STEP_SIZES, engine=engine)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("norm", ["none", "batch", "ghost"])
def test_steps_without_synchronization(norm, engine):
    model = SimpleNet(784, 10, make_norm(norm, **({"groups": 8} if norm == "ghost" else {}))).cuda()
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(512, 784, device="cuda"), torch.randint(0, 10, (512,), device="cuda")
    with LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES, engine=engine) as probe:
        for update in range(8):
            torch.cuda.set_sync_debug_mode("error" if update > 4 else "default")
            try:
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(probe.frame()) == 8
