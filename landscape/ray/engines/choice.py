"""Which engine evaluates the rays of a run: found out on its first probes, by trying."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from landscape.errors import LandscapeError, ProbeDeferred
from landscape.ray.engines.loop import loop
from landscape.ray.engines.registry import ENGINES, OPT_IN, SHARING, Engine, evaluate, refusal
from landscape.ray.engines.stacked import Stacked
from landscape.ray.gradients import RayGradients, gradients_along
from landscape.ray.peak_memory import PeakMemory
from landscape.ray.ray import Ray

ROUNDS = 3
"""Timed rounds in which the candidates take turns."""


class EngineChoice:
    """Evaluates rays; on the first ones it compares the engines with the loop and, for ``"auto"``, races them.

    Args:
        engine: ``"auto"`` or a name of ``ENGINES``.
        max_memory: Bytes that a ray may hold at its peak. Without it, the stacked engine alone is bounded: by half of
            what is free on a GPU, by 1 GiB on a CPU.
        note: Takes what was found out, as facts of the run.
    """

    def __init__(self, engine: str, max_memory: int | None, note: Callable[..., None]) -> None:
        self.asked = engine
        self.max_memory = max_memory
        self._note = note
        self._compared = False
        self._engines: dict[str, Engine] = {"loop": loop}
        self._seconds: dict[str, list[float]] = {}
        self._refused: dict[str, str] = {}
        self._peaks: dict[str, int] = {}

    def losses(self, ray: Ray) -> Tensor:
        """The K losses of the ray.

        Raises:
            LandscapeError: Not even the loop stays below ``max_memory``.
        """
        if not self._compared:
            return self._compare(ray)
        return self._race(ray) if len(self._engines) > 1 else self._evaluate(ray)

    def gradients(self, ray: Ray) -> RayGradients:
        """Losses and gradients along the ray, of the mean over the ranks, for which there is the loop alone.

        Raises:
            LandscapeError: It does not stay below ``max_memory``.
        """
        if self._compared:
            return gradients_along(ray)
        try:
            with PeakMemory() as meter:
                measured = gradients_along(ray)
        except RuntimeError as error:
            raise LandscapeError(
                f"The loss cannot be differentiated along the ray ({error}). Leave out gradients=True; or if it is "
                "checkpointing that forbids it, use torch.utils.checkpoint with use_reentrant=False."
            ) from error
        self._allow("loop", meter.peak)
        self._compared = True
        self._settle("loop", ray)
        return measured

    def state_dict(self) -> dict[str, Any]:
        """What was found out so far."""
        return {
            "asked": self.asked,
            "compared": self._compared,
            "chunks": {name: getattr(engine, "chunk", None) for name, engine in self._engines.items()},
            "seconds": {name: list(seconds) for name, seconds in self._seconds.items()},
            "refused": dict(self._refused),
            "peaks": dict(self._peaks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the engines that are left, unless another engine is asked for now."""
        if state["asked"] != self.asked:
            return
        self._compared, self._peaks = state["compared"], dict(state["peaks"])
        self._seconds, self._refused = {n: list(s) for n, s in state["seconds"].items()}, dict(state["refused"])
        self._engines = {name: ENGINES[name]() for name in state["chunks"]}
        for name, engine in self._engines.items():
            if isinstance(engine, Stacked):
                engine.chunk = state["chunks"][name]
        if self._compared and len(self._engines) == 1:
            self._tell()

    def _evaluate(self, ray: Ray) -> Tensor:
        """By the engine that was chosen; the model's code may have taken a turn that it does not follow."""
        (name,) = self._engines
        try:
            return evaluate(self._engines[name], ray)
        except ProbeDeferred:
            raise
        except Exception as error:
            if name == "loop":
                raise
            losses = evaluate(loop, ray)  # an error of the user's own comes again
            self._refuse(name, error)
            warnings.warn(self._refused[name], stacklevel=2)
            self._settle("loop", ray)
            return losses

    def _compare(self, ray: Ray) -> Tensor:
        """Every engine once, beside the loop and with an eye on memory; a ray that is not finite says nothing."""
        with PeakMemory() as meter:
            expected = evaluate(loop, ray)
        self._allow("loop", meter.peak)
        if expected.isfinite().any():
            self._compared = True
            for name, engine in self._candidates(ray).items():
                self._try(name, engine, ray, expected)
            if self.asked != "auto":
                self._settle(next(reversed(self._engines)), ray)
            elif len(self._engines) == 1:
                self._settle("loop", ray)
        return expected

    def _candidates(self, ray: Ray) -> dict[str, Engine]:
        if self.asked != "auto":
            return {} if self.asked == "loop" else {self.asked: ENGINES[self.asked]()}
        convolutions = any(tensor.dim() in (4, 5) for tensor in ray.direction.values())
        pointless = {"loop", *OPT_IN} if convolutions else {"loop", "channels_last", *OPT_IN}
        return {name: make() for name, make in ENGINES.items() if name not in pointless}

    def _try(self, name: str, engine: Engine, ray: Ray, expected: Tensor) -> None:
        if isinstance(engine, Stacked):
            free = torch.cuda.mem_get_info(expected.device)[0] // 2 if expected.is_cuda else 1 << 30
            engine.chunk = max(1, min(len(ray.step_sizes), (self.max_memory or free) // self._peaks["loop"]))
        try:
            self._peaks[name] = self._peak(name, engine, ray, expected)
            self._engines[name] = engine
        except Exception as error:
            self._refuse(name, error)
            if self.asked == name:
                warnings.warn(self._refused[name], stacklevel=2)

    def _peak(self, name: str, engine: Engine, ray: Ray, expected: Tensor) -> int:
        """The most bytes that the engine holds; a RuntimeError if these are too many, or it is wrong."""
        meter = PeakMemory()
        # Nothing is compiled under a meter.
        with nullcontext() if name in OPT_IN else meter:
            losses = evaluate(engine, ray)
        if not _agree(losses, expected, ray):
            raise RuntimeError("it gives other losses than the loop")
        if self.max_memory is None or meter.peak <= self.max_memory:
            return meter.peak
        if isinstance(engine, Stacked) and engine.chunk and engine.chunk > 1:
            engine.chunk //= 2
            return self._peak(name, engine, ray, expected)
        raise RuntimeError(f"it takes {meter.peak:,} bytes, and max_memory={self.max_memory:,}")

    def _race(self, ray: Ray) -> Tensor:
        """Every candidate once more, on the clock; slow ones are not asked twice, and after some rounds one is left."""
        names = list(self._engines)
        turn = len(self._seconds.get("loop", ())) % len(names)
        results = {}
        for name in names[turn:] + names[:turn]:
            started = self._now(ray)
            try:
                results[name] = evaluate(self._engines[name], ray)
            except Exception as error:  # as when the number of points has changed
                if name == "loop":
                    raise
                self._refuse(name, error)
                names.remove(name)
            else:
                self._seconds.setdefault(name, []).append(self._now(ray) - started)
        medians = {name: median(self._seconds[name]) for name in names}
        fastest = min(medians, key=lambda name: medians[name])
        kept = [name for name in names if name == "loop" or medians[name] < 2 * medians[fastest]]
        if len(kept) == 1 or len(self._seconds["loop"]) == ROUNDS:
            self._settle(fastest, ray)
        else:
            self._engines = {name: self._engines[name] for name in kept}
        return results["loop"]

    def _settle(self, name: str, ray: Ray) -> None:
        if name not in SHARING:
            for term in ray.objective.terms:
                term.state.loss_module.traits.shared.clear()  # nobody needs to listen to these layers any more
        self._engines = {name: self._engines.get(name, loop)}
        self._tell()

    def _tell(self) -> None:
        """Note which engine was chosen, and why."""
        (name,) = self._engines
        seconds = {name: median(seconds) for name, seconds in self._seconds.items()}
        self._note(engine=name, engine_seconds=seconds, engine_refused=self._refused, peak_memory=self._peaks[name])

    def _allow(self, name: str, peak: int) -> None:
        self._peaks[name] = peak
        if self.max_memory is not None and peak > self.max_memory:
            raise LandscapeError(
                f"max_memory={self.max_memory}: a single point of the ray takes {peak:,} bytes; allow more, or probe "
                "smaller batches."
            )

    def _refuse(self, name: str, error: Exception) -> None:
        self._refused[name] = refusal(name, error)

    @staticmethod
    def _now(ray: Ray) -> float:
        for device in ray.objective.terms[0].state.random.accelerators:
            torch.get_device_module(device).synchronize(device)
        return time.perf_counter()


def _agree(losses: Tensor, expected: Tensor, ray: Ray) -> bool:
    """At the nearest point but for rounding, and to one percent elsewhere, where rounding may grow."""
    nearest = min(range(len(ray.step_sizes)), key=lambda k: abs(ray.step_sizes[k]))
    size = ray.objective.training_loss().abs().item()
    near = 1e-2 if ray.objective.reduced_precision() else 3e-5 if losses.dtype is torch.float32 else 1e-10
    return bool(losses[nearest].isclose(expected[nearest], rtol=near, atol=near * size, equal_nan=True)) and (
        torch.allclose(losses, expected, rtol=1e-2, atol=1e-2 * size, equal_nan=True)
    )
