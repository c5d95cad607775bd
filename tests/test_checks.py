import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from landscape.checks import GradientCheck, LossCheck
from landscape.objective import Objective

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


@pytest.mark.parametrize(
    ("recorded", "evaluated", "words"), [(1.0, 1.0, 0), (1.0, 1.5, 1), (1.0, NAN, 1), (NAN, NAN, 0)]
)
def test_a_loss_that_is_not_the_recorded_one_is_told(recorded, evaluated, words):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        LossCheck(recorded, evaluated, 1e-5).warn()
    assert len(seen) == words


def test_the_gradient_of_the_loss_agrees():
    result = check()
    assert result.agrees
    assert result.scale == pytest.approx(1, rel=1e-5)
    assert result.plain_weights


def test_a_clipped_gradient_agrees():
    result = check(lambda gradient: 0.01 * gradient)
    assert result.agrees
    assert result.scale == pytest.approx(0.01, rel=1e-5)
    assert result.plain_weights


def test_another_gradient_does_not_agree():
    assert not check(penalty=0.01).agrees
    assert not check(torch.sign).agrees


def test_unusual_weights_are_found():
    assert not check(weight=torch.tensor(256.0)).plain_weights
    assert not check(weight=torch.tensor(0.3)).plain_weights
    assert check(weight=torch.tensor(1.0)).plain_weights


def test_sparse_gradients_are_judged():
    model, tokens = nn.Embedding(5, 3, sparse=True), torch.tensor([1, 2, 1])
    objective = Objective.of(model, lambda model: model(tokens).square().sum())
    loss = model(tokens).square().sum()
    gradient = {"weight": torch.autograd.grad(loss, model.weight)[0].to_dense()}
    assert GradientCheck.of(objective, dict(model.named_parameters()), gradient).agrees


def test_a_gradient_that_is_not_finite_is_not_judged():
    assert check(lambda gradient: gradient * float("nan")) is None
    assert check(lambda gradient: gradient * 0) is None


def test_a_loss_that_cannot_be_differentiated_again_is_not_judged():
    model = nn.Linear(4, 1)
    inputs = torch.randn(2, 4, requires_grad=True)
    objective = Objective.of(model, lambda model: checkpoint(model, inputs, use_reentrant=True).sum())
    gradient = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    assert GradientCheck.of(objective, dict(model.named_parameters()), gradient) is None
