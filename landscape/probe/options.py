"""Options of the probe: one field each, checked together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, SupportsFloat, TypedDict

from landscape.errors import LandscapeError
from landscape.probe.sinks import Sink, check_sinks
from landscape.ray.step_sizes import checked_step_sizes

StepSizes = Sequence[float] | Callable[[int], Sequence[float]]

MULTIPLES = (0.5, 1.0, 1.5, 2.0)
"""Default step sizes in learning rates: half of SGD's own step to twice as far (arXiv:2007.08554, figure 5)."""
DIRECTIONS = ("gradient", "update")
_MUST_MATCH = ("step_sizes", "relative", "every", "direction", "gradients", "critical")
"""Options that a resumed run has to share with its checkpoint."""


class ProbeKeywords(TypedDict, total=False):
    """Keywords of `ProbeOptions`, for type checkers and editors."""

    step_sizes: StepSizes | None
    relative: bool
    every: int
    direction: str
    steps_per_epoch: int | None
    engine: str
    max_memory: int | None
    gradients: bool
    critical: bool
    overhead: float | None
    sinks: Sequence[Sink]


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Options of `LandscapeProbe`, by which they are documented.

    A new option is a field here and in `ProbeKeywords`, and a flag of ``landscape probe`` where the command line is to
    have it.

    Raises:
        LandscapeError: An option is out of range.
    """

    step_sizes: StepSizes | None = None
    relative: bool = False
    every: int = 1
    direction: str = "gradient"
    steps_per_epoch: int | None = None
    engine: str = "auto"
    max_memory: int | None = None
    gradients: bool = False
    critical: bool = False
    overhead: float | None = None
    sinks: Sequence[Sink] = ()

    def __post_init__(self) -> None:
        if self.step_sizes is None:
            object.__setattr__(self, "relative", True)
        if not callable(self.step_sizes):
            etas = checked_step_sizes(MULTIPLES if self.step_sizes is None else self.step_sizes)
            object.__setattr__(self, "step_sizes", etas)
        object.__setattr__(self, "sinks", check_sinks(self.sinks))
        if not isinstance(self.direction, str) or self.direction not in DIRECTIONS:
            raise LandscapeError(f"direction={self.direction!r}: must be one of {', '.join(DIRECTIONS)}.")
        self._check_count("every", "a whole number from 1 on", "2 probes every second update.")
        self._check_count("steps_per_epoch", "None or a whole number from 1 on", "Give the updates in an epoch.")
        self._check_count("max_memory", "None or a whole number from 1 on", "Give bytes, such as 2 * 10**9.")
        for name in ("gradients", "critical", "relative"):
            if not isinstance(getattr(self, name), bool):
                raise LandscapeError(f"{name}={getattr(self, name)!r:.100}: must be True or False.")
        share = self.overhead
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e38
        ):
            raise LandscapeError(
                f"overhead={share!r}: must be a positive share of the training time. 0.1 lets probes cost 10 % of it."
            )

    def _check_count(self, name: str, constraint: str, remedy: str) -> None:
        value = getattr(self, name)
        if value is None and name != "every":
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 1:
            raise LandscapeError(f"{name}={value!r}: must be {constraint}. {remedy}")

    def step_sizes_at(self, step: int, lr: SupportsFloat) -> list[float]:
        """Return the step sizes eta of one update.

        Args:
            step: Number of updates before this one.
            lr: Learning rate of the update, by which relative step sizes are multiplied; otherwise it is not read.
        """
        etas = self.step_sizes
        if callable(etas):
            etas = checked_step_sizes(etas(step))
        return [eta * float(lr) if self.relative else eta for eta in etas or ()]

    def metadata(self) -> dict[str, Any]:
        """Return the options as facts of the run, for ``run.json``."""
        # The engine is recorded once it is chosen; sinks do not change a row.
        names = [field.name for field in fields(self) if field.name not in ("engine", "sinks")]
        facts = {name: getattr(self, name) for name in names}
        return facts | {"step_sizes": "a function of the step" if callable(self.step_sizes) else self.step_sizes}

    def resume_signature(self) -> dict[str, Any]:
        """Return the options that must match a checkpoint's."""
        signature = {name: getattr(self, name) for name in _MUST_MATCH}
        return signature | {"step_sizes": None if callable(self.step_sizes) else self.step_sizes}
