"""Attaches to a training run and records, before each update, the losses along the ray that the update follows."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from landscape.arguments import check_arguments, described
from landscape.capture import OBSERVE, Capture, NotYetError, replaying
from landscape.checks import FirstChecks
from landscape.choice import EngineChoice
from landscape.errors import UserError
from landscape.gradients import inner, norm
from landscape.layers import Hook
from landscape.ranks import inside
from landscape.ray import checked_step_sizes
from landscape.schedule import Schedule
from landscape.state import Parameters
from landscape.trace import NoTrace, TraceWriter
from landscape.update import Update, fetch
from landscape.walk import Ray

StepSizes = Sequence[float] | Callable[[int], Sequence[float]]


class LandscapeProbe:
    """Records the losses at ``theta - eta * direction`` around every optimizer step of the user's own loop.

    The loop stays as it is. Hooks see the batch and the loss as they pass; just before ``optimizer.step()`` takes
    effect the loss of the same batch, in the same mode and with the same dropout masks, is measured at each step size
    (Santurkar et al. 2018, section 3.1; Dimitriou & Arandjelovic 2020, section 3.1). Parameters, gradients, buffers,
    optimizer state and random streams are left bit for bit as they would be without the probe.

    Where several processes train the model by ``DistributedDataParallel``, every one of them makes a probe of what that
    returns. Measured is then the mean over the processes of their losses, whose gradient it is that they average; the
    first process writes the trace. ::

        with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1, 0.2, 0.4], trace="traces/run") as probe:
            ...  # the training loop

    Args:
        model: The model that is trained; under data parallelism what ``DistributedDataParallel(model)`` returns.
        optimizer: The optimizer whose steps are probed; only the parameters it holds are moved.
        criterion: The module whose call ``criterion(model(inputs), targets)`` is the training loss. All such losses
            that were differentiated since the last step belong to the objective, so gradient accumulation is measured
            as trained. Without it, hand each loss to :meth:`observe`.
        step_sizes: The step sizes eta, or a function of the step that gives them.
        relative: Whether step sizes are multiples of the current learning rate.
        every: Probe each n-th update, the first included.
        direction: ``"gradient"``, the gradient as the optimizer gets it, or ``"update"``, what the optimizer makes of
            it, scaled so that a step size equal to the learning rate (of the first parameter group) is the update.
        trace: Folder of the trace; without it rows are kept in memory, for :meth:`frame`, in every process.
        facts: What else is known about the run (norm, seed, batch size, ...), for ``run.json`` and as columns.
        overwrite: Whether a trace that is already in the folder is replaced.
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
        UserError: An argument out of range. At the first probed step, also: no loss could be captured, or the one
            captured is not what was differentiated; the message says how to hand it over.
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
        steps_per_epoch: int | None = None,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        engine: str = "auto",
        max_memory: int | None = None,
        gradients: bool = False,
        overhead: float | None = None,
    ) -> None:
        options = {"every": every, "direction": direction, "steps_per_epoch": steps_per_epoch, "overhead": overhead}
        options |= {"grad_scaler": grad_scaler, "engine": engine, "max_memory": max_memory, "gradients": gradients}
        check_arguments(model, optimizer, criterion, options)
        step_sizes = step_sizes if callable(step_sizes) else checked_step_sizes(step_sizes)
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self._inner, self._ranks = inside(model)
        self.step_sizes, self.relative, self.every, self.direction = step_sizes, relative, every, direction
        self.steps_per_epoch, self.gradients = steps_per_epoch, gradients
        self.overhead, self.max_memory = overhead, max_memory
        self.step = 0
        self._capture = Capture(self._inner, criterion, optimizer, self._due, grad_scaler)
        self._measuring, self._seconds = False, 0.0
        known, here = self._facts() | dict(facts or {}), self._ranks.is_writer or trace is None
        self.trace = self._ranks.agree(
            lambda: TraceWriter(trace, known, overwrite=overwrite, resolve=fetch) if here else NoTrace(),
            alike=lambda _: (every, direction, gradients, overhead),
        )
        self._pending: Update | None = None
        self._checks = FirstChecks(criterion is None, self._ranks)
        self._choice = EngineChoice(engine, max_memory, self.trace.note)
        self._schedule = Schedule(every, overhead, _device(model), self._ranks.decide)
        self._last: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> Self:
        """Start to listen; as a context manager the probe does this by itself."""
        if not self._handles:
            self._capture.attach()
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]
            if self._inner is not self.model:
                self._handles += [
                    self.model.register_forward_pre_hook(Hook(self._before_wrapper)),
                    # It may hand on copies of the outputs, and these are what the criterion gets.
                    self.model.register_forward_hook(Hook(self._capture._after_model)),
                ]
            self._schedule.start()
        return self

    def detach(self) -> None:
        """Stop listening and write what is pending; what was recorded stays available."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._capture.detach()
        self.trace.note(**self._schedule.facts())
        self.trace.close()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute a loss that is not ``criterion(model(inputs), targets)``, and let the probe know of it.

        Call it where the loop computes its loss, once for each backward pass. ::

            loss = probe.observe(lambda model, x, y: F.cross_entropy(model(x), y) + penalty(model), x, y)
            loss.backward()

        Args:
            closure: ``closure(model, *args, **kwargs)`` gives the loss. It is called again for each step size, without
                gradients: one that differentiates (a gradient penalty) needs ``torch.enable_grad()`` inside.
            args: Whatever the loop rebinds before its optimizer steps, such as the batch.
            kwargs: Likewise.

        Returns:
            What the closure gives, to be differentiated.
        """

        def through(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            # The loop's own call goes through DistributedDataParallel, so that gradients are averaged.
            return closure(model if self._measuring else self.model, *args, **kwargs)

        return self._capture.observe(through, *args, **kwargs)

    def last(self) -> dict[str, Any]:
        """The row of the last probed update, with plain numbers; waits for the device. Empty before the first."""
        return fetch([self._last])[0] if self._last else {}

    def frame(self) -> pd.DataFrame:
        """All rows so far: the run's scalar facts, and the columns of ``landscape.columns.UPDATES``.

        With a ``trace`` folder under data parallelism, only the process that writes it has rows.
        """
        return self.trace.frame()

    def _due(self) -> bool:
        return bool(self._handles) and self._schedule.due

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_update()
            return None
        # step(closure) computes the gradient itself, maybe several times: the first is that of this update.
        pending = [self._before_update]

        def measured() -> Any:
            loss = closure()
            while pending:
                pending.pop()()
            return loss

        return (args[0], measured), {name: value for name, value in kwargs.items() if name != "closure"}

    def _before_update(self) -> None:
        if self._due():
            with self._schedule.probing():
                update = Update.of(self._inner, self.optimizer, self._capture.take())
                if self.direction == "gradient":
                    self._measure(update, update.gradient)
                else:
                    self._pending = update.snapshot()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._pending is not None:
            update, self._pending = self._pending, None
            with self._schedule.probing():
                self._measure(update, update.made(self._inner))
        self._capture.take()  # what a step(closure) has computed after the first time
        self._schedule.advance(self._capture.take_seconds())
        self.step += 1

    def _measure(self, update: Update, direction: Parameters) -> None:
        self._measuring = True
        try:
            row = self._ranks.mean(lambda: self._row(update, direction))
        except Exception as error:  # a training run that has begun well shall not end because of its probe
            if not self._last and not isinstance(error, NotYetError):
                raise
            warnings.warn(f"Step {self.step} is not in the trace: {error}", stacklevel=2)
            return
        finally:
            self._measuring = False
        self._last = row | {"seconds": self._seconds}
        self.trace.append(self._last)

    def _row(self, update: Update, direction: Parameters) -> dict[str, Any]:
        """The row of the update by this process's own losses."""
        started = time.perf_counter()
        step_sizes = self._step_sizes(update.lr)
        if not update.objective.terms:
            raise UserError(f"No loss was captured since the last step. {OBSERVE}.")
        with replaying():
            ray = update.ray(direction, step_sizes)
            self._checks.look_for_writes(ray)
            if facts := self._checks.check(update.objective, update.origin, update.gradient):
                self.trace.note(mode="training" if self.model.training else "evaluation", checks=facts)
                started = time.perf_counter()
            measured = self._evaluate(ray, update)
        self._seconds = time.perf_counter() - started
        epoch = self.step / self.steps_per_epoch if self.steps_per_epoch else math.nan
        return {"step": self.step, "epoch": epoch, "lr": update.lr, "step_sizes": step_sizes} | measured

    def _evaluate(self, ray: Ray, update: Update) -> dict[str, Tensor]:
        """The columns that are computed on the device, still there."""
        size = norm(list(update.gradient.values()))
        measured = {"loss": update.objective.recorded(), "grad_norm": size, "direction_norm": size, "slope": size**2}
        if ray.direction is not update.gradient:
            direction = list(ray.direction.values())
            slope = inner([update.gradient[name] for name in ray.direction], direction)
            measured |= {"direction_norm": norm(direction), "slope": slope}
        if self.gradients:
            there = self._choice.gradients(ray, self._ranks)
            return measured | {"losses": there.losses, "slope": there.slope, "gradient_distances": there.distances}
        return measured | {"losses": self._choice.losses(ray)}

    def _step_sizes(self, lr: float) -> list[float]:
        step_sizes = self.step_sizes(self.step) if callable(self.step_sizes) else self.step_sizes
        return [eta * lr if self.relative else eta for eta in checked_step_sizes(step_sizes)]

    def _before_wrapper(self, model: nn.Module, args: Any) -> None:
        if self._measuring:
            raise UserError(
                "An observed loss called the DistributedDataParallel model, whose collectives are those of training; "
                "call the model that the closure is given: probe.observe(lambda model, x: ...)."
            )

    def _facts(self) -> dict[str, Any]:
        return described(self._inner, self.optimizer, self.criterion) | {
            "ranks": self._ranks.size,
            "direction": self.direction,
            "probe_lrs": "a function of the step" if callable(self.step_sizes) else list(self.step_sizes),
            "relative": self.relative,
            "every": self.every,
            "overhead": self.overhead,
            "gradients": self.gradients,
            "max_memory": self.max_memory,
            "steps_per_epoch": self.steps_per_epoch,
            "threads": torch.get_num_threads(),
        }


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
