import copy

import pandas as pd
import pytest
import torch
from cases import CASES
from torch import nn

from landscape import LandscapeProbe
from landscape.analysis.measures import measured
from landscape.ray.gradients import gradients_along
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray

STEP_SIZES = [0.0, 0.7, -0.2, 3.0]
CURVATURE = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


class Quadratic(nn.Module):
    """0.5 (theta - target)' H (theta - target), whose loss and gradient along a ray are known."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))

    def forward(self, target):
        return 0.5 * (self.theta - target) @ CURVATURE @ (self.theta - target)


def ray_of(model, closure, direction, step_sizes):
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Ray(Objective.of(model, closure), origin, direction, step_sizes)


def test_quadratic_exact():
    model, target = Quadratic(), torch.tensor([1.0, 1.0], dtype=torch.float64)
    direction = torch.tensor([0.3, -0.4], dtype=torch.float64)
    there = gradients_along(ray_of(model, lambda model: model(target), {"theta": direction}, STEP_SIZES))
    start = model.theta.detach() - target
    for eta, loss, distance in zip(STEP_SIZES, there.losses, there.distances, strict=True):
        point = start - eta * direction
        torch.testing.assert_close(loss, 0.5 * point @ CURVATURE @ point, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(distance, abs(eta) * (CURVATURE @ direction).norm(), rtol=1e-10, atol=1e-10)
        here, now = CURVATURE @ start, CURVATURE @ point
    cosine = here @ now / (here.norm() * now.norm())
    torch.testing.assert_close(there.cosines[-1], cosine, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there.slope, CURVATURE @ start @ direction, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("direction", ["gradient", "update"])
def test_measures_of_a_quadratic(direction, clip):
    """Beta and curvature are those of the matrix, in any direction."""
    model, criterion = Quadratic(), nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"step_sizes": [0.1, 0.5], "direction": direction, "gradients": True}
    with LandscapeProbe(model, optimizer, **options) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            target = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            probe.observe(lambda model, target: criterion(model(target)), target).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    frame = probe.frame()
    curvatures = measured(frame, "curvature")
    beta = measured(frame, "beta")["beta"]
    largest = torch.linalg.eigvalsh(CURVATURE)[-1].item()
    assert (beta <= largest * (1 + 1e-10)).all()
    assert curvatures["curvature_min"].to_numpy() == pytest.approx(curvatures["curvature_max"].to_numpy(), rel=1e-10)
    assert (beta >= curvatures["curvature_max"] * (1 - 1e-10)).all()  # |Hd| / |d| is at least d'Hd / |d|^2
    slope = (frame["loss"] - frame.losses.map(lambda losses: losses[0])) / 0.1
    gap = 0.5 * curvatures["curvature_min"] * 0.1 * frame["direction_norm"] ** 2
    assert (slope + gap).to_numpy() == pytest.approx(frame["slope"].to_numpy(), rel=1e-8)


@pytest.mark.parametrize("name", ["batch norm", "dropout", "transformer", "ResNet-20 batch", "branching", "frozen"])
def test_gradients_match_moved_copies(name):
    case = CASES[name]()
    direction = case.direction()

    def at(eta):
        torch.manual_seed(1)
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter -= eta * direction.get(key, torch.zeros_like(parameter))
        loss = case.closure(model)
        gradient = torch.autograd.grad(loss, [dict(model.named_parameters())[key] for key in direction])
        return loss.detach(), torch.cat([part.flatten() for part in gradient])

    losses, gradients = zip(*map(at, STEP_SIZES), strict=True)
    before = copy.deepcopy(case.model.state_dict())
    torch.manual_seed(1)
    there = gradients_along(ray_of(case.model, case.closure, direction, STEP_SIZES))
    torch.testing.assert_close(there.losses, torch.stack(losses), rtol=1e-12, atol=1e-12)
    expected = torch.stack([(gradient - gradients[0]).norm() for gradient in gradients])
    torch.testing.assert_close(there.distances, expected, rtol=1e-9, atol=1e-12)
    expected = gradients[0] @ torch.cat([direction[key].flatten() for key in direction])
    torch.testing.assert_close(there.slope, expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())


def test_accumulation_equals_one_batch():
    def rows(parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
        inputs, targets = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
        with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.5, 1.0], gradients=True) as probe:
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (criterion(model(x), y) / parts).backward()
            optimizer.step()
        return probe.frame().iloc[0]

    whole, accumulated = rows(1), rows(3)
    for name in ("losses", "gradient_distances", "slope", "direction_norm", "loss"):
        assert accumulated[name] == pytest.approx(whole[name], rel=1e-10), name


def test_no_distances_without_gradients():
    model = nn.Linear(4, 3)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.5]) as probe:
        criterion(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
        optimizer.step()
    row = probe.frame().iloc[0]
    assert pd.isna(row["gradient_distances"])
    assert row["slope"] == pytest.approx(row["grad_norm"] ** 2)
    assert row["direction_norm"] == row["grad_norm"] > 0
