"""Comparisons of an objective with the loss and the gradient of the user's loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.distributed.parameter_space import Parameters
from landscape.ray.gradients import gradient as gradient_of
from landscape.ray.objective import LossFunction, LossTerm, NoDependenceError
from landscape.ray.peak_memory import MemoryLimitError


@dataclass(frozen=True)
class LossCheck:
    """The training loss, and the objective at step size 0.

    Attributes:
        recorded: The training loss as the user's loop computed it.
        evaluated: The objective at step size 0.
        tolerance: Largest relative difference that may be rounding.
        differentiated: Value of the differentiated tensors, if known.
    """

    recorded: float
    evaluated: float
    tolerance: float
    differentiated: float | None = None

    @classmethod
    def of(
        cls,
        objective: LossFunction,
        origin: Parameters,
        ranks: RankGroup = SINGLE_PROCESS,
        differentiated: Tensor | None = None,
    ) -> Self:
        """Evaluate the objective at ``origin``.

        The tolerance is some roundings, for kernels whose order of summation varies.
        """
        dtype = objective.training_loss().dtype

        def own() -> dict[str, Tensor]:
            with torch.no_grad():
                # A model may write to its parameters, so it gets copies.
                evaluated = objective({name: tensor.clone() for name, tensor in origin.items()})
                known = {} if differentiated is None else {"differentiated": differentiated}
                return {"recorded": objective.training_loss(), "evaluated": evaluated, **known}

        means = {name: value.item() for name, value in ranks.all_mean(own).items()}
        roundings = 100 if dtype.itemsize > 2 else 4
        return cls(**means, tolerance=roundings * torch.finfo(dtype).eps)

    def differs_from(self, value: float) -> bool:
        """Return True if a value differs by more than rounding."""
        size = max(abs(self.recorded), torch.finfo(torch.float32).tiny)
        return not abs(value - self.recorded) <= self.tolerance * size

    @property
    def agrees(self) -> bool:
        """True if the losses differ by no more than rounding."""
        return not self.differs_from(self.evaluated)

    @property
    def message(self) -> str:
        """The difference, with likely causes."""
        return (
            f"At step size 0 the probe measures a loss of {self.evaluated:.6g}, but the training loss was "
            f"{self.recorded:.6g}, so the probe does not evaluate quite the loss that is trained. Likely causes: a "
            "closure that reads variables that have changed since (pass them instead: probe.observe(closure, inputs, "
            "targets)), state outside of parameters and buffers, a random generator of the model's own, dropout in "
            "code of torch.compile (set torch._inductor.config.fallback_random = True), or non-deterministic kernels."
        )


@dataclass(frozen=True)
class GradientCheck:
    """The optimizer's gradient as ``scale * own + rest``.

    The objective's gradient is ``own``, and ``scale = <own, gradient> / <own, own>``.

    Attributes:
        scale: Factor of the objective's gradient.
        rest: Norm of the rest relative to that of the optimizer's gradient.
        weight: Sum of the weights of the objective's terms.
        terms: Number of terms.
        tolerance: Largest rest that may be rounding.
        unseen: Parameters with a gradient on which the objective does not depend.
        slope: Inner product of both gradients.
    """

    scale: float
    rest: float
    weight: float
    terms: int
    tolerance: float
    unseen: tuple[str, ...] = ()
    slope: float = math.nan

    @classmethod
    def of(
        cls, objective: LossFunction, origin: Parameters, gradient: Parameters, terms: Sequence[LossTerm] = ()
    ) -> Self | None:
        """Differentiate the objective; None if impossible or not finite."""

        def differentiate() -> dict[str | None, Tensor]:
            start = {name: origin[name] for name in gradient}
            try:
                parts = gradient_of(objective, start)
            except MemoryLimitError:
                raise
            except NoDependenceError:
                parts = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
            except RuntimeError:  # A reentrant checkpoint, or an operation that has no derivative this way.
                parts = {name: torch.full_like(tensor, math.nan) for name, tensor in start.items()}
            weights = [1.0 if term.weight is None or term.weight.numel() > 1 else term.weight.item() for term in terms]
            return {None: next(iter(parts.values())).new_tensor(sum(weights)), **parts}

        space = objective.space
        means = space.all_mean(differentiate)
        own, weight = {name: means[name] for name in gradient}, means[None]
        got = {name: tensor.to(own[name]) for name, tensor in gradient.items()}
        size = space.inner(own, own)
        # Numbers, because the parameters may be on several devices.
        scale = (space.inner(own, got) / size if size else size).item()
        whole = space.norm(got).item()
        rest = space.norm({name: got[name] - scale * own[name] for name in got}).item() / (whole or math.nan)
        if not (math.isfinite(scale) and math.isfinite(rest)):
            return None
        tolerance = 5e-2 if objective.reduced_precision() else 1e-3
        missed = [name for name in got if not space.is_sharded and not own[name].any()]
        unseen = tuple(name for name in missed if got[name].norm() > tolerance * whole)
        return cls(scale, rest, weight.item(), len(terms), tolerance, unseen, scale * size.item())

    @property
    def agrees(self) -> bool:
        """True if the gradients differ only by a factor."""
        return self.rest <= self.tolerance

    @property
    def message(self) -> str:
        """The size of the rest."""
        return f"The optimizer's gradient is not that of the captured loss ({self.rest:.1%} of it is something else)"

    @property
    def mean_weight(self) -> float:
        """Mean of the weights.

        Without terms it is the factor by which the gradient is smaller.
        """
        return self.weight / self.terms if self.terms else 1 / self.scale if self.scale else math.nan

    @property
    def is_scaled(self) -> bool:
        """True if losses have a weight that the gradient lacks.

        A loss scaler that the probe was not given has this effect. Gradients may have been clipped, too; then only a
        weight that is a power of two, from 16 on, is recognized.
        """
        weight = self.mean_weight
        if not self.terms:  # Clipping has this effect, too, but hardly ever by a power of two.
            nearest = 2.0 ** round(math.log2(weight)) if 0 < weight < math.inf else math.nan
            return self.agrees and nearest >= 16 and abs(weight / nearest - 1) <= 1e-2 * self.tolerance
        divided = weight > 1.5 and abs(self.scale * weight - 1) <= self.tolerance
        return divided or (weight >= 16 and math.frexp(weight)[0] == 0.5 and self.scale * weight <= 1 + self.tolerance)
