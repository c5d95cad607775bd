import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import CASES, DIVERGING
from rays import ENGINES, STEP_SIZES, moved_losses
from torch import nn

from landscape import LandscapeError, ray_losses


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_engines_match_moved_copies(name, engine):
    case = CASES[name]()
    direction = case.direction()
    expected = moved_losses(case, direction, STEP_SIZES)
    torch.manual_seed(1)
    losses = ray_losses(case.model, case.closure, direction, STEP_SIZES, engine=engine)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_tape_calls_the_closure_once(name):
    case, calls = CASES[name](), []

    def closure(model):
        calls.append(model)
        return case.closure(model)

    diverges = name in DIVERGING
    with pytest.warns(UserWarning, match="loop.*tape") if diverges else nullcontext():
        ray_losses(case.model, closure, case.direction(), STEP_SIZES, engine="tape")
    assert len(calls) == 1 + diverges * len(STEP_SIZES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_state_is_unchanged(name, engine):
    case = CASES[name]()
    case.model[0].eval() if isinstance(case.model, nn.Sequential) else None
    before, modes = copy.deepcopy(case.model.state_dict()), [module.training for module in case.model.modules()]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ray_losses(case.model, case.closure, case.direction(), STEP_SIZES, engine=engine)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in case.model.modules()]
    for key, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_reused_memory_is_not_the_same_input():
    """The allocator puts a new tensor where the last one was, with other values."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).double()
    inputs = torch.randn(64, 64, dtype=torch.float64)
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    model.register_parameter("scale", scale)
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    closure = lambda model: model(inputs * model.scale).mean()  # noqa: E731
    losses = [ray_losses(model, closure, direction, STEP_SIZES, engine=engine) for engine in ENGINES]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_quadratic_exact():
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64)))
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    gradient = {"theta": curvature * model.theta.detach()}
    losses = ray_losses(model, lambda model: 0.5 * (curvature * model.theta**2).sum(), gradient, [0.0, 0.1, 0.5, 2.0])
    expected = [0.5 * sum(c * (t * (1 - eta * c)) ** 2 for c, t in ((1, 3), (4, -2))) for eta in (0.0, 0.1, 0.5, 2.0)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_loss_can_be_a_parameter():
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(torch.tensor([1.0])))
    for engine in ENGINES:
        losses = ray_losses(model, lambda model: model.theta, {"theta": torch.ones(1)}, [1.0, 2.0, 3.0], engine=engine)
        assert losses.tolist() == [0, -1, -2]


def test_autocast_gives_loop_losses():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1)), torch.randn(16, 32)
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            ray_losses(model, lambda m: m(inputs).float().mean(), direction, STEP_SIZES, engine=e) for e in ENGINES
        ]
    assert torch.equal(losses[0], losses[1])


def test_infinite_loss_is_kept():
    case = CASES["mlp"]()
    direction = {name: tensor * 1e200 for name, tensor in case.direction().items()}
    losses = ray_losses(case.model, case.closure, direction, [1.0, 1e200, 2.0])
    assert not math.isfinite(losses[1])


def test_far_first_point_does_not_cancel():
    case = CASES["mlp"]()
    model, direction = case.model.float(), {name: tensor.float() for name, tensor in case.direction().items()}
    inputs = torch.randn(12, 6)
    losses = [ray_losses(model, lambda m: m(inputs).sum(), direction, [1e8, 0.1, 0.2, 0.3], engine=e) for e in ENGINES]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_step_sizes_as_arrays():
    case = CASES["mlp"]()
    steps = np.linspace(0.1, 0.8, 4)
    a, b = (ray_losses(case.model, case.closure, case.direction(), s) for s in (steps, torch.from_numpy(steps)))
    assert torch.equal(a, b)


def test_step_size_overflow_raises():
    model = nn.Linear(1, 1)
    with pytest.raises(LandscapeError, match=r"step_sizes.*1e\+300.*torch.float32"):
        ray_losses(model, lambda m: m(torch.ones(1)), {"bias": torch.ones(1)}, [1e300])


def test_tape_that_cannot_be_made_falls_back_to_loop():
    model, inputs = nn.Linear(6, 3), torch.randn(12, 6)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}

    def closure(model):
        return model(inputs).sum() * model.weight.mean().item()

    expected = ray_losses(model, closure, direction, STEP_SIZES, engine="loop")
    with pytest.warns(UserWarning, match="loop.*tape"):
        losses = ray_losses(model, closure, direction, STEP_SIZES, engine="tape")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(ray_losses(model, closure, direction, STEP_SIZES), expected)  # no warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": {}}, "direction=.*at least one"),
        ({"direction": {"9.weight": torch.zeros(1)}}, r"'9.weight'.*model.named_parameters\(\)"),
        ({"direction": {"0.bias": torch.zeros(1)}}, r"'0.bias'.*\(1,\).*\(8,\)"),
        ({"step_sizes": []}, "step_sizes=.*finite"),
        ({"step_sizes": [0.1, math.nan]}, "step_sizes=.*finite"),
        ({"step_sizes": 0.1}, "step_sizes=0.1: .*list of numbers"),
        ({"engine": "warp"}, "engine='warp': .*auto, tape, loop"),
        ({"engine": "affine"}, "engine='affine': .*'auto'"),
        ({"model": 1}, "model must be an nn.Module, got int"),
        ({"direction": [torch.zeros(1)]}, "direction must be a dict.*got list"),
        ({"closure": lambda model: model(torch.zeros(2, 6).double())}, r"must be a scalar.*shape \(2, 3\)"),
        ({"closure": lambda model: 1.0}, "must be a scalar.*got float"),
    ],
)
def test_invalid_argument_raises(change, message):
    case = CASES["mlp"]()
    arguments = {"model": case.model, "closure": case.closure, "direction": case.direction(), "step_sizes": [0.1]}
    with pytest.raises(LandscapeError, match=message):
        ray_losses(**arguments | change)
