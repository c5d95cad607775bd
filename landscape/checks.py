"""What is checked on the first probe, not hoped: that the objective is the loss that is trained."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landscape.objective import Objective, Parameters
from landscape.ray import losses_along


@dataclass(frozen=True)
class LossCheck:
    """The training loss as the user's loop computed it, and the objective at step size 0."""

    recorded: float
    evaluated: float
    tolerance: float

    @classmethod
    def of(cls, objective: Objective, origin: Parameters) -> "LossCheck":
        """Evaluate the objective at ``origin``; a hundred roundings are allowed, for kernels that vary in order."""
        with torch.no_grad():
            recorded, evaluated = objective.recorded(), objective(origin)
        return cls(recorded.item(), evaluated.item(), 100 * torch.finfo(recorded.dtype).eps)

    @property
    def apart(self) -> float:
        """How far the two are apart, relative to the recorded one; NaN if one of them is."""
        return abs(self.recorded - self.evaluated) / max(abs(self.recorded), torch.finfo(torch.float32).tiny)

    def warn(self) -> None:
        """Warn by how much the two differ and of the likely causes, if they do."""
        if self.apart > self.tolerance:
            warnings.warn(
                f"At step size 0 the probe measures a loss of {self.evaluated:.6g}, but the training loss was "
                f"{self.recorded:.6g} ({self.apart:.2g} apart, relatively): what is probed is not quite "
                "what is trained. Likely causes: a closure that reads variables which have changed since (pass them "
                "instead: probe.observe(closure, inputs, targets)), state kept outside of parameters and buffers, "
                "random numbers from a generator of its own, or non-deterministic kernels.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class GradientCheck:
    """The gradient that the optimizer got, as ``scale * gradient of the objective`` and a rest."""

    scale: float
    rest: float
    """Norm of the rest relative to that of the optimizer's gradient."""
    weight: float
    """Sum of the weights of the objective's terms."""
    tolerance: float

    @classmethod
    def of(cls, objective: Objective, origin: Parameters, gradient: Parameters) -> "GradientCheck | None":
        """Differentiate the objective at ``origin``; None if that cannot be done or is not finite."""
        own = _flat_gradient(objective, origin, list(gradient))
        if own is None:
            return None
        got = torch.cat([tensor.flatten().to(own) for tensor in gradient.values()])
        scale = torch.dot(own, got) / torch.dot(own, own)
        rest = torch.linalg.vector_norm(got - scale * own) / torch.linalg.vector_norm(got)
        if not (scale.isfinite() and rest.isfinite()):
            return None
        weight = sum(1.0 if term.weight is None else term.weight.item() for term in objective.terms)
        return cls(scale.item(), rest.item(), weight, 5e-2 if _reduced_precision(objective, origin) else 1e-3)

    @property
    def agrees(self) -> bool:
        """Whether the optimizer's gradient is that of the objective, but for a factor (as of clipping by norm)."""
        return self.rest <= self.tolerance

    @property
    def loss_scale(self) -> float | None:
        """The factor by which losses were multiplied before the backward pass and gradients divided after it."""
        undone = abs(self.scale * self.weight - 1) <= self.tolerance
        return self.weight if undone and abs(self.weight - 1) > self.tolerance else None


def engine_agrees(
    engine: str, objective: Objective, origin: Parameters, direction: Parameters, step_sizes: Sequence[float]
) -> bool:
    """Whether an engine gives the losses of the plain loop, to one percent: rounding may grow far from the origin."""
    losses, expected = (losses_along(objective, origin, direction, step_sizes, name) for name in (engine, "loop"))
    return torch.allclose(losses, expected, rtol=1e-2, atol=1e-2 * objective.recorded().abs().item(), equal_nan=True)


def _flat_gradient(objective: Objective, origin: Parameters, names: list[str]) -> Tensor | None:
    leaves = {name: origin[name].detach().requires_grad_() for name in names}
    try:
        with torch.enable_grad():
            loss = objective({**origin, **leaves})
            parts = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    except RuntimeError:  # reentrant checkpointing, or a step of the loss that has no derivative this way
        return None
    return torch.cat([part.flatten().float() if part.dtype.itemsize < 4 else part.flatten() for part in parts])


def _reduced_precision(objective: Objective, origin: Parameters) -> bool:
    autocast = any(state.enabled for term in objective.terms for state in term.state.autocast)
    return autocast or any(tensor.dtype.itemsize < 4 for tensor in origin.values())
