"""Losses and slope along the ray of each update, by moved copies of the model, and how traces are compared to them."""

import copy
import math

import torch


class Reference:
    """Records a training without a probe.

    A training calls ``forward(module, loss)`` before each forward pass, where ``loss(module)`` is what it
    differentiates, and ``step()`` before each step.
    """

    def __init__(self, step_sizes, optimizer=None):
        self.step_sizes, self.optimizer = step_sizes, optimizer
        self.rows, self._passes = [], []

    def forward(self, module, loss):
        self._passes.append((module, copied(module), torch.get_rng_state(), loss))

    def drop(self):
        """Forget passes whose step was skipped."""
        self._passes = []

    def step(self, optimizer=None):
        now, optimizer = torch.get_rng_state(), optimizer or self.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        row = [self._slope(held), *(self._loss(eta, held) for eta in [0.0, *self.step_sizes])]
        torch.set_rng_state(now)
        self.rows.append(row)
        self.drop()

    def _loss(self, eta, held):
        total = 0.0
        for module, before, rng_state, loss in self._passes:
            moved = copy.deepcopy(before)
            named = dict(moved.named_parameters())
            with torch.no_grad():
                for name, gradient in gradients(module, held).items():
                    named[name] -= eta * gradient
            torch.set_rng_state(rng_state)
            total += float(loss(moved).detach())
        return total

    def _slope(self, held):
        """Return the inner product of the gradient of the loss and that of the optimizer."""
        total = 0.0
        for module, before, rng_state, loss in self._passes:
            along = gradients(module, held)
            moved = copy.deepcopy(before)
            named = dict(moved.named_parameters())
            torch.set_rng_state(rng_state)
            moved.zero_grad()
            loss(moved).backward()
            own = {name: named[name].grad for name in along if named[name].grad is not None}
            total += sum(float((own[name] * along[name]).sum()) for name in own)
        return total


def gradients(module, held):
    """Return the gradients that the optimizer gets, by name."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and id(p) in held}


def copied(module):
    """Return a copy without the ``forward`` that accelerate has put into it, which would call the original."""
    forward = module.__dict__.pop("forward", None)
    try:
        return copy.deepcopy(module)
    finally:
        if forward is not None:
            module.__dict__["forward"] = forward


def assert_rows(frame, rows, first=0, rel=1e-6):
    """Check the rows of a trace, the first of which has the step ``first``."""
    assert list(frame["step"]) == list(range(first, first + len(rows)))
    for step, (_, got) in enumerate(frame.iterrows()):
        slope, *losses = rows[step]
        assert math.isclose(got["slope"], slope, rel_tol=0.02), (step, got["slope"], slope)
        for one, other in zip([got["loss"], *got["losses"]], losses, strict=True):
            assert math.isclose(one, other, rel_tol=rel), (step, got["loss"], list(got["losses"]), rows[step])


def assert_same_bits(one, other):
    """Check that two state dicts are the same, bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
