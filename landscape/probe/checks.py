"""Checks that the objective is the loss that is trained."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.errors import LandscapeError
from landscape.probe.comparison import GradientCheck, LossCheck
from landscape.probe.update import Update
from landscape.ray.objective import LossFunction, LossTerm
from landscape.ray.peak_memory import MemoryLimitError, memory_limit

MAX_FIRST_CHECKS = 10
"""Most updates that are checked until a first check can be decided."""
_AVERAGED = (
    " If DistributedDataParallel averages gradients over processes, give the probe the model that it returns, not the "
    "one inside."
)
_UNSCALED = (
    "Losses were multiplied by {weight:.6g} before the backward pass, and gradients divided by it before the step, as "
    "a loss scaler does. Give the probe grad_scaler=scaler; if the loop does it by hand, "
    "grad_scaler=torch.amp.GradScaler(device, init_scale={weight:.6g})."
)
_NO_EFFECT = (
    "The loss does not depend on the probe's value of the parameter {!r}, although it was trained. The loss reads it "
    "from elsewhere than its module (a closure, a list, a cache, a captured CUDA graph, an object around outputs that "
    "were computed before), so no ray can be measured. Let the forward pass read it from the module, and compute all "
    "of the loss from the model: probe.observe(lambda model, inputs, targets: ..., inputs, targets)."
)
_CHANGED = (
    "{}: it was changed after the backward pass (clipped by value, masked, noised). Rays follow the gradient that the "
    "optimizer gets; the losses along them are the training loss."
)
_OTHER_SLOPE = (
    "The slope is {:.3g} times that of the captured loss. The gradient was changed where the probe does not see it: in "
    "a hook, through .data, or by a sum over processes. Slopes, and measures that need them, are wrong by this factor."
)
_CONSTANT = (
    "The value that was differentiated is {differentiated:.6g}, that of the captured losses {recorded:.6g}. The rest "
    "does not depend on the optimizer's parameters, and is not recorded."
)

_UNCHECKED = (
    "max_memory={}: a check that rays are of the loss that is trained was left out, as it takes more memory ({}). "
    "Allow more, or make the first updates with smaller batches."
)
T = TypeVar("T")


class CaptureChecks:
    """Checks that the objective is the loss that is trained.

    A check is made before the first row, at steps 10, 100, 1,000, ..., and at suspicious losses. An update whose loss
    or gradient is zero or not finite decides nothing, so the next one is checked, too. After a failed check each update
    is checked until one passes.

    Args:
        ranks: The processes that train the model; the mean over them is checked.
        max_memory: Most bytes that a check may hold. One that holds more is left out, with a warning.
    """

    def __init__(self, ranks: RankGroup = SINGLE_PROCESS, max_memory: int | None = None) -> None:
        self._ranks, self._max_memory = ranks, max_memory
        self._first_checks_left = MAX_FIRST_CHECKS
        self._next_step = 0
        """First step at which a check is due."""
        self._last_passed: int | None = None
        """Step of the last check that passed."""
        self._suspicion_interval = 10
        """Least number of steps from a passed check to one of a suspicious update; doubled by each of these."""
        self._warned: set[str] = set()
        """Kinds of warnings so far; each is given once."""

    def is_due(self, step: int) -> bool:
        """Return True if an update is to be checked."""
        return step >= self._next_step

    def check_if_due(self, step: int, update: Update, objective: LossFunction) -> dict[str, Any] | None:
        """Return facts about the run if a check is due.

        Raises:
            LandscapeError: The objective is not the loss that is trained; the message names the rows recorded since
                the last check that passed.
        """
        return self._check(step, update, objective) if self.is_due(step) else None

    def check_if_suspicious(
        self, step: int, update: Update, objective: LossFunction, row: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Check an update with losses that contradict the slope.

        The landscape itself may be the reason, so such a check is not made at every update.

        Raises:
            LandscapeError: The objective is not the loss that is trained.
        """
        if self._ranks.size > 1 or row["losses"].device.type != "cpu":  # Reading them would block.
            return None
        tolerance = 5e-2 if objective.reduced_precision() else 1e-3
        loss = row["loss"].item()
        for eta, there in zip(row["step_sizes"], row["losses"].tolist(), strict=True):
            if eta == 0 and math.isfinite(loss) and not abs(there - loss) <= tolerance * abs(loss):
                raise LandscapeError(LossCheck(loss, there, tolerance).message)
        if self._last_passed is None or step - self._last_passed < self._suspicion_interval or _matches_slope(row):
            return None
        self._suspicion_interval *= 2
        return self._check(step, update, objective)

    def _check(self, step: int, update: Update, objective: LossFunction) -> dict[str, Any]:
        origin, gradient, differentiated = update.origin, update.gradient, update.captured.differentiated
        start = {name: origin[name] for name in gradient}
        at_zero = self._bounded(lambda: LossCheck.of(objective, start, self._ranks, differentiated))
        check = self._bounded(lambda: GradientCheck.of(objective, origin, gradient, self._terms(update)))
        self._next_step = step  # If this check fails, the next update is checked.
        try:
            for kind, message in collect_warnings(at_zero, check, self._ranks.has_untracked_ranks()).items():
                self._warn_once(kind, message)
            if check is not None and abs((factor := _slope_factor(update, check)) - 1) > check.tolerance:
                self._warn_once("slope", _OTHER_SLOPE.format(factor))
        except LandscapeError as error:
            if self._last_passed is None or self._last_passed == step - 1:
                raise
            since = f"Rows from step {self._last_passed + 1} to {step - 1} were recorded since the last check passed."
            raise LandscapeError(f"{error} {since}") from error
        if check is not None:
            self._last_passed, self._first_checks_left = step, 0
        else:
            self._first_checks_left = max(0, self._first_checks_left - 1)
        self._next_step = step + 1 if self._first_checks_left else 10 ** len(str(step)) if step else 10
        facts = {"loss_at_zero": at_zero, "gradient": check}
        return {"step": step} | {name: None if one is None else asdict(one) for name, one in facts.items()}

    def _bounded(self, check: Callable[[], T]) -> T | None:
        """Return a check, or None above the memory limit."""
        try:
            with memory_limit(self._max_memory):
                return check()
        except MemoryLimitError as error:
            self._warn_once("memory", _UNCHECKED.format(self._max_memory, error))
            self._first_checks_left = 1  # The checks of the next updates would hold as much.
            return None

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)

    @staticmethod
    def _terms(update: Update) -> list[LossTerm]:
        captured = update.captured
        return [] if captured.terms_problem else captured.terms

    def state_dict(self) -> dict[str, int | None]:
        """Return the state for a checkpoint."""
        return {
            "left": self._first_checks_left,
            "due": self._next_step,
            "held": self._last_passed,
            "patience": self._suspicion_interval,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._first_checks_left = state["left"]
        # Checkpoints from before checks were repeated lack the others.
        self._next_step = state.get("due", self._next_step)
        self._last_passed = state.get("held", self._last_passed)
        self._suspicion_interval = state.get("patience", self._suspicion_interval)


def collect_warnings(at_zero: LossCheck | None, check: GradientCheck | None, others: bool = False) -> dict[str, str]:
    """Return warnings, by kind, about an objective.

    Args:
        at_zero: Check of the loss; None if it was not made.
        check: Check of the gradient; None if it could not be decided.
        others: True if there are processes outside of the probe's group, over which the gradient may be the mean.

    Raises:
        LandscapeError: The objective is another function than the loss that is trained, or at another scale.
    """
    if check is not None and check.unseen:
        raise LandscapeError(_NO_EFFECT.format(check.unseen[0]))
    if check is not None and check.is_scaled:
        raise LandscapeError(_UNSCALED.format(weight=check.mean_weight))
    found: dict[str, str] = {}
    changed = None if check is None or check.agrees else check.message
    differs = at_zero if at_zero and math.isfinite(at_zero.recorded) and not at_zero.agrees else None
    if changed and differs:
        raise LandscapeError(f"{differs.message} Nor is the optimizer's gradient that of this loss.")
    if changed and others:
        raise LandscapeError(f"{changed}.{_AVERAGED}")
    if changed:
        found["gradient"] = _CHANGED.format(changed)
    if differs:
        found["loss"] = differs.message
    value = at_zero.differentiated if at_zero else None
    if at_zero and value is not None and math.isfinite(at_zero.recorded) and at_zero.differs_from(value):
        found["constant"] = _CONSTANT.format(differentiated=value, recorded=at_zero.recorded)
    return found


def _slope_factor(update: Update, check: GradientCheck) -> float:
    """Return the update's slope over that of the objective."""
    slope = update.row_values(update.gradient)["slope"].item()
    return slope / check.slope if check.slope else math.nan


def _matches_slope(row: Mapping[str, Any]) -> bool:
    """Return True if losses fall about as the slope predicts.

    The rate ``(L(0) - L(eta)) / eta`` is extrapolated to eta = 0 from the two smallest positive step sizes.
    """
    loss, slope, losses = row["loss"].item(), row["slope"].item(), row["losses"].tolist()
    rates = sorted((eta, (loss - there) / eta) for eta, there in zip(row["step_sizes"], losses, strict=True) if eta > 0)
    if len(rates) < 2 or rates[0][0] == rates[1][0] or not slope > 0:
        return True
    (near, rate), (far, far_rate) = rates[:2]
    at_zero = rate + (rate - far_rate) * near / (far - near)
    return not math.isfinite(at_zero) or 0.5 * slope <= at_zero <= 2 * slope
