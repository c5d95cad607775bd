import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from landscape import LandscapeError
from landscape.probe.checks import collect_warnings
from landscape.probe.comparison import GradientCheck, LossCheck
from landscape.ray.objective import Objective

NAN = float("nan")


def check(alter=lambda gradient: gradient, penalty=0.0, weight=None):
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    objective = Objective.of(model, lambda model: F.cross_entropy(model(inputs), targets))
    objective.terms[0].weight = weight
    loss = F.cross_entropy(model(inputs), targets) + penalty * model.weight.square().sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = {name: alter(part) for name, part in zip(names, torch.autograd.grad(loss, parameters), strict=True)}
    return GradientCheck.of(objective, dict(model.named_parameters()), gradient)


def warnings_of(recorded=1.0, evaluated=1.0, differentiated=None, gradient=None, others=False):
    return collect_warnings(LossCheck(recorded, evaluated, 1e-5, differentiated), gradient, others)


@pytest.mark.parametrize(
    ("losses", "kinds"),
    [
        ((1.0, 1.0, 1.0), set()),
        ((1.0, 1.5, None), {"loss"}),
        ((1.0, NAN, None), {"loss"}),
        ((NAN, NAN, NAN), set()),
        ((1.0, 1.0, 1.5), {"constant"}),
        ((1.0, 1.5, 2.0), {"loss", "constant"}),
    ],
)
def test_warnings_of_losses(losses, kinds):
    assert set(warnings_of(*losses)) == kinds


def test_warnings_of_changed_gradient():
    changed = check(torch.sign)
    assert set(warnings_of(gradient=changed)) == {"gradient"}
    for options in ({"evaluated": 1.5}, {"others": True}):
        with pytest.raises(LandscapeError):
            warnings_of(gradient=changed, **options)


def test_parameter_without_effect():
    with pytest.raises(LandscapeError, match="'weight'"):
        warnings_of(gradient=GradientCheck(1.0, 1.0, 1.0, 1, 1e-3, ("weight",)))


def test_gradient_agrees():
    result = check()
    assert result.agrees
    assert result.scale == pytest.approx(1, rel=1e-5)


def test_gradient_clipped():
    result = check(lambda gradient: 0.01 * gradient)
    assert result.agrees
    assert result.scale == pytest.approx(0.01, rel=1e-5)


def test_gradient_differs():
    assert not check(penalty=0.01).agrees
    assert not check(torch.sign).agrees


@pytest.mark.parametrize(
    ("weight", "scale", "is_scaled"),
    [
        (256.0, 1 / 256, True),
        (3.0, 1 / 3, True),  # divided by hand
        (256.0, 1e-5, True),  # clipped too
        (256.0, 1.0, False),  # a loss that is multiplied
        (3.0, 0.01, False),  # and clipped
        (0.3, 1.0, False),
        (1.0, 0.01, False),
    ],
)
def test_loss_scale_detected(weight, scale, is_scaled):
    assert GradientCheck(scale, 0.0, weight, 1, 1e-3).is_scaled == is_scaled


def test_gradient_sparse():
    model, tokens = nn.Embedding(5, 3, sparse=True), torch.tensor([1, 2, 1])
    objective = Objective.of(model, lambda model: model(tokens).square().sum())
    loss = model(tokens).square().sum()
    gradient = {"weight": torch.autograd.grad(loss, model.weight)[0].to_dense()}
    assert GradientCheck.of(objective, dict(model.named_parameters()), gradient).agrees


def test_gradient_not_finite():
    assert check(lambda gradient: gradient * float("nan")) is None
    assert check(lambda gradient: gradient * 0) is None


def test_gradient_of_reentrant_checkpoint():
    model = nn.Linear(4, 1)
    inputs = torch.randn(2, 4, requires_grad=True)
    objective = Objective.of(model, lambda model: checkpoint(model, inputs, use_reentrant=True).sum())
    gradient = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    assert GradientCheck.of(objective, dict(model.named_parameters()), gradient) is None
