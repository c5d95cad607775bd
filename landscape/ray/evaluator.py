"""Evaluates the rays of a run: by the tape where an update can be recorded, otherwise by the loop."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.engines.graphs import Graphs
from landscape.ray.engines.loop import checked_loop, loop
from landscape.ray.engines.tape import Tape, tape
from landscape.ray.gradients import RayGradients, gradients_along
from landscape.ray.peak_memory import MemoryLimitError, PeakMemory
from landscape.ray.ray import ParametersAlongRay, Ray

R = TypeVar("R")
PATIENCE = 3
"""Updates in a row without a tape after which no more are recorded."""
WRITE_CHECKS = 3
"""First rays of the loop that are checked for writes to parameters; a momentum encoder does not move at the first."""


class Evaluator:
    """Evaluates rays, and records which engine has.

    Args:
        engine: "auto", "tape" or "loop".
        max_memory: Bytes that a ray may hold at its peak. A ray that holds more is stopped as soon as it does.
        update_metadata: Takes facts of the run.
    """

    def __init__(self, engine: str, max_memory: int | None, update_metadata: Callable[..., None]) -> None:
        self._engine, self._max_memory, self._update_metadata = engine, max_memory, update_metadata
        self.records = engine != "loop"
        """True if updates are to be recorded."""
        self._compared = False
        """True if the tape was compared with the loop."""
        self._refusals = 0
        """Updates without a tape since the last one with it."""
        self._write_checks_left = WRITE_CHECKS
        self._facts: dict[str, Any] = {}
        self._graphs = Graphs()

    def losses(self, taped: Ray | NoTapeError, looped: Ray | LandscapeError) -> tuple[Ray, Tensor]:
        """Return the K losses, and the ray that gave them.

        Args:
            taped: The ray of the tape, or the reason why there is none.
            looped: The ray of the loop, or the reason why there is none.

        Raises:
            LandscapeError: Neither can be evaluated, or takes at most ``max_memory``.
        """
        if isinstance(taped, Ray):
            try:
                return taped, self._by_tape(taped, looped)
            except NoTapeError as error:
                taped = error
        return self._fall_back(taped, looped, self._by_loop)

    def gradients(
        self, taped: Ray | NoTapeError, looped: Ray | LandscapeError, start: Parameters | None
    ) -> tuple[Ray, RayGradients]:
        """Return losses and gradients along the ray, as `losses` does.

        The gradient at its origin is ``start`` if it is known.
        """
        if isinstance(taped, Ray):
            try:
                return taped, self._measured("tape", taped, partial(gradients_along, start=start))
            except NoTapeError as error:
                taped = error
        return self._fall_back(taped, looped, partial(self._gradients_by_loop, start=start))

    @property
    def engine(self) -> str | None:
        """Name of the engine of the last ray."""
        return self._facts.get("engine")

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "asked": self._engine,
            "records": self.records,
            "compared": self._compared,
            "refusals": self._refusals,
            "guarded": self._write_checks_left,
            "facts": dict(self._facts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, unless another engine is chosen now."""
        if state["asked"] != self._engine or "records" not in state:  # until 2026-11
            return
        self.records, self._compared, self._refusals = state["records"], state["compared"], state["refusals"]
        self._write_checks_left, self._facts = state["guarded"], dict(state["facts"])
        if self._facts:
            self._update_metadata(**self._facts)

    def _fall_back(
        self, refused: NoTapeError, looped: Ray | LandscapeError, evaluate: Callable[[Ray], R]
    ) -> tuple[Ray, R]:
        if isinstance(looped, LandscapeError):
            if not self.records:
                raise looped
            raise LandscapeError(f"The update's calls cannot be repeated: {refused}. {looped}") from refused
        result = evaluate(looped)
        if self.records:
            self._refusals += 1
            if self._engine == "tape" and "engine_refused" not in self._facts:
                warnings.warn(f"The loop evaluates this ray, because the tape cannot: {refused}.", stacklevel=2)
            self.records = self._refusals < PATIENCE
            self._note(engine_refused={"tape": str(refused)})
        return looped, result

    def _by_tape(self, ray: Ray, looped: Ray | LandscapeError) -> Tensor:
        losses = self._measured("tape", ray, self._replayed)
        self._refusals = 0
        if not self._compared and isinstance(looped, Ray) and losses.isfinite().any():
            self._compare(losses, ray, looped)
        return losses

    def _replayed(self, ray: Ray) -> Tensor:
        """Return the losses by one graph, or call by call."""
        assert isinstance(ray.objective, Tape)
        if self._facts.get("engine") == "tape":  # The first ray shows what it takes, and is checked.
            with ray.objective.rng_restored(), torch.no_grad():
                losses = self._graphs.losses(ray.objective, ray)
            if losses is not None:
                return losses
        return tape(ray)

    def check_graphs(self) -> None:
        """Check the graphs, for which it waits for the device."""
        self._graphs.check()

    def _compare(self, losses: Tensor, taped: Ray, looped: Ray) -> None:
        """Compare the losses with those of the loop.

        A constant part of the loss, which the loop does not know of, is left out.

        Raises:
            NoTapeError: They differ. No more updates are recorded.
        """
        try:
            self._detect_parameter_writes(looped)
            with self._limit("loop"):
                expected = loop(looped)
        except ProbeDeferred:
            return
        # Code of the user's that cannot be called again, or takes too much memory, which the tape does not need.
        except Exception:
            self._compared = True
            return
        self._compared = True
        if not _agree(losses - taped.objective.training_loss(), expected - looped.objective.training_loss(), looped):
            self._refusals = PATIENCE
            raise NoTapeError(f"it gives the losses {losses.tolist()}, and the loop {expected.tolist()}")

    def _by_loop(self, ray: Ray) -> Tensor:
        self._detect_parameter_writes(ray)
        return self._measured("loop", ray, loop if self._facts.get("engine") == "loop" else checked_loop)

    def _gradients_by_loop(self, ray: Ray, start: Parameters | None) -> RayGradients:
        self._detect_parameter_writes(ray)
        try:
            return self._measured("loop", ray, partial(gradients_along, start=start))
        except (ProbeDeferred, LandscapeError):
            raise
        except RuntimeError as error:
            raise LandscapeError(
                f"The loss cannot be differentiated along the ray ({error}). Leave out gradients=True; or if it is "
                "checkpointing that forbids it, use torch.utils.checkpoint with use_reentrant=False."
            ) from error

    def _measured(self, name: str, ray: Ray, evaluate: Callable[[Ray], R]) -> R:
        """Evaluate the ray, and measure memory of a new engine."""
        if self._facts.get("engine") == name:
            return evaluate(ray)
        held = ray.objective.bytes_held() if isinstance(ray.objective, Tape) else 0
        with self._limit(name, held) as memory:
            result = evaluate(ray)
        self._note(engine=name, peak_memory=memory.peak + held)
        return result

    @contextmanager
    def _limit(self, name: str, held: int = 0) -> Iterator[PeakMemory]:
        """Measure the memory of the body, and bound it.

        Args:
            name: Name of the engine.
            held: Bytes that are held already.

        Raises:
            NoTapeError: The body holds more; it is of the tape.
            LandscapeError: The same, of the loop.
        """
        memory = PeakMemory(None if self._max_memory is None else self._max_memory - held)
        try:
            with memory:
                yield memory
        except MemoryLimitError as error:
            reason = f"a ray takes {memory.peak + held:,} bytes or more by the {name}"
            if name == "tape":
                raise NoTapeError(reason) from error
            raise LandscapeError(
                f"max_memory={self._max_memory}: {reason}. Allow more, or probe smaller batches."
            ) from error

    def _note(self, **facts: Any) -> None:
        if any(self._facts.get(name) != value for name, value in facts.items()):
            self._facts |= facts
            self._update_metadata(**facts)

    def _detect_parameter_writes(self, ray: Ray) -> None:
        """Detect forward passes that write to parameters.

        Only the first rays of the loop are checked.

        Raises:
            ProbeDeferred: A forward pass writes to parameters that the ray does not move. They are restored; later
                forward passes of the probe write to copies.
        """
        # Writes to gathered parameters are not kept.
        if not self._write_checks_left or ray.objective.space.is_sharded:
            return
        self._write_checks_left -= 1
        along, loss_module = ParametersAlongRay(ray), ray.objective.loss_module
        known = len(loss_module.traits.written_parameters)
        detecting = loss_module.detect_writes(ray.direction)
        with self._limit("loop"), detecting, torch.no_grad(), ray.objective.rng_restored():
            for term in ray.objective.terms:  # pyright: ignore[reportAttributeAccessIssue]
                term.losses(along.point, along.moves(ray.step_sizes[:1]))
        if len(loss_module.traits.written_parameters) > known:
            raise ProbeDeferred("The forward pass writes to parameters that are not trained; from now on, to copies.")


def _agree(losses: Tensor, expected: Tensor, ray: Ray) -> bool:
    """Return True if two engines agree.

    At the nearest point they may differ by rounding, elsewhere by 1 %, as rounding may grow.
    """
    nearest = min(range(len(ray.step_sizes)), key=lambda k: abs(ray.step_sizes[k]))
    size = ray.objective.training_loss().abs().item()
    near = 1e-2 if ray.objective.reduced_precision() else 3e-5 if losses.dtype is torch.float32 else 1e-10
    return bool(losses[nearest].isclose(expected[nearest], rtol=near, atol=near * size, equal_nan=True)) and (
        torch.allclose(losses, expected, rtol=1e-2, atol=1e-2 * size, equal_nan=True)
    )
