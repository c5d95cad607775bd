"""What is checked on the first probe, not hoped: that the objective is the loss that is trained."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.calls import OBSERVE
from landscape.errors import NotYetError, UserError
from landscape.gradients import gradient as gradient_of
from landscape.gradients import inner, norm
from landscape.objective import Objective
from landscape.ranks import ALONE, Ranks
from landscape.state import Parameters
from landscape.walk import Ray, Walk

CHECKS = 10
"""Updates that are asked, at most, whether the captured loss is the one that is trained."""
GUARDED = 3
"""Updates that are looked at for writes to what is not trained; a momentum encoder does not move on the first one."""
AVERAGED = (
    " If DistributedDataParallel averages gradients over processes, give the probe the model that it returns, not the "
    "one inside."
)


class FirstChecks:
    """Finds out, before the first row, whether the objective is what is trained.

    An update whose loss or gradient is not finite or zero says nothing, and the next one is asked.

    Args:
        observed: Whether the user hands over the losses, so that what does not fit is known to them.
        ranks: The processes that train the model; what is checked is the mean over them.
    """

    def __init__(self, observed: bool, ranks: Ranks = ALONE) -> None:
        self._observed = observed
        self._ranks = ranks
        self._left = CHECKS
        self._guarded = GUARDED

    def look_for_writes(self, ray: Ray) -> None:
        """Find out, on the first updates, whether a forward pass writes to parameters that are not on the ray.

        Raises:
            NotYetError: It does. What it wrote is put back, and from the next update on it writes to copies.
        """
        if not self._guarded or ray.objective.shards is not None:  # writes to gathered parameters are not kept
            return
        self._guarded -= 1
        walk, scene = Walk(ray), ray.objective.terms[0].state.scene
        moving = len(scene.moving)
        with scene.guarded(ray.direction), torch.no_grad(), ray.objective.undisturbed():
            for term in ray.objective.terms:
                term.losses(walk.point, walk.moves(ray.step_sizes[:1]))
        if len(scene.moving) > moving:
            raise NotYetError("The forward pass writes to parameters that are not trained; from now on, to copies.")

    def check(self, objective: Objective, origin: Parameters, gradient: Parameters) -> dict[str, Any] | None:
        """Facts about the run, while there is something to find out; ``gradient`` is what the optimizer got.

        Raises:
            UserError: The gradient is not that of the objective, and the losses were not handed over by the user.
        """
        if not self._left:
            return None
        at_zero = LossCheck.of(objective, {name: origin[name] for name in gradient}, self._ranks)
        at_zero.warn()
        check = GradientCheck.of(objective, origin, gradient, self._ranks)
        if check is not None:
            check.judge(self._observed, self._ranks.others())
        self._left = self._left - 1 if check is None else 0
        return {"loss_at_zero": asdict(at_zero), "gradient": None if check is None else asdict(check)}

    def state_dict(self) -> dict[str, int]:
        """How many updates are still to be looked at."""
        return {"left": self._left, "guarded": self._guarded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Look at so many more."""
        self._left, self._guarded = state["left"], state["guarded"]


@dataclass(frozen=True)
class LossCheck:
    """The training loss as the user's loop computed it, and the objective at step size 0."""

    recorded: float
    evaluated: float
    tolerance: float

    @classmethod
    def of(cls, objective: Objective, origin: Parameters, ranks: Ranks = ALONE) -> "LossCheck":
        """Evaluate the objective at ``origin``; some roundings are allowed, for kernels that vary in their order."""
        kind = objective.recorded().dtype

        def own() -> dict[str, Tensor]:
            with torch.no_grad():
                # At copies, because a model may write to its parameters.
                evaluated = objective({name: tensor.clone() for name, tensor in origin.items()})
                return {"recorded": objective.recorded(), "evaluated": evaluated}

        means = ranks.mean(own)
        roundings = 100 if kind.itemsize > 2 else 4
        return cls(means["recorded"].item(), means["evaluated"].item(), roundings * torch.finfo(kind).eps)

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
    def of(
        cls, objective: Objective, origin: Parameters, gradient: Parameters, ranks: Ranks = ALONE
    ) -> "GradientCheck | None":
        """Differentiate the objective at ``origin``; None if that cannot be done or is not finite."""

        def differentiate() -> dict[str | None, Tensor]:
            start = {name: origin[name] for name in gradient}
            try:
                parts = gradient_of(objective, start)
            except RuntimeError:  # reentrant checkpointing, or a step of the loss that has no derivative this way
                parts = {name: torch.full_like(tensor, math.nan) for name, tensor in start.items()}
            weights = [1.0 if term.weight is None else term.weight.item() for term in objective.terms]
            return {None: next(iter(parts.values())).new_tensor(sum(weights)), **parts}

        shards = objective.shards
        means = ranks.mean(differentiate, apart=() if shards is None else gradient)
        own, weight = {name: means[name] for name in gradient}, means[None]
        got = {name: tensor.to(own[name]) for name, tensor in gradient.items()}
        size = inner(own, own, shards)
        scale = inner(own, got, shards) / size if size else size
        rest = norm({name: got[name] - scale * own[name] for name in got}, shards) / norm(got, shards)
        if not (scale.isfinite() and rest.isfinite()):
            return None
        tolerance = 5e-2 if objective.reduced_precision() else 1e-3
        return cls(scale.item(), rest.item(), weight.item(), len(objective.terms), tolerance)

    @property
    def agrees(self) -> bool:
        """Whether the optimizer's gradient is that of the objective, but for a factor (as of clipping by norm)."""
        return self.rest <= self.tolerance

    def judge(self, observed: bool, others: bool = False) -> None:
        """Warn of unusual weights; refuse another gradient, or warn of it where the losses were ``observed``.

        Where there are ``others``, processes that the probe does not know of, it may be the mean over them.
        """
        if not self.plain_weights:
            warnings.warn(
                f"The captured losses were differentiated with weights that sum to {self.weight:.6g}, and are "
                "recorded times their weights. For a loss scale pass grad_scaler=; where the training loss is no "
                "multiple of the criterion, or is differentiated more than once, use probe.observe.",
                stacklevel=2,
            )
        if self.agrees:
            return
        message = f"The optimizer's gradient is not that of the captured loss ({self.rest:.1%} of it is something else)"
        hint = AVERAGED if others else ""
        if not observed:
            raise UserError(
                f"{message}: the training loss is more than criterion(model(inputs), targets), or the gradient was "
                f"changed after the backward pass (clipped by value, masked).{hint} {OBSERVE}; there this is a warning."
            )
        warnings.warn(
            f"{message}: a part of the loss was not observed, or the gradient was changed.{hint}", stacklevel=2
        )

    @property
    def plain_weights(self) -> bool:
        """Whether the losses were differentiated as a sum or a mean; anything else is worth a word."""
        return min(abs(self.weight - 1), abs(self.weight - self.terms)) <= self.tolerance
