"""What is checked on the first probe, not hoped: that the objective is the loss that is trained."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.probe.update import Update
from landscape.ray.gradients import gradient as gradient_of
from landscape.ray.gradients import inner, norm
from landscape.ray.objective import NoDependenceError, Objective
from landscape.ray.ray import ParametersAlongRay, Ray
from landscape.ray.snapshot import Parameters

CHECKS = 10
"""Updates that are asked, at most, for a first answer."""
GUARDED = 3
"""Updates that are looked at for writes to what is not trained; a momentum encoder does not move on the first one."""
AVERAGED = (
    " If DistributedDataParallel averages gradients over processes, give the probe the model that it returns, not the "
    "one inside."
)
_UNSCALED = (
    "Losses were multiplied by {weight:.6g} before they were differentiated, and gradients divided by it before the "
    "step, as a loss scaler does. Give the probe grad_scaler=scaler; where the loop does it by hand, "
    "grad_scaler=torch.amp.GradScaler(device, init_scale={weight:.6g})."
)


class CaptureChecks:
    """Checks that the objective is what is trained: before the first row, at steps 10, 100, 1,000, ..., and in doubt.

    An update whose loss or gradient is not finite or zero says nothing, and the next one is asked. After an answer that
    is no, each update is asked until one says yes.

    Args:
        ranks: The processes that train the model; what is checked is the mean over them.
    """

    def __init__(self, ranks: RankGroup = SINGLE_PROCESS) -> None:
        self._ranks = ranks
        self._left = CHECKS
        self._guarded = GUARDED
        self._due = 0
        """The step from which on the next check is made."""
        self._held: int | None = None
        """The step of the last check that held."""
        self._patience = 10
        """Checks in doubt are made after so many steps; twice as many after each that has held."""
        self._said: set[str] = set()
        """Kinds of warnings that were given; one of each is enough."""

    def detect_parameter_writes(self, ray: Ray) -> None:
        """Find out, on the first updates, whether a forward pass writes to parameters that are not on the ray.

        Raises:
            ProbeDeferred: It does. What it wrote is put back, and from the next update on it writes to copies.
        """
        if not self._guarded or ray.objective.shards is not None:  # writes to gathered parameters are not kept
            return
        self._guarded -= 1
        walk, scene = ParametersAlongRay(ray), ray.objective.terms[0].state.scene
        moving = len(scene.written_parameters)
        with scene.detect_writes(ray.direction), torch.no_grad(), ray.objective.rng_restored():
            for term in ray.objective.terms:
                term.losses(walk.point, walk.moves(ray.step_sizes[:1]))
        if len(scene.written_parameters) > moving:
            raise ProbeDeferred("The forward pass writes to parameters that are not trained; from now on, to copies.")

    def check(self, step: int, update: Update) -> dict[str, Any] | None:
        """Facts about the run, where a check is due.

        Raises:
            LandscapeError: The objective is not what is trained; it says which rows were recorded since that was sure.
        """
        return self._checked(step, update) if step >= self._due else None

    def doubt(self, step: int, update: Update, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check an update whose losses do not fall as the gradient says, which may be the landscape's fault.

        Raises:
            LandscapeError: As for :meth:`check`.
        """
        if self._ranks.size > 1 or row["losses"].device.type != "cpu":  # a look would wait for others, or for a GPU
            return None
        share = 5e-2 if update.objective.reduced_precision() else 1e-3
        loss = row["loss"].item()
        for eta, there in zip(row["step_sizes"], row["losses"].tolist(), strict=True):
            if eta == 0 and math.isfinite(loss) and not abs(there - loss) <= share * abs(loss):
                raise LandscapeError(LossCheck(loss, there, share).words)
        if self._held is None or step - self._held < self._patience or _falls_as_promised(row):
            return None
        self._patience *= 2
        return self._checked(step, update)

    def _checked(self, step: int, update: Update) -> dict[str, Any]:
        objective, origin, gradient = update.objective, update.origin, update.gradient
        at_zero = LossCheck.of(objective, {name: origin[name] for name in gradient}, self._ranks, update.differentiated)
        check = GradientCheck.of(objective, origin, gradient, self._ranks)
        self._due = step  # again for the next update, if this one raises
        try:
            for kind, words in judged(at_zero, check, self._ranks.has_untracked_ranks()).items():
                if kind not in self._said:
                    self._said.add(kind)
                    warnings.warn(words, stacklevel=2)
        except LandscapeError as error:
            if self._held is None or self._held == step - 1:
                raise
            since = f"Rows from step {self._held + 1} to {step - 1} were recorded since this was last checked."
            raise LandscapeError(f"{error} {since}") from error
        if check is not None:
            self._held, self._left = step, 0
        else:
            self._left = max(0, self._left - 1)
        self._due = step + 1 if self._left else 10 ** len(str(step)) if step else 10
        facts = {"loss_at_zero": asdict(at_zero), "gradient": None if check is None else asdict(check)}
        return {"step": step, **facts}

    def state_dict(self) -> dict[str, int]:
        """What is still to be looked at, and what was found."""
        names = ("left", "guarded", "due", "held", "patience")
        return {name: getattr(self, f"_{name}") for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def judged(at_zero: "LossCheck", check: "GradientCheck | None", others: bool = False) -> dict[str, str]:
    """Warnings, by their kind, of what may surprise in an objective that is what is trained.

    Where there are ``others``, processes that the probe does not know of, the gradient may be the mean over them.

    Raises:
        LandscapeError: Another function is measured, or at another scale.
    """
    if check is not None and check.unseen:
        raise LandscapeError(
            f"Where the probe moves the parameter {check.unseen[0]!r}, the loss does not see it, although it was "
            "trained: the loss has it from somewhere else than its module (a closure, a list, a cache, a captured CUDA "
            "graph, an object around outputs that were computed before), so that no ray can be measured. Let the "
            "forward pass read it from the module, and compute all of the loss from the model: "
            "probe.observe(lambda model, inputs, targets: ..., inputs, targets)."
        )
    if check is not None and check.is_scaled:
        raise LandscapeError(_UNSCALED.format(weight=check.weight / max(1, check.terms)))
    words: dict[str, str] = {}
    changed = None if check is None or check.agrees else check.words
    differs = math.isfinite(at_zero.recorded) and not at_zero.agrees
    if changed and differs:
        raise LandscapeError(f"{at_zero.words} Nor is the optimizer's gradient that of this loss.")
    if changed and others:
        raise LandscapeError(f"{changed}.{AVERAGED}")
    if changed:
        words["gradient"] = (
            f"{changed}: it was changed after the backward pass (clipped by value, masked, noised). Rays follow what "
            "the optimizer gets; the losses along them are those of the training loss."
        )
    if differs:
        words["loss"] = at_zero.words
    if (
        at_zero.differentiated is not None
        and math.isfinite(at_zero.recorded)
        and at_zero.is_apart(at_zero.differentiated)
    ):
        words["constant"] = (
            f"The value that was differentiated is {at_zero.differentiated:.6g}, that of the captured losses "
            f"{at_zero.recorded:.6g}. The rest does not depend on the optimizer's parameters, and is not recorded."
        )
    return words


def _falls_as_promised(row: Mapping[str, Any]) -> bool:
    """Whether the fall of the losses, extrapolated from the two nearest points to the origin, is about the slope."""
    loss, slope, losses = row["loss"].item(), row["slope"].item(), row["losses"].tolist()
    points = sorted(
        (eta, (loss - there) / eta) for eta, there in zip(row["step_sizes"], losses, strict=True) if eta > 0
    )
    if len(points) < 2 or points[0][0] == points[1][0] or not slope > 0:
        return True
    (near, fall), (far, farther) = points[:2]
    start = fall + (fall - farther) * near / (far - near)
    return not math.isfinite(start) or 0.5 * slope <= start <= 2 * slope


@dataclass(frozen=True)
class LossCheck:
    """The training loss as the user's loop computed it, and the objective at step size 0."""

    recorded: float
    evaluated: float
    tolerance: float
    differentiated: float | None = None
    """The value of the tensor that was differentiated."""

    @classmethod
    def of(
        cls,
        objective: Objective,
        origin: Parameters,
        ranks: RankGroup = SINGLE_PROCESS,
        differentiated: Tensor | None = None,
    ) -> "LossCheck":
        """Evaluate the objective at ``origin``; some roundings are allowed, for kernels that vary in their order."""
        kind = objective.training_loss().dtype

        def own() -> dict[str, Tensor]:
            with torch.no_grad():
                # At copies, because a model may write to its parameters.
                evaluated = objective({name: tensor.clone() for name, tensor in origin.items()})
                known = {} if differentiated is None else {"differentiated": differentiated}
                return {"recorded": objective.training_loss(), "evaluated": evaluated, **known}

        means = {name: value.item() for name, value in ranks.all_mean(own).items()}
        roundings = 100 if kind.itemsize > 2 else 4
        return cls(**means, tolerance=roundings * torch.finfo(kind).eps)

    def is_apart(self, value: float) -> bool:
        """Whether a value is not the recorded one but for rounding."""
        return not abs(value - self.recorded) <= self.tolerance * max(
            abs(self.recorded), torch.finfo(torch.float32).tiny
        )

    @property
    def agrees(self) -> bool:
        """Whether the loss at step size 0 is the recorded one but for rounding."""
        return not self.is_apart(self.evaluated)

    @property
    def words(self) -> str:
        """By how much the two differ, and the likely causes."""
        return (
            f"At step size 0 the probe measures a loss of {self.evaluated:.6g}, but the training loss was "
            f"{self.recorded:.6g}: what is probed is not quite what is trained. Likely causes: a closure that reads "
            "variables which have changed since (pass them instead: probe.observe(closure, inputs, targets)), state "
            "kept outside of parameters and buffers, random numbers from a generator of its own, dropout in code by "
            "torch.compile (set torch._inductor.config.fallback_random = True), or non-deterministic kernels."
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
    unseen: tuple[str, ...] = ()
    """Parameters that the objective does not depend on, although they have a gradient."""

    @classmethod
    def of(
        cls, objective: Objective, origin: Parameters, gradient: Parameters, ranks: RankGroup = SINGLE_PROCESS
    ) -> "GradientCheck | None":
        """Differentiate the objective at ``origin``; None if that cannot be done or is not finite."""

        def differentiate() -> dict[str | None, Tensor]:
            start = {name: origin[name] for name in gradient}
            try:
                parts = gradient_of(objective, start)
            except NoDependenceError:
                parts = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
            except RuntimeError:  # reentrant checkpointing, or a step of the loss that has no derivative this way
                parts = {name: torch.full_like(tensor, math.nan) for name, tensor in start.items()}
            weights = [
                1.0 if term.weight is None or term.weight.numel() > 1 else term.weight.item()
                for term in objective.terms
            ]
            return {None: next(iter(parts.values())).new_tensor(sum(weights)), **parts}

        shards = objective.shards
        means = ranks.all_mean(differentiate, apart=() if shards is None else gradient)
        own, weight = {name: means[name] for name in gradient}, means[None]
        got = {name: tensor.to(own[name]) for name, tensor in gradient.items()}
        size = inner(own, own, shards)
        scale = inner(own, got, shards) / size if size else size
        whole = norm(got, shards)
        rest = norm({name: got[name] - scale * own[name] for name in got}, shards) / whole
        if not (scale.isfinite() and rest.isfinite()):
            return None
        tolerance = 5e-2 if objective.reduced_precision() else 1e-3
        missed = [name for name in got if shards is None and not own[name].any()]
        unseen = tuple(name for name in missed if got[name].norm() > tolerance * whole)
        return cls(scale.item(), rest.item(), weight.item(), len(objective.terms), tolerance, unseen)

    @property
    def agrees(self) -> bool:
        """Whether the optimizer's gradient is that of the objective, but for a factor (as of clipping by norm)."""
        return self.rest <= self.tolerance

    @property
    def words(self) -> str:
        """By how much it is not."""
        return f"The optimizer's gradient is not that of the captured loss ({self.rest:.1%} of it is something else)"

    @property
    def is_scaled(self) -> bool:
        """Whether losses have a weight that the gradient lacks, as a loss scaler leaves them where it is not known.

        Gradients may have been clipped too; then the weight is known by being a power of two, and no small one.
        """
        weight = self.weight / max(1, self.terms)
        divided = weight > 1.5 and abs(self.scale * weight - 1) <= self.tolerance
        return divided or (weight >= 16 and math.frexp(weight)[0] == 0.5 and self.scale * weight <= 1 + self.tolerance)
