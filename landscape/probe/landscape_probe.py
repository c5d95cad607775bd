"""Attaches to a training run and records, before each update, the losses along the ray that the update follows."""

import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from landscape.distributed.group import RankFailedError
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.probe.capture import Capture
from landscape.probe.checks import CaptureChecks
from landscape.probe.options import check_arguments, check_state, probe_metadata, resume_signature, unwrapped
from landscape.probe.passes import Captured
from landscape.probe.schedule import ProbeSchedule
from landscape.probe.update import Update, to_host
from landscape.ray.engines.choice import EngineChoice
from landscape.ray.ray import Ray, checked_step_sizes
from landscape.ray.snapshot import ModuleContents, Parameters
from landscape.traces.writer import NullWriter, TraceWriter


def after_first(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The closure, and ``then`` after its first call."""
    pending = [then]

    def followed() -> Any:
        result = closure()
        while pending:
            pending.pop()()
        return result

    return followed


StepSizes = Sequence[float] | Callable[[int], Sequence[float]]


class LandscapeProbe:
    """Records the losses at ``theta - eta * direction`` around every optimizer step of the user's own loop.

    The loop stays as it is. Hooks see the batch and the loss as they pass; just before ``optimizer.step()`` takes
    effect the loss of the same batch, in the same mode and with the same dropout masks, is measured at each step size
    (Santurkar et al. 2018, section 3.1; Dimitriou & Arandjelovic 2020, section 3.1). Parameters, gradients, buffers,
    optimizer state and random streams are left bit for bit as they would be without the probe.

    Where several processes train the model by ``DistributedDataParallel``, every one of them makes a probe of what that
    returns, or of what ``torch.distributed.fsdp.fully_shard`` has spread over them. Measured is then the mean over the
    processes of their losses, whose gradient it is that they average; the first process writes the trace. ::

        with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1, 0.2, 0.4], trace="traces/run") as probe:
            ...  # the training loop

    Args:
        model: The model that is trained; under data parallelism what ``DistributedDataParallel(model)`` returns.
        optimizer: The optimizer whose steps are probed; only the parameters it holds are moved.
        criterion: The module whose call ``criterion(model(inputs), targets)`` is the training loss. All such losses
            whose gradient is in ``.grad`` when the optimizer steps belong to the objective, with their weights, so
            gradient accumulation is measured as trained. Without it, hand each loss to :meth:`observe`.
        step_sizes: The step sizes eta, or a function of the step that gives them.
        relative: Whether step sizes are multiples of the current learning rate.
        every: Probe each n-th update, the first included.
        direction: ``"gradient"``, the gradient as the optimizer gets it, or ``"update"``, what the optimizer makes of
            it, scaled so that a step size equal to the learning rate (of the first parameter group) is the update.
        trace: Folder of the trace; without it rows are kept in memory, for :meth:`frame`, in every process.
        facts: What else is known about the run (norm, seed, batch size, ...), for ``run.json`` and as columns.
        overwrite: Whether a trace that is already in the folder is replaced.
        resume: Whether a trace that is already in the folder goes on: from where :meth:`load_state_dict` says, or from
            the beginning where nothing is loaded before the first update.
        steps_per_epoch: Updates in an epoch; gives the ``epoch`` column.
        grad_scaler: The loss scaler, where one is used: recorded losses are without its scale.
        engine: How rays are evaluated; see :func:`landscape.ray_losses`. ``"auto"`` times the engines on the first
            probes and takes the fastest; ``run.json`` says which, and why others were refused.
        max_memory: Bytes that a ray may hold at its peak, beside what training holds.
        gradients: Whether to compute the gradient at each point too, for gradient predictiveness and the effective
            beta-smoothness: K + 1 forward and backward passes, by the plain loop.
        overhead: Share of the training time that probes may cost, such as 0.1; updates to probe are chosen by it, under
            data parallelism by the clock of the first process.

    Raises:
        LandscapeError: An argument out of range. At the first probed step, also: no loss could be captured, or what was
            differentiated is no weighted sum of the captured losses; the message says how to hand it over. Where that
            happens later, the update is left out with a warning. Later: a process has died.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module | None = None,
        *,
        step_sizes: StepSizes,
        relative: bool = False,
        every: int = 1,
        direction: str = "gradient",
        trace: str | Path | None = None,
        facts: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        steps_per_epoch: int | None = None,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        engine: str = "auto",
        max_memory: int | None = None,
        gradients: bool = False,
        overhead: float | None = None,
    ) -> None:
        options = {"every": every, "direction": direction, "steps_per_epoch": steps_per_epoch, "overhead": overhead}
        options |= {"grad_scaler": grad_scaler, "engine": engine, "max_memory": max_memory}
        options |= {"gradients": gradients, "relative": relative}
        optimizer = unwrapped(optimizer)
        check_arguments(model, optimizer, criterion, options)
        options["step_sizes"] = step_sizes = step_sizes if callable(step_sizes) else checked_step_sizes(step_sizes)
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.step_sizes, self.relative, self.every, self.direction = step_sizes, relative, every, direction
        self.steps_per_epoch, self.gradients = steps_per_epoch, gradients
        self.overhead, self.max_memory = overhead, max_memory
        self.step = 0
        self._capture = Capture(model, criterion, optimizer, self._due, grad_scaler, self._come_last)
        self._inner, self._ranks = self._capture.model, self._capture.ranks
        self._seconds = 0.0
        known = probe_metadata(self._inner, optimizer, criterion, options) | {
            "ranks": self._ranks.size,
            **(facts or {}),
        }
        here, earlier = self._ranks.is_writer or trace is None, {"overwrite": overwrite, "resume": resume}
        self.trace = self._ranks.run_on_all(
            lambda: TraceWriter(trace, known, **earlier, resolve=to_host) if here else NullWriter(),
            alike=lambda _: (every, direction, gradients, overhead),
        )
        self._starts_anew = resume
        self._pending: Update | None = None
        self._checks = CaptureChecks(self._ranks)
        self._choice = EngineChoice(engine, max_memory, self.trace.update_metadata)
        self._schedule = ProbeSchedule(every, overhead, _device(model), self._ranks.broadcast_bool)
        parts = {"capture": self._capture, "checks": self._checks, "choice": self._choice, "schedule": self._schedule}
        self._parts = parts
        self._measured: dict[str, Any] = {}
        """The row of the update that is being made."""
        self._last: dict[str, Any] = {}
        self._depth = 0
        """Number of steps within each other: hooks are called again where a subclass calls super().step()."""
        self._step_frame: FrameType | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> Self:
        """Start to listen; as a context manager the probe does this by itself."""
        if not self._handles:
            self._capture.attach()
            after: Any = torch.compiler.disable(self._after_step)
            self._handles = [self.optimizer.register_step_post_hook(after), self._hooked()]
            self._schedule.start()
        return self

    def detach(self) -> None:
        """Stop listening and write what is pending; what was recorded stays available."""
        self._capture.passes.tell_of_waste()
        self._stop()
        self.trace.close()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._capture.detach()
        self.trace.update_metadata(**self._schedule.facts())

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._capture.passes.tell_of_waste()
        self._stop()
        self.trace.__exit__(kind, error, traceback)

    def state_dict(self) -> dict[str, Any]:
        """Where the probe is, for a checkpoint beside the model's and the optimizer's; writes the rows so far.

        Take it between two updates. ``torch.load(..., weights_only=True)`` reads it. Under data parallelism each
        process has its own; that of the first serves all where engines are named.
        """
        self.trace.flush()
        own = {name: part.state_dict() for name, part in self._parts.items()}
        written, about = dict(self.trace.written), resume_signature(self, self._inner)
        return {"step": self.step, "written": written, "last": self.last(), "about": about, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: forget the rows recorded after it, and know what was found out before it.

        With the model, the optimizer and the random streams as they were then, the rows to come are on a CPU bit for
        bit those of a run that never stopped, as long as the number of threads and the engine are the same too.

        Raises:
            LandscapeError: It is not the state of such a probe, there were updates already, or the trace (``trace=``, with
                ``resume=True``) has fewer rows than were written then.
        """
        check_state(state, resume_signature(self, self._inner), list(self._parts))
        if self.step:
            raise LandscapeError(f"{self.step} updates were made already; load the probe's state before the first one.")
        self._rewind(state["written"])
        self.step, self._last = state["step"], dict(state["last"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute a loss that is not ``criterion(model(inputs), targets)``, and let the probe know of it.

        Call it where the loop computes its loss, once for each backward pass. ::

            loss = probe.observe(lambda model, x, y: F.cross_entropy(model(x), y) + penalty(model), x, y)
            loss.backward()

        Args:
            closure: ``closure(model, *args, **kwargs)`` gives all of the loss that is differentiated, up to a factor.
                It is called again for each step size, without gradients, unless it computes derivatives itself (a
                gradient penalty). Other modules that it calls are put back like the model.
            args: Whatever the loop rebinds before its optimizer steps, such as the batch.
            kwargs: Likewise.

        Returns:
            What the closure gives, to be differentiated.
        """
        return self._capture.observe(closure, *args, **kwargs)

    def last(self) -> dict[str, Any]:
        """The row of the last probed update, with plain numbers; waits for the device. Empty before the first."""
        return to_host([self._last])[0] if self._last else {}

    def frame(self) -> pd.DataFrame:
        """All rows so far: the run's scalar facts, and the columns of ``landscape.traces.schema.UPDATES``.

        With a ``trace`` folder under data parallelism, only the process that writes it has rows.
        """
        return self.trace.frame()

    def _rewind(self, written: Mapping[str, int]) -> None:
        if not written and (rows := self.trace.written["updates"]):
            warnings.warn(f"There is no state to go on from: {rows} recorded updates are replaced.", stacklevel=2)
        self._ranks.run_on_all(lambda: self.trace.truncate(written))
        self._starts_anew = False

    def _due(self) -> bool:
        return bool(self._handles) and self._schedule.due

    def _hooked(self) -> RemovableHandle:
        before: Any = torch.compiler.disable(self._before_step)
        return self.optimizer.register_step_pre_hook(before)

    def _come_last(self) -> None:
        """Hook the step anew where others did so since, because they may change the gradient."""
        if self._is_followed():
            self._handles.pop().remove()
            self._handles.append(self._hooked())

    def _is_followed(self) -> bool:
        """Whether the optimizer calls hooks behind that of this probe, and of others."""
        hooks = list(self.optimizer._optimizer_step_pre_hooks.values())  # torch has no public way to ask
        owners = [getattr(inspect.unwrap(hook), "__self__", None) for hook in hooks]
        return self in owners and not all(isinstance(one, LandscapeProbe) for one in owners[owners.index(self) :])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._depth and all(frame is not self._step_frame for frame in _callers()):
            self._depth = 0  # the step before has failed
        self._depth += 1
        if self._depth > 1:
            return None
        self._measured, self._pending = {}, None
        self._step_frame = next(_callers())
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_update(lambda: self._update(self._capture.pop_terms()))
            return None
        # step(closure) computes the gradient itself, maybe several times: the first is that of this update. Under
        # accumulation it adds to what is there. Where it is computed at other parameters, as in sharpness-aware
        # minimization, the gradient of the update is the one from before.
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        versions, before = self._capture.versions(), None
        if self._due() and self._capture.passes.has_terms():
            before = self._update(self._capture.peek()).snapshot()

        def measure() -> None:
            has_moved = self._capture.versions() != versions
            self._before_update(
                lambda: before if before and has_moved else self._update(self._capture.pop_terms(versions))
            )

        return (args[0], after_first(closure, measure)), rest

    def _update(self, captured: Captured) -> Update:
        return Update.from_optimizer(self._capture.scene, self.optimizer, captured)

    def _before_update(self, make: Callable[[], Update]) -> None:
        if self._starts_anew:
            self._rewind({})
        if self._due():
            with self._schedule.probing():
                update = make()
                if self.direction == "gradient":
                    self._measure(update, update.gradient)
                else:
                    self._pending = update.snapshot()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth, self._step_frame = 0, None
        if self._pending is not None:
            update, self._pending = self._pending, None
            with self._schedule.probing():
                self._measure(update, update.actual_direction(self._capture.scene))
        if self._measured:  # not before: a step may fail
            self._last, self._measured = self._measured, {}
            self.trace.append(self._last)
        self._capture.step_made()
        self._schedule.advance(self._capture.pop_overhead_seconds())
        self.step += 1

    def _measure(self, update: Update, direction: Parameters) -> None:
        spread = self._capture.scene.shards is not None  # these change places all the time
        held = ModuleContents([] if spread else self._capture.scene.modules())
        try:
            row = self._ranks.all_mean(lambda: self._row(update, direction))
        except Exception as error:  # a training run that has begun well shall not end because of its probe
            begun = self._last and not isinstance(error, RankFailedError)
            if not begun and not isinstance(error, ProbeDeferred):
                raise
            warnings.warn(f"Step {self.step} is not in the trace: {error}", stacklevel=2)
            return
        finally:
            if names := held.restore():
                warnings.warn(f"Step {self.step}: what the model holds was put back: {names}.", stacklevel=2)
        self._measured = row | {"seconds": self._seconds}

    def _row(self, update: Update, direction: Parameters) -> dict[str, Any]:
        """The row of the update by this process's own losses."""
        started = time.perf_counter()
        ray = self._ranks.run_on_all(lambda: self._ray(update, direction), alike=Ray.together)
        with self._capture.measuring():
            self._checks.detect_parameter_writes(ray)
            if facts := self._checks.check(self.step, update):
                self.trace.update_metadata(mode="training" if self.model.training else "evaluation", checks=facts)
                started = time.perf_counter()
            measured = {"step_sizes": ray.step_sizes} | update.row_values(direction) | self._along(ray)
            if facts := self._checks.doubt(self.step, update, measured):
                self.trace.update_metadata(checks=facts)
        self._seconds = time.perf_counter() - started
        epoch = self.step / self.steps_per_epoch if self.steps_per_epoch else math.nan
        return {"step": self.step, "epoch": epoch, "lr": update.lr} | measured

    def _along(self, ray: Ray) -> dict[str, Tensor]:
        if not self.gradients:
            return {"losses": self._choice.losses(ray)}
        there = self._choice.gradients(ray, self._ranks)
        return {"losses": there.losses, "slope": there.slope, "gradient_distances": there.distances}

    def _ray(self, update: Update, direction: Parameters) -> Ray:
        step_sizes = self.step_sizes(self.step) if callable(self.step_sizes) else self.step_sizes
        etas = [eta * update.lr if self.relative else eta for eta in checked_step_sizes(step_sizes)]
        if not update.objective.terms:
            raise self._capture.nothing()
        if problem := update.captured.problem:
            raise LandscapeError(problem)
        if not update.gradient:
            raise LandscapeError(
                "No parameter that the optimizer holds and that has a gradient is the model's. Give the probe the "
                "model that the optimizer trains."
            )
        if self._is_followed():
            raise ProbeDeferred("A step hook that was registered after the forward pass may change the gradient.")
        return update.ray(direction, etas)


def _callers() -> Iterator[FrameType]:
    """The frames around a hook that is called: that of the optimizer's step, and those that it was called from."""
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
            yield frame
        frame = frame.f_back


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
