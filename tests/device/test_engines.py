"""Rays of models of many kinds on an accelerator, by each engine, beside copies that are moved point by point."""

import pytest
import torch
from cases import CASES
from rays import ENGINES, STEP_SIZES, moved_losses
from torch import nn

from landscape import LandscapeError, ray_losses

MISSING = {"recurrent"}
"""Cases of kernels that the toy device lacks."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_engines_against_moved_copies(name, engine, device):
    if device.type == "desk" and name in MISSING:
        pytest.skip("the toy device lacks this layer")
    with device:
        case = CASES[name]()
        direction = case.direction()
        expected = moved_losses(case, direction, STEP_SIZES)
        torch.manual_seed(1)
        losses = ray_losses(case.model, case.closure, direction, STEP_SIZES, engine=engine)
    assert losses.device == device
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


def test_ray_losses_do_not_wait(device, forbids_waiting):
    with device:
        case = CASES["batch norm"]()
        direction = case.direction()
        for engine in ENGINES:
            with forbids_waiting():
                ray_losses(case.model, case.closure, direction, STEP_SIZES, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_of_other_parameters_is_refused(engine, device):
    model, other = (nn.Linear(3, 1).to(device) for _ in range(2))
    x = torch.ones(2, 3, device=device)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(LandscapeError, match="weight"):
        ray_losses(model, lambda model: other(x).square().sum(), direction, [0.1, 0.2], engine=engine)
