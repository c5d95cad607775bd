"""The probe: hooks on a training loop that record, before each update, the losses along its ray."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import pandas as pd
import torch
from torch import Tensor, nn

from landscape.distributed.group import RankFailedError
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.probe.arguments import (
    check_arguments,
    check_state,
    probe_metadata,
    resume_signature,
    unwrap_optimizers,
)
from landscape.probe.capture import Capture
from landscape.probe.checks import CaptureChecks
from landscape.probe.critical import critical_points
from landscape.probe.live import LiveFigure
from landscape.probe.messages import CHANGED_GRADIENT, NO_COMMON_STEP
from landscape.probe.options import ProbeKeywords, ProbeOptions
from landscape.probe.passes import CapturedUpdate, gradient_versions
from landscape.probe.rows import RowQueue
from landscape.probe.schedule import ProbeSchedule
from landscape.probe.sinks import SinkQueue
from landscape.probe.step_hooks import (
    Closure,
    EntryReminder,
    StepHooks,
    call_after_first,
    find_grad_scaler,
    gradient_scale,
)
from landscape.probe.update import Update
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.evaluator import Evaluator
from landscape.ray.gradients import RayGradients
from landscape.ray.ray import Ray
from landscape.ray.snapshot import ModuleContents, Parameters
from landscape.traces.writer import NullWriter, TraceWriter


class LandscapeProbe:
    r"""Records the losses along the gradient before every optimizer step.

    The training loop stays as it is, and its loss can be anything that it differentiates. The probe records the calls
    of ATen functions that lead to the differentiated tensor. Just before ``optimizer.step()`` takes effect, it repeats
    those that depend on the parameters, which gives the loss :math:`L` of the same batch, in the same mode and with the
    same dropout masks, at

    .. math:: L(\theta - \eta_k g), \qquad k = 1, \dots, K,

    with the parameters :math:`\theta`, the gradient :math:`g` that the optimizer gets, and the step sizes
    :math:`\eta_k`. The smallest and the largest of the K losses are the band of that update (Santurkar et al. 2018,
    section 3.1; Dimitriou & Arandjelovic 2020, section 3.1). Parameters, gradients, buffers, optimizer state and RNG
    state are, bit for bit, what they are without the probe.

    Under ``DistributedDataParallel`` or ``fully_shard`` every process makes a probe of the wrapped model. Losses are
    then means over the processes, and the first process writes the trace.

    Args:
        model: The model that is trained; under data parallelism what ``DistributedDataParallel(model)`` returns.
        optimizer: The optimizer whose steps are probed; only the parameters it holds are moved. A list of optimizers
            that step together, such as Muon and AdamW, is one update, and one ray along the gradients of all.
        criterion: The module whose call ``criterion(model(inputs), targets)`` is the training loss, for training steps
            whose calls cannot be repeated (models compiled by ``torch.compile``, ``fully_shard``): there the probe
            calls model and criterion again at each point. If it is given, the first ray is evaluated both ways. For
            other losses, use `observe` to the same end.
        trace: Folder of the trace, or a URL such as ``s3://bucket/run``. Without it rows are kept in memory, for
            `frame`, in every process.
        facts: Facts about the run (norm, seed, batch size, ...), for ``run.json`` and as columns.
        overwrite: True replaces a trace that is in the folder.
        resume: True continues a trace that is in the folder, from where `load_state_dict` says, or from the beginning
            if nothing is loaded before the first update.
        grad_scaler: The loss scaler, if it is not a ``GradScaler`` that calls the optimizer, which the probe finds;
            recorded losses are without its scale.
        step_sizes: The K step sizes eta, or a function of the step that returns them. The default is
            (0.5, 1, 1.5, 2) times the learning rate: from half of the step that plain SGD takes to twice as far.
            Negative ones lie uphill; they give two-sided curvature and SAM sharpness, and do not widen the band.
        relative: True if step sizes are multiples of the current learning rate; with several parameter groups each
            parameter moves by its own rate.
        every: Probe every n-th update, the first included.
        direction: ``"gradient"``, the gradient as the optimizer gets it, or ``"update"``, the step that the optimizer
            takes (with momentum, Adam's scaling, ...), divided by the learning rate (of the first parameter group in
            which it is not 0), so that a step size equal to it is that step.
        steps_per_epoch: Updates in an epoch, for the column ``epoch``.
        engine: How rays are evaluated. ``"auto"`` repeats recorded calls, and calls the code of the loop again, by
            ``criterion`` or `observe`, where they cannot be repeated. ``"tape"`` does the same and warns. ``"loop"``
            records nothing. ``run.json`` holds which one evaluated the rays.
        max_memory: Most bytes that a ray, or a check of the first updates, may hold beside those of training.
        gradients: True computes the gradient at each point too, for gradient predictiveness and the effective
            beta-smoothness, by K forward and backward passes, and one more if the gradient at the parameters is not
            known.
        critical: True searches for the critical step, at which the loss is back, by at most 6 more points per update,
            which `measured` then reads. The host waits for each of them.
        overhead: Share of the training time that probes may cost, such as 0.1, which decides the updates to probe;
            under data parallelism by the clock of the first process.
        sinks: Functions of the scalars of a row (``step``, ``loss``, ``loss_min``, ``loss_max``, ``range``,
            ``lost_share``, ``lr``, ...), such as those of `landscape.integrations.sinks`. Rows reach them in other
            threads, when they are written; one that is slow misses rows, and one that fails gets no more. Under data
            parallelism the first process calls them.

    Raises:
        LandscapeError: An argument is out of range. At the first probed step: the update's calls cannot be repeated,
            and neither ``criterion`` nor `observe` gives its loss; or the loss that is measured is not the one that was
            differentiated. The message has the remedy. Later on such an update is skipped with a warning.
            RankFailedError: a process has died.

    Examples:
        >>> import torch
        >>> from landscape import LandscapeProbe
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with LandscapeProbe(model, optimizer) as probe:
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
        ...         loss.backward()
        ...         optimizer.step()
        >>> frame = probe.frame()
        >>> len(frame), frame.step_sizes[0].tolist()
        (5, [0.05, 0.1, 0.15000000000000002, 0.2])
        >>> bool((frame.loss_min <= frame.loss_max).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        criterion: nn.Module | None = None,
        *,
        trace: str | Path | None = None,
        facts: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        **options: Unpack[ProbeKeywords],
    ) -> None:
        self.optimizers = unwrap_optimizers(optimizer)
        self.options = ProbeOptions(**options)
        check_arguments(model, self.optimizers, criterion, grad_scaler, self.options)
        self.model, self.criterion = model, criterion
        self.step = 0
        """Number of updates so far."""
        self._hooks = StepHooks(self.optimizers, self._before_step, self._between_steps, self._after_steps)
        self._capture = Capture(model, criterion, self.optimizers, self._is_due, self._hooks, grad_scaler)
        self._inner, self._ranks = self._capture.model, self._capture.ranks
        self._seconds = 0.0
        self._rows = RowQueue(lambda: self._evaluator.check_graphs())
        metadata = probe_metadata(self._inner, self.optimizers, criterion, self.options)
        metadata |= {"ranks": self._ranks.size, **(facts or {})}
        self._sinks = SinkQueue(self.options.sinks if self._ranks.is_writer else ())
        writes = self._ranks.is_writer or trace is None  # rows in memory are kept by every process
        self.trace = self._ranks.run_on_all(
            lambda: (
                TraceWriter(trace, metadata, overwrite=overwrite, resume=resume, resolve=self._resolve)
                if writes
                else NullWriter()
            ),
            must_match=lambda _: [
                getattr(self.options, name) for name in ("every", "direction", "gradients", "critical", "overhead")
            ],
        )
        self._starts_over = resume
        """True until a state is loaded, or the rows that are there are dropped."""
        self._pending: Update | None = None
        self._checks = CaptureChecks(self._ranks, self.options.max_memory)
        self._evaluator = Evaluator(self.options.engine, self.options.max_memory, self.trace.update_metadata)
        self._schedule = ProbeSchedule(
            self.options.every, self.options.overhead, _device(model), self._ranks.broadcast_bool
        )
        self._parts = {
            "capture": self._capture,
            "checks": self._checks,
            "choice": self._evaluator,
            "schedule": self._schedule,
        }
        self._measured: dict[str, Any] = {}
        """Row of the update that the optimizers are making."""
        self._versions: dict[int, list[Any]] = {}
        """Versions of the measured gradients by the id of the optimizer, if there are several."""
        self._reminder = EntryReminder(self, self.optimizers)

    def live(self) -> Self:
        """Draw the losses in a notebook while the training runs.

        One small figure follows the rows, redrawn at most once a second by another thread; rows that wait on the
        device are fetched for it. Under data parallelism the first process draws.

        Returns:
            The probe, for ``with LandscapeProbe(model, optimizer).live() as probe:``.

        Raises:
            LandscapeError: This is no notebook.
        """
        if self._ranks.is_writer:
            self._sinks.add(LiveFigure())
            self._sinks.open()
        return self

    def attach(self) -> Self:
        """Register the hooks, as entering the context does."""
        if not self._hooks.attached:
            self._reminder.remove()
            self._capture.attach()
            self._hooks.attach()
            self._sinks.open()
            self._schedule.start()
            self._capture.begin_update(self._evaluator.records)
        return self

    def detach(self) -> None:
        """Remove the hooks and write pending rows.

        For a probe that was never entered it says that this is meant: its optimizer steps without a warning.
        """
        self._reminder.remove()
        self._capture.passes.warn_if_no_step()
        self._remove_hooks()
        try:
            self.trace.close()
        finally:
            self._sinks.close()

    def _remove_hooks(self) -> None:
        self._hooks.end_unfinished()
        self._hooks.detach()
        self._capture.detach()
        self.trace.update_metadata(**self._schedule.facts())

    def __repr__(self) -> str:
        """Return how far the probe is.

        As in ``LandscapeProbe(step 412, engine tape, 412 probed, last range 0.021)``. The call waits for the device.
        """
        row = self.last()
        points = zip(row.get("step_sizes", []), row.get("losses", []), strict=True)
        losses = [loss for eta, loss in points if eta >= 0] or row.get("losses", [])
        last = [f"last range {max(losses) - min(losses):.3g}"] if losses else []
        engine = [f"engine {self._evaluator.engine}"] if losses else []
        return f"LandscapeProbe({', '.join([f'step {self.step}', *engine, f'{self._schedule.probes} probed', *last])})"

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._capture.passes.warn_if_no_step()
        self._remove_hooks()
        try:
            self.trace.__exit__(kind, error, traceback)
        finally:
            self._sinks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, after writing pending rows.

        Call it between two updates. ``torch.load(..., weights_only=True)`` reads it. Under data parallelism each
        process has its own; that of the first one serves all.
        """
        self._hooks.end_unfinished()
        self.trace.flush()
        own = {name: part.state_dict() for name, part in self._parts.items()}
        signature = resume_signature(self.options, self._inner)
        return {"step": self.step, "written": dict(self.trace.written), "last": self.last(), "about": signature, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint: drop rows recorded after it.

        With the model, the optimizer and the RNG state as they were then, the next rows are, on a CPU, bit for bit
        those of an uninterrupted run if the number of threads and the engine are the same.

        Args:
            state: The return value of `state_dict`.

        Raises:
            LandscapeError: ``state`` is not the state of such a probe, updates were made already, or the trace
                (``trace=``, with ``resume=True``) has fewer rows than were written at the checkpoint.
        """
        check_state(state, resume_signature(self.options, self._inner), list(self._parts))
        if self.step:
            raise LandscapeError(
                f"step={self.step}: must be 0 when a state is loaded. Call load_state_dict before the first update."
            )
        if self.options.sinks and self._ranks.is_writer:  # which have the rows that are dropped now
            self._sinks.last_step = self.trace.last_step()
        self._truncate(state["written"])
        self.step = state["step"]
        self._rows.restore(state["last"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._capture.begin_update(self._evaluator.records and self._hooks.attached)

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute a loss and add it to the objective.

        Use it for training steps whose calls cannot be repeated, such as those of compiled models, if the loss is not
        ``criterion(model(inputs), targets)``: where the loop computes the loss, once per backward pass::

            loss = probe.observe(lambda model, x, y: F.cross_entropy(model(x), y) + penalty(model), x, y)
            loss.backward()

        Args:
            closure: ``closure(model, *args, **kwargs)`` returns all of the loss that is differentiated, up to a factor.
                Where the calls cannot be repeated, and for the first ray, it is called again at each step size, without
                gradients unless it computes derivatives itself (a gradient penalty). Other modules that it calls are
                restored like the model.
            args: Everything that the loop rebinds before the optimizer steps, such as the batch, and what is to be
                constant: a detached tensor that the closure itself computes moves with the parameters.
            kwargs: The same, by keyword.

        Returns:
            The result of the closure, to be differentiated.
        """
        return self._capture.observe(closure, *args, **kwargs)

    def last(self) -> dict[str, Any]:
        """Return the last row with plain numbers.

        It is empty before the first one. The call waits for the device.
        """
        return self._rows.last()

    def frame(self) -> pd.DataFrame:
        """Return all rows so far.

        The columns are the run's scalar facts, and ``landscape.traces.schema.UPDATES``. With a ``trace`` folder under
        data parallelism, only the process that writes it has rows.
        """
        return self.trace.frame()

    def _resolve(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Resolve rows, and hand them to the sinks."""
        resolved = self._rows.resolve(rows)
        self._sinks.put(resolved)
        return resolved

    def _truncate(self, written: Mapping[str, int]) -> None:
        if not written and (rows := self.trace.written["updates"]):
            warnings.warn(f"No state was loaded: {rows} recorded updates are replaced.", stacklevel=2)
        self._ranks.run_on_all(lambda: self.trace.truncate(written))
        self._starts_over = False

    def _is_due(self) -> bool:
        return self._hooks.attached and self._schedule.due

    def _before_step(self, closure: Closure | None) -> Closure | None:
        """Measure the update, or return a closure that does.

        ``step(closure)`` computes the gradient itself, maybe several times: the first one is that of this update. Under
        accumulation it adds to what is there. If it is computed at other parameters, as in sharpness-aware
        minimization, the gradient of the update is the one from before.
        """
        self._measured, self._pending = {}, None
        if closure is None:
            self._before_update(lambda: self._update(self._capture.pop_terms()))
            return None
        versions, before = self._capture.versions(), None
        if self._is_due() and self._capture.passes.has_terms():
            before = self._update(self._capture.peek()).snapshot()

        def measure() -> None:
            has_moved = self._capture.versions() != versions
            self._before_update(
                lambda: before if before and has_moved else self._update(self._capture.pop_terms(versions))
            )

        return call_after_first(closure, measure)

    def _update(self, captured: CapturedUpdate) -> Update:
        return Update.from_optimizers(self._capture, self.optimizers, captured, reads_lr=self.options.relative)

    def _before_update(self, make: Callable[[], Update]) -> None:
        if self._starts_over:
            self._truncate({})
        if self._is_due():
            self._versions = self._gradient_versions(self.optimizers)
            with self._schedule.probing():
                update = make()
                if self.options.direction == "gradient":
                    self._measure(update, update.gradient_direction(self.options.relative))
                else:  # known once the optimizer has made it
                    self._pending = update.snapshot()

    def _between_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the row if its gradient has changed since."""
        before = self._versions.get(id(optimizer))
        if before is not None and self._gradient_versions([optimizer])[id(optimizer)] != before:
            self._drop(CHANGED_GRADIENT.format(type(optimizer).__name__))

    def _gradient_versions(self, optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, list[Any]]:
        """Return versions by optimizer, of gradients that are final."""
        if len(self.optimizers) == 1:
            return {}
        scaler = find_grad_scaler()
        return {
            id(one): gradient_versions(parameter for group in one.param_groups for parameter in group["params"])
            for one in optimizers
            if gradient_scale(one, scaler) is None
        }

    def _drop(self, reason: str) -> None:
        """Drop the row of the update, and warn."""
        if self._measured or self._pending is not None:
            warnings.warn(f"Step {self.step} is not in the trace: {reason}", stacklevel=2)
        self._measured, self._pending = {}, None

    def _after_steps(self, missing: Sequence[torch.optim.Optimizer]) -> None:
        if missing:
            self._drop(NO_COMMON_STEP.format(" and ".join(type(one).__name__ for one in missing)))
        if self._pending is not None:
            update, self._pending = self._pending, None
            with self._schedule.probing():
                self._measure(update, update.actual_direction())
        if self._measured:  # not before, as a step may fail
            self.trace.append(self._rows.append(self._measured, self._hooks.skipped()))
            self._measured = {}
            if self._sinks.is_due:
                self.trace.resolve_pending()
        self._capture.finish_update()
        self._schedule.advance(self._capture.pop_overhead_seconds())
        self.step += 1
        self._capture.begin_update(self._evaluator.records)

    def _measure(self, update: Update, direction: Parameters) -> None:
        """Set the row, or warn why there is none."""
        is_sharded = self._capture.loss_module.space.is_sharded  # sharded modules replace their parameters themselves
        contents = ModuleContents([] if is_sharded else self._capture.loss_module.modules())
        try:
            row = self._ranks.all_mean(lambda: self._row(update, direction))
        except Exception as error:
            # Once rows were recorded, a training run must not end because of its probe.
            has_begun = self._rows.has_rows and not isinstance(error, RankFailedError)
            if not has_begun and not isinstance(error, ProbeDeferred):
                raise
            warnings.warn(f"Step {self.step} is not in the trace: {error}", stacklevel=2)
            return
        finally:
            if names := contents.restore():
                warnings.warn(f"Step {self.step}: restored what the model held as {names}.", stacklevel=2)
        self._measured = row | {"seconds": self._seconds}

    def _row(self, update: Update, direction: Parameters) -> dict[str, Any]:
        """Return the row by the losses of this process."""
        started = time.perf_counter()
        taped, looped = self._ranks.run_on_all(lambda: self._rays(update, direction), must_match=_pass_signature)
        values = update.row_values(direction)  # a sum over ranks, before one of them may fail
        with self._capture.measuring():
            evaluate: Any = partial(self._evaluator.losses, taped, looped)
            if self.options.gradients:
                evaluate = partial(self._evaluator.gradients, taped, looped, update.loss_gradient)
            # A check is a mean over the ranks, which none of them may miss.
            ray, along = self._ranks.run_on_all(evaluate) if self._checks.is_due(self.step) else evaluate()
            values |= {"step_sizes": ray.step_sizes, "loss": ray.objective.training_loss()} | _columns(along)
            if self.options.critical:
                values |= critical_points(ray, values, self._ranks)
            seconds = time.perf_counter() - started
            if facts := self._checks.check_if_due(self.step, update, ray.objective):
                self.trace.update_metadata(mode="training" if self.model.training else "evaluation", checks=facts)
            if facts := self._checks.check_if_suspicious(self.step, update, ray.objective, values):
                self.trace.update_metadata(checks=facts)
        self._seconds = seconds
        epoch = self.step / self.options.steps_per_epoch if self.options.steps_per_epoch else math.nan
        return {"step": self.step, "epoch": epoch, "lr": update.lr} | values

    def _rays(self, update: Update, direction: Parameters) -> tuple[Ray | NoTapeError, Ray | LandscapeError]:
        step_sizes = self.options.step_sizes_at(self.step, update.lr)
        if update.captured.is_empty():
            raise self._capture.no_loss_error()
        if problem := update.captured.problem:
            raise LandscapeError(problem)
        if not update.gradient:
            raise LandscapeError(
                "model: no parameter that the optimizer holds and that has a gradient is the model's. Give the probe "
                "the model that the optimizer trains."
            )
        if self._hooks.are_followed():
            raise ProbeDeferred("A step hook that was registered after the forward pass may change the gradient.")
        return update.rays(direction, step_sizes)


def _columns(along: Tensor | RayGradients) -> dict[str, Tensor]:
    if isinstance(along, Tensor):
        return {"losses": along}
    gradients = {"gradient_distances": along.distances, "gradient_cosines": along.cosines}
    return {"losses": along.losses, "slope": along.slope, **gradients}


def _pass_signature(rays: tuple[Ray | NoTapeError, Ray | LandscapeError]) -> object:
    """Return a signature of passes that ranks make together."""
    return rays[1].pass_signature() if isinstance(rays[1], Ray) else None


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _signature() -> inspect.Signature:
    """Return the signature with the options by name, for tooltips."""
    given = list(inspect.signature(LandscapeProbe.__init__).parameters.values())[1:-1]
    options = inspect.signature(ProbeOptions).parameters.values()
    return inspect.Signature([*given, *options])


LandscapeProbe.__signature__ = _signature()  # pyright: ignore[reportAttributeAccessIssue]
