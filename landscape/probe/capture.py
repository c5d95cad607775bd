"""Captures the losses of the user's training loop in a form that can be evaluated again."""

import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.utils.hooks import RemovableHandle

from landscape.distributed.group import unwrap_parallel
from landscape.distributed.parameter_space import parameter_space
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.probe import messages
from landscape.probe.backward_hook import unwatch_backward, watch_backward
from landscape.probe.messages import NOT_RECORDED
from landscape.probe.passes import BackwardPasses, CapturedUpdate
from landscape.probe.replay import CriterionState, ModelCall, VersionedArgs, is_replaying, raises, replay, replaying
from landscape.probe.step_hooks import StepHooks, find_grad_scaler
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.engines.recorder import Recorder
from landscape.ray.engines.tape import Tape
from landscape.ray.loss_module import Closure, LossModule
from landscape.ray.objective import LossTerm
from landscape.ray.snapshot import ForwardSnapshot
from landscape.rng import cpu_rng_state

_LAZY = ProbeDeferred(messages.LAZY_PARAMETERS)

# The hooks of one update, in the order in which they run:
#
#     loop                        hook                  effect
#     model(x)                    _before_model         ModelCall: snapshot of the state, arguments and their versions
#                                 _after_model          its outputs, and the state of the criterion
#     criterion(outputs, y)       _before_criterion     has the criterion or the RNG changed since the model's call?
#                                 _after_criterion      LossTerm with a closure that repeats both calls, not yet counted
#     loss.backward()             passes.begin, .end    the term is counted, with its weight
#     optimizer.step()            pop_terms             (StepHooks, before the step) all terms are one objective, and
#                                 measuring             its ray is evaluated, while nothing is recorded
#                                 finish_update         (StepHooks, after the step) drop what is left
#
# Under gradient accumulation the loop repeats the lines up to loss.backward(), and each repetition adds a term. A loss
# passed to `observe` has one call instead of two: its closure is the term's, and the calls within it are not recorded.
# The hooks of DistributedDataParallel's wrapper are outside of the model's: _before_wrapper, _before_model,
# _after_model, and _after_model once more with the outputs of the wrapper. optimizer.step(closure) calls pop_terms
# after the first call of the closure (see LandscapeProbe._before_step).


@dataclass(frozen=True)
class Hook:
    """A hook that copies of its module do not have."""

    function: Any

    def __call__(self, *args: Any) -> None:
        """Call the function."""
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """Do nothing, as the hook of a copied module."""


def _stop(recorders: list[Recorder]) -> None:
    for recorder in recorders:
        recorder.stop()


class Capture:
    """Collects the terms of the current update: its differentiated losses.

    Args:
        model: The module that the user's loop calls: the model, or what ``DistributedDataParallel(model)`` returned.
        criterion: The module whose calls are the losses, unless the user passes them to `observe`.
        optimizers: The optimizers that update the model.
        is_due: Returns True if the current update is to be probed.
        hooks: Hooks of the optimizers' steps.
        grad_scaler: The loss scaler, if one is used.

    Attributes:
        model: The model itself.
        ranks: The processes that train it.
        loss_module: The model and its criterion.
        passes: The losses whose gradient is in ``.grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        optimizers: Sequence[torch.optim.Optimizer],
        is_due: Callable[[], bool],
        hooks: StepHooks,
        grad_scaler: "torch.amp.GradScaler | None" = None,
    ) -> None:
        self.wrapper = model
        self.model, self.ranks = unwrap_parallel(model)
        self.criterion = criterion
        self.optimizers = optimizers
        self.loss_module = LossModule(self.model, criterion, parameter_space(self.model, self.ranks))
        self._is_due, self._hooks = is_due, hooks
        self.passes = BackwardPasses(
            self._parameters,
            self._name_of,
            is_due=lambda: not is_replaying() and is_due(),
            defers_reduction=lambda: not self.loss_module.space.syncs_gradients(),
            recorder=lambda: self._recorder,
            versions=self._moved_versions,
        )
        self._active: list[Recorder] = []
        """The recorder that may be on the stack of modes, which holds it. It is stopped when this object is freed."""
        weakref.finalize(self, _stop, self._active)
        self._grad_scaler = grad_scaler
        self._recorder: Recorder | None = None
        """Records the calls of the current update."""
        self._calls_muted: list[tuple[bool, bool]] = []
        """For each call of the model in progress: is it muted, and is it made while an error is handled?"""
        self._call: ModelCall | None = None
        """The last call of the model."""
        self._handles: list[RemovableHandle] = []
        self._seconds = 0.0
        self._measuring = self._observing = False
        self._lazy: bool | None = None
        """True if the last forward pass had to create parameters first; None before any."""
        self._criterion_changed = False
        """True if the criterion has changed between the model's call and its own."""
        self._rng_before_criterion: Tensor | None = None
        """RNG state before the criterion's call if it has changed since the model's call, otherwise None."""
        self._in_functorch = False
        """True if the model was called within a transform of torch.func."""

    def attach(self) -> None:
        """Register the hooks."""
        watch_backward(self.passes)
        self.passes.mark_gradients_used()
        # torch.compile may trace the user's code and the hooks with it, but leaves out a hook that is disabled for it.
        own = (
            self._before_model,
            self._after_model,
            self._before_criterion,
            self._after_criterion,
            self._before_wrapper,
        )
        hooks = (Hook(torch.compiler.disable(hook)) for hook in own)
        before_model, after_model, before_criterion, after_criterion, before_wrapper = hooks
        self._handles = [
            self.model.register_forward_pre_hook(before_model, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(after_model, always_call=True),
        ]
        if self.criterion is not None:
            self._handles += [
                self.criterion.register_forward_pre_hook(before_criterion),
                self.criterion.register_forward_hook(after_criterion, with_kwargs=True),
            ]
        if self.wrapper is not self.model:
            self._handles += [
                self.wrapper.register_forward_pre_hook(before_wrapper),
                # The wrapper may return copies of the outputs, and the criterion gets the copies.
                self.wrapper.register_forward_hook(after_model),
            ]

    def detach(self) -> None:
        """Remove the hooks, and drop the terms."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        unwatch_backward(self.passes)
        self.pop_terms()
        self._recorder = None
        self._active.clear()

    def begin_update(self, records: bool) -> None:
        """Record calls from now on, if the update is due.

        Args:
            records: True if they are of use.
        """
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder, self._calls_muted = None, []
        if records and self._is_due() and not self.loss_module.space.is_sharded:
            self._held = self._trained_ids()
            self._recorder = Recorder(self._moved_parameters())
            self._active[:] = [self._recorder]
            self._recorder.start()

    def _trained_ids(self) -> set[int]:
        return {id(parameter) for parameter in self._parameters() if parameter.requires_grad}

    def _begin_call(self) -> None:
        """Prepare the recorder for a call of the model."""
        self._hooks.move_last()
        # The loop may have added, removed or frozen parameters since the last update.
        if self._recorder is not None and not self._recorder.roots and self._held != self._trained_ids():
            self.begin_update(records=True)
        if self._recorder is not None:
            self.passes.use_thread()
            self._recorder.start()
            # All that the loop lets the model compute without gradients is a constant.
            is_muted = not torch.is_grad_enabled() and self._recorder.is_outermost((self.model, self.wrapper))
            self._recorder.enter(is_muted)
            self._calls_muted.append((is_muted, sys.exc_info()[0] is not None))

    def _end_call(self, is_muted: bool, handled_error: bool) -> None:
        if self._recorder is not None:
            self._recorder.leave(is_muted)
            if sys.exc_info()[0] is not None and not handled_error:
                self._recorder.stop()  # The call has failed. It records again from the next one on.

    def tape(self, captured: CapturedUpdate) -> Tape:
        """Return the recorded calls of an update.

        Raises:
            NoTapeError: They are not those of its losses.
        """
        if self.loss_module.space.is_sharded:
            raise NoTapeError("its parameters are sharded over processes")
        if self._recorder is None:
            raise NoTapeError("its calls were not recorded")
        if captured.roots_problem is not None or not captured.roots or captured.differentiated is None:
            raise NoTapeError(captured.roots_problem or NOT_RECORDED)
        self._recorder.rename({id(parameter): name for name, parameter in self._moved_parameters().items()})
        slots = [root.slot for root in captured.roots]
        return self._recorder.tape(slots, self.loss_module, captured.differentiated, self._loss_scale())

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Evaluate terms in the body, without recording it."""
        self._measuring = True
        try:
            with replaying():
                yield
        finally:
            self._measuring = False

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return ``closure(model, *args, **kwargs)``, and register it as a loss.

        The closure gets the wrapper in the loop's own call, so that gradients are averaged, and the model in replays.
        """
        if not self._is_recording():
            return closure(self.model if self._measuring else self.wrapper, *args, **kwargs)
        if self._is_lazy():
            with self._in_observed_closure():
                loss = closure(self.wrapper, *args, **kwargs)
            self._register_loss(LossTerm(raises(_LAZY), self._capture_state(), observed=True), loss)
            return loss
        state, arguments = self._capture_state(), VersionedArgs.of((args, kwargs))
        versions = self.loss_module.frozen_versions()
        with self._in_observed_closure():
            loss = closure(self.wrapper, *args, **kwargs)

        def again(model: nn.Module) -> Tensor:
            args, kwargs = arguments.unflatten("the observed loss")
            return closure(model, *args, **kwargs)

        is_derived = self.passes.depends_on_parameters(arguments.leaves)
        derived = LandscapeError(messages.DERIVED_INPUT.format("An argument of the observed loss"))
        repeated = self._reject_if_written(versions, raises(derived) if is_derived else again)
        self._register_loss(LossTerm(repeated, state, observed=True), loss)
        return loss

    @contextmanager
    def _in_observed_closure(self) -> Iterator[None]:
        """Keep calls in the body from becoming further losses."""
        self._observing = True
        try:
            with nullcontext() if self._recorder is None else self._recorder.inside():
                yield
        finally:
            self._observing = False

    def pop_terms(self, versions: list[int] | None = None) -> CapturedUpdate:
        """Return and drop the losses whose gradient the optimizer gets.

        Parameters that were written to since the last forward pass, or since they had the ``versions``, are a problem
        of the update.
        """
        captured, self._call = self._check_versions(self.passes.pop(), versions), None
        if self._recorder is not None:
            self._recorder.stop()
        return captured.unscaled(self._loss_scale())

    def peek(self) -> CapturedUpdate:
        """Return the losses whose gradient the optimizer would get now."""
        return self._check_versions(self.passes.peek(), None).unscaled(self._loss_scale())

    def _loss_scale(self) -> Tensor | None:
        """Return the factor of the losses, or None for 1."""
        scaler = self._grad_scaler or find_grad_scaler()
        if scaler is None or not self._parameters():
            return None
        return scaler.scale(torch.ones((), device=self._parameters()[0].device))

    def _check_versions(self, captured: CapturedUpdate, versions: list[int] | None) -> CapturedUpdate:
        now, moved = self.versions(), self._moved_versions()
        # A forward pass may write to parameters itself, so only the last of several losses has the present versions.
        if captured.terms and all(term.versions != now for term in captured.terms):
            captured = captured._replace(terms_problem=captured.terms_problem or messages.WRITTEN_PARAMETERS)
        written = captured.roots and all(root.versions != moved for root in captured.roots)
        if not captured.is_empty() and captured.problem is None and (written or versions not in (None, now)):
            captured = captured._replace(problem=messages.WRITTEN_PARAMETERS)
        return captured

    def no_loss_error(self) -> LandscapeError:
        """Return an error that explains why there are no terms."""
        if self._lazy:
            return _LAZY
        if self.passes.was_cleared:
            return ProbeDeferred(messages.CLEARED_GRADIENTS)
        if torch._C._current_graph_task_id() != -1:
            return LandscapeError(messages.STEP_IN_BACKWARD)
        if self._in_functorch:
            return LandscapeError(messages.FUNCTORCH)
        if self.passes.has_unseen_pass:
            return LandscapeError(messages.UNSEEN_BACKWARD)
        return LandscapeError(messages.NO_LOSS)

    def finish_update(self) -> None:
        """Drop the losses that a step's closure has added."""
        self.pop_terms()
        self.passes.finish_update()
        self._recorder = None
        self._active.clear()

    def versions(self) -> list[int]:
        """Return the number of writes to each parameter.

        It covers the optimizer's parameters and those of all modules that the loss calls, also outside of the model. It
        is empty if forward passes gather parameters.
        """
        return self.loss_module.space.versions((*self._parameters(), *self.loss_module.parameters()))

    def _moved_versions(self) -> list[int]:
        return self.loss_module.space.versions(self._parameters())

    def pop_overhead_seconds(self) -> float:
        """Return the seconds of snapshots since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the traits of forward passes that were found."""
        return self.loss_module.traits.state_dict(self.loss_module)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the traits, so that rays have the same bits."""
        self.loss_module.traits.load_state_dict(state, self.loss_module)

    def _parameters(self) -> list[nn.Parameter]:
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def _moved_parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters that the optimizer may move."""
        held = self._trained_ids()
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in held}

    def _name_of(self, parameter: Tensor) -> str:
        names = (name for name, other in self.model.named_parameters() if other is parameter)
        return next(names, "a parameter that is not the model's")

    def _is_lazy(self) -> bool:
        self._lazy = self._lazy is not False and self.loss_module.is_lazy()
        return self._lazy

    def _is_recording(self) -> bool:
        if is_replaying() or self._measuring or self._observing or not torch.is_grad_enabled() or not self._is_due():
            return False
        # Derivatives of torch.func are not those of the autograd outside of it.
        in_functorch = peek_interpreter_stack() is not None
        self._in_functorch |= in_functorch
        return not in_functorch

    def _capture_state(self) -> ForwardSnapshot:
        started = time.perf_counter()
        self._hooks.move_last()
        state = ForwardSnapshot.capture(self.loss_module)
        self._seconds += time.perf_counter() - started
        return state

    def _before_wrapper(self, wrapper: nn.Module, args: Any) -> None:
        if self._measuring:
            raise LandscapeError(messages.WRAPPER_CALLED)
        if getattr(getattr(wrapper, "_join_config", None), "enable", False):  # torch has no public way to ask
            raise LandscapeError(messages.UNEVEN_INPUTS)

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_replaying() and torch.is_grad_enabled():
            self._hooks.end_unfinished()
        if self.criterion is not None and self._is_recording() and not self._is_lazy():
            arguments = VersionedArgs.of((args, kwargs))
            is_derived = self.passes.depends_on_parameters(arguments.leaves)
            self._call = ModelCall(self._capture_state(), arguments, self.loss_module.frozen_versions(), is_derived)
        if self._recorder is not None and not is_replaying():
            self._begin_call()

    def _after_model(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if model is self.model and self._recorder is not None and not is_replaying() and self._calls_muted:
            self._end_call(*self._calls_muted.pop())
        if self._call is not None and self._is_recording():
            self._call.outputs = VersionedArgs.of(outputs)
            self._call.criterion_state = CriterionState.capture(self.criterion)

    def _before_criterion(self, criterion: nn.Module, args: Any) -> None:
        if self._call is None or self._call.criterion_state is None or not self._is_recording():
            return
        before, now = self._call.criterion_state, CriterionState.capture(self.criterion)
        self._criterion_changed = not before.has_contents_of(now)
        self._rng_before_criterion = None if torch.equal(before.rng, now.rng) else now.rng

    def _after_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if not (isinstance(loss, Tensor) and loss.requires_grad and self._is_recording()):
            return
        call = self._call or ModelCall(self._capture_state(), VersionedArgs.of(()), self.loss_module.frozen_versions())
        closure = self._reject_if_written(call.versions, replay(call, criterion, (args, kwargs)))
        # Numbers drawn between the two calls only matter to a criterion that draws, too.
        rng = self._rng_before_criterion
        if self._criterion_changed or (rng is not None and not torch.equal(rng, cpu_rng_state())):
            closure = raises(LandscapeError(messages.CHANGED_CRITERION))
        self._criterion_changed, self._rng_before_criterion = False, None
        if call.depends_on_parameters:
            closure = raises(LandscapeError(messages.DERIVED_INPUT.format("An input of the model")))
        if self._lazy:
            closure = raises(_LAZY)
        self._register_loss(LossTerm(closure, call.state), loss)

    def _reject_if_written(self, versions: dict[int, int], closure: Closure) -> Closure:
        """Return the closure, or one that raises.

        It raises if the forward pass wrote to a frozen parameter, of which there is no copy from before the pass. Later
        snapshots have one.
        """
        now = self.loss_module.frozen_versions()
        known = self.loss_module.traits.written_parameters
        written = {key for key in now if now[key] != versions.get(key)} - known
        known |= written
        return raises(ProbeDeferred(messages.WRITTEN_FROZEN)) if written else closure

    def _register_loss(self, term: LossTerm, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.requires_grad:
            term.value = loss.detach().clone()  # The loop may write to the loss afterwards, as by `loss /= n`.
            term.versions = self.versions()
            self.passes.register_loss(term, loss)
