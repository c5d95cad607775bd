"""What is checked on the first probe, not hoped: that the objective is the loss that is trained."""

import math
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
        """Evaluate the objective at ``origin``; some roundings are allowed, for kernels that vary in their order."""
        with torch.no_grad():
            recorded, evaluated = objective.recorded(), objective(origin)
        roundings = 100 if recorded.dtype.itemsize > 2 else 4
        return cls(recorded.item(), evaluated.item(), roundings * torch.finfo(recorded.dtype).eps)

    @property
    def apart(self) -> float:
        """How far the two are apart, relative to the recorded one; NaN if one of them is."""
        return abs(self.recorded - self.evaluated) / max(abs(self.recorded), torch.finfo(torch.float32).tiny)

    @property
    def agrees(self) -> bool:
        """Whether the two are equal but for rounding."""
        return self.apart <= self.tolerance

    def warn(self) -> None:
        """Warn by how much the two differ and of the likely causes, if they do; a diverged loss says nothing."""
        if math.isfinite(self.recorded) and not self.agrees:
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
    terms: int
    tolerance: float

    @classmethod
    def of(cls, objective: Objective, origin: Parameters, gradient: Parameters) -> "GradientCheck | None":
        """Differentiate the objective at ``origin``; None if that cannot be done or is not finite."""
        own = _flat_gradient(objective, origin, list(gradient))
        if own is None:
            return None
        got = torch.cat([tensor.flatten().to(own) for tensor in gradient.values()])
        size = torch.dot(own, own)
        scale = torch.dot(own, got) / size if size else size
        rest = torch.linalg.vector_norm(got - scale * own) / torch.linalg.vector_norm(got)
        if not (scale.isfinite() and rest.isfinite()):
            return None
        weights = [1.0 if term.weight is None else term.weight.item() for term in objective.terms]
        tolerance = 5e-2 if _reduced_precision(objective, origin) else 1e-3
        return cls(scale.item(), rest.item(), sum(weights), len(weights), tolerance)

    @property
    def agrees(self) -> bool:
        """Whether the optimizer's gradient is that of the objective, but for a factor (as of clipping by norm)."""
        return self.rest <= self.tolerance

    @property
    def plain_weights(self) -> bool:
        """Whether the losses were differentiated as a sum or a mean; anything else is worth a word."""
        return min(abs(self.weight - 1), abs(self.weight - self.terms)) <= self.tolerance


def engine_agrees(
    engine: str, objective: Objective, origin: Parameters, direction: Parameters, step_sizes: Sequence[float]
) -> bool:
    """Whether an engine gives the losses of the plain loop, to one percent: rounding may grow far from the origin."""
    if engine == "loop":
        return True
    losses, expected = (losses_along(objective, origin, direction, step_sizes, name) for name in (engine, "loop"))
    return torch.allclose(losses, expected, rtol=1e-2, atol=1e-2 * objective.recorded().abs().item(), equal_nan=True)


def _flat_gradient(objective: Objective, origin: Parameters, names: list[str]) -> Tensor | None:
    leaves = {name: origin[name].detach().requires_grad_() for name in names}
    try:
        with torch.enable_grad(), objective.undisturbed():
            gradients = [term.gradient(leaves) for term in objective.terms]
    except RuntimeError:  # reentrant checkpointing, or a step of the loss that has no derivative this way
        return None
    parts = [torch.stack([_dense(part) for part in column]).sum(0).flatten() for column in zip(*gradients, strict=True)]
    return torch.cat(parts)


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient.float() if gradient.dtype.itemsize < 4 else gradient


def _reduced_precision(objective: Objective, origin: Parameters) -> bool:
    autocast = any(state.enabled for term in objective.terms for state in term.state.autocast)
    return autocast or any(tensor.dtype.itemsize < 4 for tensor in origin.values())
