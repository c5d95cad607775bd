"""Captures the losses of the user's own training loop, as it runs, in a form that can be evaluated again."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from landscape.errors import UserError
from landscape.layers import Hook, Layers
from landscape.objective import Base, Term
from landscape.state import Autocast, Closure, ForwardState, Scene

OBSERVE = "Hand the loss to the probe: `loss = probe.observe(lambda model: ...)`, once for each backward pass"


class NotYetError(UserError):
    """This update cannot be probed, but later ones can."""


_LAZY = NotYetError("The forward pass has made the parameters; the next update is probed.")


class Capture:
    """Collects the terms of the current update: one for each loss that a backward pass has gone through.

    Hooks on the model remember its arguments and the state before each forward pass; a hook on the criterion remembers
    its arguments and ties those that are outputs of the model to it. A hook on the loss learns from the backward pass
    that the loss was trained on, and with which weight (1/n under accumulation over n batches).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        wanted: Callable[[], bool],
        grad_scaler: "torch.amp.GradScaler | None" = None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self._scene = Scene(model, criterion)
        self._wanted = wanted
        self._grad_scaler = grad_scaler
        self._call: _Call | None = None
        self._terms: list[Term] = []
        self._handles: list[RemovableHandle] = []
        self._layers = Layers(self._scene)
        self._lazy: bool | None = None
        """Whether the forward pass that was last begun has to make parameters first; None before any."""
        self._seconds = 0.0

    def attach(self) -> None:
        """Start to listen."""
        if self.criterion is not None:
            self._handles = [
                self.model.register_forward_pre_hook(Hook(self._before_model), prepend=True, with_kwargs=True),
                self.model.register_forward_hook(Hook(self._after_model)),
                self.criterion.register_forward_hook(Hook(self._after_criterion), with_kwargs=True),
            ]

    def detach(self) -> None:
        """Stop listening, and forget what has not been taken."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layers.detach()
        self.take()

    def observe(self, closure: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The loss ``closure(model, *args, **kwargs)``, remembered as a term if it is to be probed."""
        if not self._listening():
            return closure(self.model, *args, **kwargs)
        if self._is_lazy():
            with replaying():
                loss = closure(self.model, *args, **kwargs)
            self._await(Term(_refusal(_LAZY), self._state()), loss)
            return loss
        state, arguments = self._state(), _Leaves.of((args, kwargs))
        versions = self._scene.frozen_versions()
        bases = self._layers.bases = []
        with replaying():
            loss = closure(self.model, *args, **kwargs)
        self._layers.bases = None

        def again(model: nn.Module) -> Tensor:
            args, kwargs = arguments.nest("An argument of the observed loss")
            return closure(model, *args, **kwargs)

        self._await(Term(self._unless_moved(versions, again), state, bases=bases), loss)
        return loss

    def take(self) -> list[Term]:
        """The terms that were differentiated since the last call; captures start anew."""
        terms, self._terms, self._call, self._layers.bases = self._terms, [], None, None
        for term in terms:
            term.bases = self._layers.current(term.bases)
        return terms

    def take_seconds(self) -> float:
        """Time that remembering states has taken since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _is_lazy(self) -> bool:
        self._lazy = self._lazy is not False and self._scene.is_lazy()
        return self._lazy

    def _listening(self) -> bool:
        return not _replays and torch.is_grad_enabled() and self._wanted()

    def _state(self) -> ForwardState:
        """The state before a forward pass; also where an update that never came is noticed and forgotten."""
        # A loss scaler skips the step when gradients overflow; then they are cleared, and their terms stay behind.
        if all(parameter.grad is None for group in self.optimizer.param_groups for parameter in group["params"]):
            self._terms = []
        started = time.perf_counter()
        self._layers.refresh()
        state = ForwardState.capture(self._scene)
        self._seconds += time.perf_counter() - started
        return state

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._listening() and not self._is_lazy():
            self._call = _Call(self._state(), _Leaves.of((args, kwargs)), self._scene.frozen_versions())
            self._layers.bases = self._call.bases

    def _after_model(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if self._call is not None and self._listening():
            self._call.outputs = _Leaves.of(outputs)
            self._layers.bases = None

    def _after_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.requires_grad and self._listening():
            call = self._call or _Call(self._state(), _Leaves.of(()), self._scene.frozen_versions())
            closure = self._unless_moved(call.versions, _replay(call, criterion, (args, kwargs)))
            if self._lazy:
                closure = _refusal(_LAZY)
            self._await(Term(closure, call.state, bases=call.bases), loss)

    def _unless_moved(self, versions: dict[int, int], closure: Closure) -> Closure:
        """The closure, unless the forward pass wrote to a frozen parameter of which there is no copy from before."""
        now = self._scene.frozen_versions()
        moved = {key for key in now if now[key] != versions.get(key)} - self._scene.moving
        self._scene.moving |= moved
        error = NotYetError("The forward pass writes to frozen parameters; they are copied from the next update on.")
        return _refusal(error) if moved else closure

    def _await(self, term: Term, loss: Tensor) -> None:
        """Make it a term once a backward pass goes through the loss; until then the loss alone holds it."""

        def weigh(gradient: Tensor) -> None:
            weight = gradient.detach()
            if self._grad_scaler is not None:
                weight = weight / self._grad_scaler.scale(torch.ones_like(weight))
            if term.weight is None:
                self._terms.append(term)
            term.weight = weight if term.weight is None else term.weight + weight

        if isinstance(loss, Tensor) and loss.requires_grad:
            term.value = loss.detach().clone()  # `loss /= n` is to come
            loss.register_hook(weigh)


_replays: list[object] = []
"""One entry for each replay that is under way: what models do then is not training, to any probe."""


@contextmanager
def replaying() -> Iterator[None]:
    """No capture listens within the body."""
    _replays.append(None)
    try:
        yield
    finally:
        _replays.pop()


@dataclass
class _Leaves:
    """A nest of arguments, flattened, with the versions of its tensors, so that a later write in place is noticed."""

    leaves: list[Any]
    spec: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, nest: Any) -> "_Leaves":
        leaves, spec = tree_flatten(nest)
        return cls(leaves, spec, [_version(leaf) for leaf in leaves])

    def nest(self, what: str = "An input of the model or the criterion", outputs: Sequence[Any] = ()) -> Any:
        """The arguments as they were, around the model's ``outputs``; an error if one has been written to since."""
        self.check(what)
        leaves = [outputs[leaf.index] if isinstance(leaf, _Output) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def check(self, what: str) -> None:
        if self.versions != [_version(leaf) for leaf in self.leaves]:
            raise UserError(f"{what} was changed in place after the probe saw it. {OBSERVE}.")


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


@dataclass
class _Call:
    """A call of the model in the user's loop: the state it ran in, what went in and what came out."""

    state: ForwardState
    arguments: _Leaves
    versions: dict[int, int]
    outputs: _Leaves | None = None
    bases: list[Base] = field(default_factory=list)


@dataclass(frozen=True)
class _Output:
    """Stands for an output of the model among the arguments of the criterion."""

    index: int


def _replay(call: _Call, criterion: nn.Module, arguments: Any) -> Closure:
    """The closure that evaluates ``criterion(model(inputs), targets)`` again, or one that says why it cannot be."""
    try:
        return _tied(call, criterion, _Leaves.of(arguments))
    except UserError as error:
        return _refusal(error)


def _tied(call: _Call, criterion: nn.Module, arguments: _Leaves) -> Closure:
    if call.outputs is None:
        raise UserError(f"The criterion was called without a call of the model before it. {OBSERVE}.")
    call.outputs.check("An output of the model")
    # Numbers and texts may be the same objects as outputs without being outputs.
    plain = int | float | str | None
    places = {id(leaf): _Output(at) for at, leaf in enumerate(call.outputs.leaves) if not isinstance(leaf, plain)}
    arguments.leaves = [places.get(id(leaf), leaf) for leaf in arguments.leaves]
    arguments.versions = [_version(leaf) for leaf in arguments.leaves]
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in arguments.leaves):
        raise UserError(
            "The criterion was given a tensor that was computed from the model's outputs (or by another call of the "
            f"model), so criterion(model(inputs), targets) is not the training loss. {OBSERVE}."
        )
    kinds = [autocast.device_type for autocast in call.state.autocast]
    inputs, autocast = call.arguments, Autocast.capture(kinds)

    def closure(model: nn.Module) -> Tensor:
        args, kwargs = inputs.nest()
        outputs = tree_flatten(model(*args, **kwargs))[0]
        args, kwargs = arguments.nest(outputs=outputs)
        with Autocast.restored(autocast):
            return criterion(*args, **kwargs)

    return closure


def _refusal(error: UserError) -> Closure:
    def closure(model: nn.Module) -> Tensor:
        raise error

    return closure
