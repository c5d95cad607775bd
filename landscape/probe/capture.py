"""Captures the losses of the user's own training loop, as it runs, in a form that can be evaluated again."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.utils.hooks import RemovableHandle

from landscape.distributed.fsdp import ShardedParameters
from landscape.distributed.group import unwrap_parallel
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.probe.passes import Captured, Passes, unwatch, watch
from landscape.probe.replay import OBSERVE, ModelCall, VersionedArgs, is_replaying, raises, replay, replaying
from landscape.ray.engines.layers import Hook, Layers
from landscape.ray.objective import LossTerm
from landscape.ray.snapshot import Closure, ForwardSnapshot, LossModule

MOVED = (
    "Parameters were written to between the forward pass and the optimizer's step, so that the gradient is not that of "
    "where the update starts. Another optimizer may have made its step (probe the one that comes first), or the loop "
    "writes to them, as in sharpness-aware minimization; such an update cannot be measured."
)
CARRIED = (
    "{} was computed from parameters that the optimizer holds (a hidden state that is carried on, features, a second "
    "call), which a replay would take for constant. Compute all of it in one closure, from what does not depend on "
    "them: probe.observe(lambda model, inputs, targets: ..., inputs, targets); or detach it, if it is to be constant."
)
OTHER = (
    "Between the calls of the model and of the criterion, the loop has changed the criterion, or has drawn random "
    "numbers before the criterion does, which a replay would not do. Compute all of it in one closure: "
    "probe.observe(lambda model, inputs, targets: ..., inputs, targets)."
)
_LAZY = ProbeDeferred("The forward pass has made the parameters; the next update is probed.")


class Capture:
    """Collects the terms of the current update: one for each loss that a backward pass has gone through.

    Hooks on the model remember its arguments and the state before each forward pass; a hook on the criterion remembers
    its arguments and ties those that are outputs of the model to it. A hook on the loss learns from the backward pass
    that the loss was trained on, and with which weight (1/n under accumulation over n batches).

    Args:
        model: What the user's loop calls: the model, or what ``DistributedDataParallel(model)`` returned.
        criterion: The module whose calls are the losses, if the user does not hand them over.
        optimizer: What updates the model.
        wanted: Whether the current update is to be probed.
        grad_scaler: The loss scaler, where one is used.
        prepare: What to do before a forward pass that is captured.

    Attributes:
        model: The model itself.
        ranks: The processes that train it.
        scene: The model and its criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        wanted: Callable[[], bool],
        grad_scaler: "torch.amp.GradScaler | None" = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.wrapper = model
        self.model, self.ranks = unwrap_parallel(model)
        self.criterion = criterion
        self.optimizer = optimizer
        self.scene = LossModule(self.model, criterion, ShardedParameters.of(self.model, self.ranks))
        self._wanted, self._prepare = wanted, prepare
        self._call: ModelCall | None = None
        shards = self.scene.shards
        self.passes = Passes(
            self._parameters,
            self._name_of,
            wanted=lambda: not is_replaying() and wanted(),
            is_held_back=lambda: shards is not None and not shards.syncs_gradients(),
            scale=(lambda ones: ones) if grad_scaler is None else grad_scaler.scale,
        )
        self._handles: list[RemovableHandle] = []
        self._layers = Layers(self.scene)
        self._lazy: bool | None = None
        """Whether the forward pass that was last begun has to make parameters first; None before any."""
        self._seconds = 0.0
        self._measuring = self._observing = False
        self._is_other = self._has_drawn = False
        """Whether the criterion, or the random stream, is another than when the model was through."""
        self._transformed = False
        """Whether the model was called within a transform of torch.func."""

    def attach(self) -> None:
        """Start to listen."""
        watch(self.passes)
        self.passes.look()
        # torch.compile, which may take in the user's code, leaves a hook out that is disabled for it.
        own = (
            self._before_model,
            self._after_model,
            self._before_criterion,
            self._after_criterion,
            self._before_wrapper,
        )
        hooks = (Hook(torch.compiler.disable(hook)) for hook in own)
        before_model, after_model, before_criterion, after_criterion, before_wrapper = hooks
        if self.criterion is not None:
            self._handles = [
                self.model.register_forward_pre_hook(before_model, prepend=True, with_kwargs=True),
                self.model.register_forward_hook(after_model),
                self.criterion.register_forward_pre_hook(before_criterion),
                self.criterion.register_forward_hook(after_criterion, with_kwargs=True),
            ]
        if self.wrapper is not self.model:
            self._handles += [
                self.wrapper.register_forward_pre_hook(before_wrapper),
                # It may hand on copies of the outputs, and these are what the criterion gets.
                self.wrapper.register_forward_hook(after_model),
            ]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the body, what was captured is evaluated again."""
        self._measuring = True
        try:
            with replaying():
                yield
        finally:
            self._measuring = False

    def detach(self) -> None:
        """Stop listening, and forget what has not been taken."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layers.detach()
        unwatch(self.passes)
        self.pop_terms()

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The loss ``closure(model, *args, **kwargs)``, remembered as a term if it is to be probed.

        The loop's own call goes through the wrapper, so that gradients are averaged.
        """
        if not self._listening():
            return closure(self.model if self._measuring else self.wrapper, *args, **kwargs)
        if self._is_lazy():
            with self._observed():
                loss = closure(self.wrapper, *args, **kwargs)
            self._await(LossTerm(raises(_LAZY), self._state(), observed=True), loss)
            return loss
        state, arguments = self._state(), VersionedArgs.of((args, kwargs))
        versions = self.scene.frozen_versions()
        bases = self._layers.bases = []
        with self._observed():
            loss = closure(self.wrapper, *args, **kwargs)
        self._layers.bases = None

        carried = LandscapeError(CARRIED.format("An argument of the observed loss"))
        is_carried = self.passes.carries(arguments.leaves)

        def again(model: nn.Module) -> Tensor:
            if is_carried:
                raise carried
            args, kwargs = arguments.nest("the observed loss")
            return closure(model, *args, **kwargs)

        self._await(LossTerm(self._unless_moved(versions, again), state, bases=bases, observed=True), loss)
        return loss

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Within the body, what the user hands over is computed; calls in it are no losses of their own."""
        self._observing = True
        try:
            yield
        finally:
            self._observing = False

    def pop_terms(self, versions: list[int] | None = None) -> Captured:
        """The losses whose gradient the optimizer gets; captures start anew.

        The parameters must not have been written to since the last forward pass, nor since they had the ``versions``.
        """
        captured, self._call, self._layers.bases = self._checked(self.passes.take(), versions), None, None
        return captured

    def peek(self) -> Captured:
        """The losses whose gradient the optimizer would get now; captures go on."""
        return self._checked(self.passes.peek(), None)

    def _checked(self, captured: Captured, versions: list[int] | None) -> Captured:
        now = self.versions()
        # A forward pass may write to parameters itself, so the last one of several counts.
        moved = all(term.versions != now for term in captured.terms) or versions not in (None, now)
        if captured.terms and captured.problem is None and moved:
            captured = captured._replace(problem=MOVED)
        for term in captured.terms:
            term.bases = self._layers.current(term.bases)
        return captured

    def nothing(self) -> LandscapeError:
        """Why no loss was captured."""
        if self._lazy:
            return _LAZY
        if self.passes.is_cleared:
            return ProbeDeferred(
                "The gradients were cleared after the backward pass, so the update is that of no loss."
            )
        if torch._C._current_graph_task_id() != -1:
            return LandscapeError(
                "The optimizer makes its step within the backward pass, before the gradient is complete, so that there "
                "is no update of all parameters to be measured. Let the loop call optimizer.step() after "
                "loss.backward()."
            )
        if self._transformed:
            return LandscapeError(
                "The model was called within a transform of torch.func, whose derivatives the probe does not see. Let "
                "the loop call loss.backward(), or measure single rays by landscape.ray_losses."
            )
        if self.passes.is_elsewhere:
            return LandscapeError(
                "The loss was not differentiated by loss.backward() or torch.autograd.backward(...), called by this "
                "name, so that it is not known whether its gradient is that of the update. Let the loop call "
                "loss.backward()."
            )
        return LandscapeError(f"No loss was captured since the last step. {OBSERVE}.")

    def step_made(self) -> None:
        """Forget what the step has computed after the first time, where it was given a closure."""
        self.pop_terms()
        self.passes.step_made()

    def versions(self) -> list[int]:
        """How often each parameter was written to, also of modules outside of the model that the loss calls.

        It is not known where forward passes gather parameters.
        """
        if self.scene.shards is not None:
            return []
        return [parameter._version for parameter in (*self._parameters(), *self.scene.parameters())]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _name_of(self, parameter: Tensor) -> str:
        names = (name for name, other in self.model.named_parameters() if other is parameter)
        return next(names, "a parameter that is not the model's")

    def pop_overhead_seconds(self) -> float:
        """Time that remembering states has taken since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """What was found out about the model so far, by the names of its parameters."""
        scene = self.scene
        return {
            "moving": [
                name for name, parameter in scene.named_parameters() if id(parameter) in scene.written_parameters
            ],
            "draws": scene.draws,
            "differentiates": scene.differentiates,
            "streamed": sorted(scene.streamed),
            "shared": sorted(scene.shared),
            "overwritten": sorted(self._layers.overwritten),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know it from the first forward pass on, so that a ray is evaluated to the same bits."""
        scene = self.scene
        scene.written_parameters = {id(p) for name, p in scene.named_parameters() if name in state["moving"]}
        scene.draws, scene.differentiates = state["draws"], state.get("differentiates", False)
        scene.streamed, scene.shared = set(state["streamed"]), set(state["shared"])
        self._layers.overwritten = set(state["overwritten"])

    def _is_lazy(self) -> bool:
        self._lazy = self._lazy is not False and self.scene.is_lazy()
        return self._lazy

    def _listening(self) -> bool:
        if is_replaying() or self._measuring or self._observing or not torch.is_grad_enabled() or not self._wanted():
            return False
        # Within torch.func, derivatives are not those of autograd outside of it.
        within = peek_interpreter_stack() is not None
        self._transformed |= within
        return not within

    def _state(self) -> ForwardSnapshot:
        """The state before a forward pass."""
        started = time.perf_counter()
        self._prepare()
        self._layers.refresh()
        state = ForwardSnapshot.capture(self.scene)
        self._seconds += time.perf_counter() - started
        return state

    def _before_wrapper(self, wrapper: nn.Module, args: Any) -> None:
        if self._measuring:
            raise LandscapeError(
                "An observed loss called the DistributedDataParallel model, whose collectives are those of training; "
                "call the model that the closure is given: probe.observe(lambda model, x: ...)."
            )

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._listening() and not self._is_lazy():
            arguments = VersionedArgs.of((args, kwargs))
            is_carried = self.passes.carries(arguments.leaves)
            self._call = ModelCall(self._state(), arguments, self.scene.frozen_versions(), is_carried)
            self._layers.bases = self._call.bases

    def _after_model(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if self._call is not None and self._listening():
            self._call.outputs = VersionedArgs.of(outputs)
            self._call.left = self._criterion_state()
            self._layers.bases = None

    def _criterion_state(self) -> tuple[list[dict[str, Any]], list[tuple[Tensor, int]], Tensor]:
        """What the criterion's modules hold, and torch's random stream."""
        modules = () if self.criterion is None else self.criterion.modules()
        held = [{**vars(module), **module._buffers} for module in modules]
        buffers = () if self.criterion is None else self.criterion.buffers()
        return held, [(buffer, buffer._version) for buffer in buffers], torch.get_rng_state()

    def _before_criterion(self, criterion: nn.Module, args: Any) -> None:
        """See whether the criterion is what it was at the model's call, from where replays begin."""
        if self._call is None or self._call.left is None or not self._listening():
            return
        (held, buffers, stream), (now, later, self._stream) = self._call.left, self._criterion_state()
        self._is_other = not (
            all(map(_is_same, held, now))
            and all(a is b and one == other for (a, one), (b, other) in zip(buffers, later, strict=True))
        )
        self._has_drawn = not torch.equal(stream, self._stream)

    def _after_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.requires_grad and self._listening():
            call = self._call or ModelCall(self._state(), VersionedArgs.of(()), self.scene.frozen_versions())
            closure = self._unless_moved(call.versions, replay(call, criterion, (args, kwargs)))
            if self._is_other or (self._has_drawn and not torch.equal(self._stream, torch.get_rng_state())):
                closure = raises(LandscapeError(OTHER))
            self._is_other = self._has_drawn = False
            if call.is_carried:
                closure = raises(LandscapeError(CARRIED.format("An input of the model")))
            if self._lazy:
                closure = raises(_LAZY)
            self._await(LossTerm(closure, call.state, bases=call.bases), loss)

    def _unless_moved(self, versions: dict[int, int], closure: Closure) -> Closure:
        """The closure, unless the forward pass wrote to a frozen parameter of which there is no copy from before."""
        now = self.scene.frozen_versions()
        moved = {key for key in now if now[key] != versions.get(key)} - self.scene.written_parameters
        self.scene.written_parameters |= moved
        error = ProbeDeferred("The forward pass writes to frozen parameters; they are copied from the next update on.")
        return raises(error) if moved else closure

    def _await(self, term: LossTerm, loss: Any) -> None:
        """Make it a term once a backward pass has gone through the loss; until then the loss alone holds it."""
        if isinstance(loss, Tensor) and loss.requires_grad:
            term.value = loss.detach().clone()  # `loss /= n` is to come
            term.versions = self.versions()
            self.passes.await_(term, loss)


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)
