"""Common losses: each row is measured with the loss that was trained, or there is no row."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lab import ENGINES, batches, check_rows, check_same_training, mlp, run
from torch import nn

from landscape import LandscapeError

WEIGHTS = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)


def squares(model):
    return sum(parameter.square().sum() for parameter in model.parameters())


def gradient_penalty(c, m, x, y):
    x = x.clone().requires_grad_()
    outputs = m(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return c(outputs, y) + 0.1 * slope.square().mean()


def parameter_penalty(c, m, x, y):
    loss = c(m(x), y)
    slopes = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    return loss + 0.1 * sum(slope.square().sum() for slope in slopes)


def mixup(c, m, x, y):
    outputs = m(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * c(outputs, y) + 0.3 * c(outputs, y.flip(0))


def with_entropy(c, m, x, y):
    outputs = m(x)
    return c(outputs, y) - 0.1 * (outputs.softmax(1) * outputs.log_softmax(1)).sum(1).mean()


def contrastive(c, m, x, y):
    return c(m(x), y) + F.mse_loss(m(x + 0.1), m(x))


def hardest(c, m, x, y):
    return F.cross_entropy(m(x), y, reduction="none").topk(4).values.mean()


EACH = nn.CrossEntropyLoss(reduction="none")
MEAN = nn.CrossEntropyLoss()
WEIGHTED_SUMS = {
    "the criterion": (MEAN, lambda c, m, x, y: c(m(x), y)),
    "a half": (MEAN, lambda c, m, x, y: 0.5 * c(m(x), y)),
    "divided": (MEAN, lambda c, m, x, y: c(m(x), y) / torch.tensor(3.0, dtype=torch.float64)),
    "mean of each": (EACH, lambda c, m, x, y: c(m(x), y).mean()),
    "weighted samples": (EACH, lambda c, m, x, y: (WEIGHTS * c(m(x), y)).sum() / WEIGHTS.sum()),
    "dot": (EACH, lambda c, m, x, y: c(m(x), y) @ WEIGHTS),
    "mixup": (MEAN, mixup),
    "stacked": (MEAN, lambda c, m, x, y: torch.stack([c(m(x), y)]).sum()),
    "one element": (MEAN, lambda c, m, x, y: c(m(x), y).reshape(1)),
}
OTHER_LOSSES = {
    "rmse": (MEAN, lambda c, m, x, y: c(m(x), y).sqrt()),
    "log": (MEAN, lambda c, m, x, y: c(m(x), y).log()),
    "exp": (MEAN, lambda c, m, x, y: c(m(x), y).exp()),
    "flooding": (MEAN, lambda c, m, x, y: (c(m(x), y) - 0.4).abs() + 0.4),
    "squared": (MEAN, lambda c, m, x, y: c(m(x), y) ** 2),
    "times itself": (MEAN, lambda c, m, x, y: (lambda loss: loss * loss)(c(m(x), y))),
    "reciprocal": (MEAN, lambda c, m, x, y: -1 / c(m(x), y)),
    "clamped": (MEAN, lambda c, m, x, y: c(m(x), y).clamp(max=50)),
    "nan_to_num": (MEAN, lambda c, m, x, y: torch.nan_to_num(c(m(x), y))),
    "where": (MEAN, lambda c, m, x, y: (lambda loss: torch.where(loss > 0, loss, 0 * loss))(c(m(x), y))),
    "penalty": (MEAN, lambda c, m, x, y: c(m(x), y) + 0.01 * squares(m)),
    "tiny penalty": (MEAN, lambda c, m, x, y: c(m(x), y) + 1e-9 * squares(m)),
    "penalty of weight 0": (MEAN, lambda c, m, x, y: c(m(x), y) + 0.0 * squares(m)),
    "entropy": (MEAN, with_entropy),
    "learned weight": (MEAN, lambda c, m, x, y: c(m(x), y) * m[3].bias.exp().mean()),
    "gradient penalty": (MEAN, gradient_penalty),
    "gradient by parameters": (MEAN, parameter_penalty),
    "two passes": (MEAN, contrastive),
    "the hardest": (EACH, lambda c, m, x, y: c(m(x), y).topk(4).values.mean()),
}
WITHOUT_CRITERION = {"functional": (MEAN, lambda c, m, x, y: F.cross_entropy(m(x), y)), "hardest": (MEAN, hardest)}


def trial(lab, name, observed):
    """Train on the loss of this name, which the probe gets from the criterion or by `observe`."""
    criterion, total = (WEIGHTED_SUMS | OTHER_LOSSES | WITHOUT_CRITERION)[name]
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.attached(model, optimizer, None if observed else criterion):
        for x, y in batches():
            lab.copy_modules(model)
            optimizer.zero_grad()
            if observed:
                loss = lab.observe(lambda m, x, y: total(criterion, m, x, y), x, y)
            else:
                loss = total(criterion, model, x, y)
            loss.backward()
            lab.record_update(loss, lambda m, x=x, y=y: total(criterion, m, x, y))
            optimizer.step()
    lab.record_state(model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WEIGHTED_SUMS)
def test_criterion_weighted_sum(name, engine):
    check_rows(functools.partial(trial, name=name, observed=False), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WEIGHTED_SUMS | OTHER_LOSSES | WITHOUT_CRITERION)
def test_observe_any_loss(name, engine):
    check_rows(functools.partial(trial, name=name, observed=True), engine=engine)


@pytest.mark.parametrize("name", OTHER_LOSSES | WITHOUT_CRITERION)
def test_criterion_other_loss(name):
    """The loop refuses it, and the tape measures it."""
    told = functools.partial(trial, name=name, observed=False)
    with pytest.raises(LandscapeError, match=r"probe\.observe"):
        run(told, True, engine="loop")
    check_rows(told)


@pytest.mark.parametrize("rest", ["penalty", "rmse"])
def test_observe_changed_result(rest):
    def trial(lab):
        model, criterion = mlp().double(), MEAN
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer):
            for x, y in batches():
                loss = lab.observe(lambda m, x, y: criterion(m(x), y), x, y)
                (loss.sqrt() if rest == "rmse" else loss + squares(model)).backward()
                optimizer.step()

    with pytest.raises(LandscapeError, match=r"probe\.observe"):
        run(trial, True, engine="loop")


def test_criterion_later_penalty():
    def trial(lab):
        model, criterion = mlp().double(), MEAN
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, criterion):
            for step, (x, y) in enumerate(batches()):
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss = criterion(model(x), y) + (1e-12 * squares(model) if step == 2 else 0)
                loss.backward()
                lab.record_update(loss, lambda m, x=x, y=y: criterion(m(x), y))
                optimizer.step()
        lab.record_state(model)

    result = check_rows(trial, missing=[2], engine="loop")
    assert sum("Step 2" in message for message in result.warnings) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_differentiated_constant_part(engine):
    """The sum of the losses of two models is differentiated; the tape records all of it, the loop one model's part."""

    def trial(lab):
        model, other, criterion = mlp().double(), mlp().double(), MEAN
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, criterion):
            for x, y in batches():
                lab.copy_modules(model)
                optimizer.zero_grad()
                loss, rest = criterion(model(x), y), F.cross_entropy(other(x), y)
                (loss + rest).backward()
                constant = 0 if engine == "loop" else rest.detach()
                lab.record_update(loss + constant, lambda m, x=x, y=y, c=constant: criterion(m(x), y) + c)
                optimizer.step()
        lab.record_state(model, other)

    result = check_rows(trial, engine=engine, alone=engine != "loop")
    assert any("differentiated" in message for message in result.warnings) is (engine == "loop")


def test_criterion_penalty_under_autocast():
    def trial(lab):
        model, criterion = mlp(), MEAN
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer, criterion):
            for x, y in batches():
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = criterion(model(x.float()), y) + 1e-4 * squares(model)
                loss.backward()
                optimizer.step()

    with pytest.raises(LandscapeError, match=r"probe.observe"):
        run(trial, True, engine="loop")
    assert len(check_same_training(trial).frame) == len(list(batches()))
