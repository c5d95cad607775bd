"""The tape: the calls of a training step, replayed at any step size."""

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.devices import stacked
from landscape.distributed.parameter_space import Parameters, ParameterSpace
from landscape.ray.engines.calls import Call, NoTapeError, Read, Recording, needed_calls
from landscape.ray.engines.replay import Replay, compare, resolved, set_state, state_of
from landscape.ray.loss_module import LossModule
from landscape.ray.objective import NoDependenceError
from landscape.ray.ray import Ray


@dataclass(frozen=True, eq=False, kw_only=True)
class Tape(Recording):
    """The loss of an update as recorded calls.

    It is an objective, as `landscape.ray.objective.Objective` is: the loss as a function of the parameters.

    Attributes:
        loss_module: The model.
        value: The loss in training.
    """

    loss_module: LossModule
    value: Tensor

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the loss at the parameters of the update.

        Args:
            parameters: Their values, no others: those along a ray are of :func:`tape`.
        """
        with self.rng_restored(), torch.no_grad():
            start = {**self.start(self._live(), parameters), **parameters}
            return Replay(self, start, {}, is_exact=True).losses([self.anchor])[0]

    @property
    def space(self) -> ParameterSpace:
        """The model's parameters."""
        return self.loss_module.space

    def training_loss(self) -> Tensor:
        """Return the loss that the update's own forward passes gave."""
        return self.value

    def value_and_gradient(self, leaves: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its gradient.

        Args:
            leaves: Parameters that require gradients.

        Raises:
            NoTapeError: A function's derivative is not that of its calls.
        """
        types = {slot.geometry[3] for call in self.calls for slot in call.makes() if slot.geometry is not None}
        if self.has_functions or any(dtype.is_complex for dtype in types):  # Conjugation is resolved below autograd.
            raise NoTapeError("an autograd.Function, or a function of complex numbers, has a derivative of its own")
        values: list[Any] = [None] * self.count
        for name, tensor in {**self.start(self._live(), leaves), **leaves}.items():
            if name in self.parameters:
                values[self.parameters[name].index] = tensor
        for call in needed_calls(self.calls, self.roots):
            if call.problem is not None:
                raise NoTapeError(call.problem)
            is_view = not call.written and any(
                slot.memory is out.memory for out in call.makes() for slot, _ in call.reads()
            )
            with torch.set_grad_enabled(call.has_grad or is_view):
                _differentiable_step(call, values, is_view)
        loss = self.unscaled(stacked([values[root.index].reshape(()) for root in self.roots]).sum(0))
        if not loss.requires_grad:
            raise NoDependenceError("The loss depends on no parameter that is in autograd's graph.")
        parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.detach(), {
            name: torch.zeros_like(leaf) if part is None else part
            for (name, leaf), part in zip(leaves.items(), parts, strict=True)
        }

    @contextmanager
    def rng_restored(self) -> Iterator[None]:
        """Turn autocast off, and restore generators after the body."""
        generators = {id(generator): generator for call in self.calls for generator, _ in call.states}
        before = [(generator, state_of(generator)) for generator in generators.values()]
        kinds = {constant.tensor.device.type for call in self.calls for constant in call.constants()} - {"meta"}
        with ExitStack() as stack:
            for kind in {"cpu", *kinds}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            try:
                yield
            finally:
                for generator, state in before:
                    set_state(generator, state)

    def reduced_precision(self) -> bool:
        """Return True if a call computes below single precision."""
        types = {slot.geometry[3] for call in self.calls for slot in call.makes() if slot.geometry is not None}
        return any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in types)

    def bytes_held(self) -> int:
        """Return the bytes of the constants of all calls."""
        tensors = [constant.tensor for call in self.calls for constant in call.constants()]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def start(self, origin: Parameters, moved: Container[str]) -> dict[str, Tensor]:
        """Return the parameters from which a replay starts.

        Those that are not moved have the values from before the forward pass wrote to them.
        """
        before = {name: tensor.clone() for name, tensor in self.initial.items() if name not in moved}
        return {**origin, **before}

    def _live(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.loss_module.space.parameters().items()}


def _differentiable_step(call: Call, values: list[Any], is_view: bool) -> None:
    """Make a call under autograd, as in training.

    A view is of both: who reads it says whether there is a dependence.
    """
    for generator, state in call.states:
        set_state(generator, state)
    args = [_differentiable(value, values, is_view) for value in call.args]
    kwargs = {name: _differentiable(value, values, is_view) for name, value in call.kwargs.items()}
    result = call.func(*args, **kwargs)
    if call.guard is not None:
        compare(call.guard, result)
    outputs = [result] if isinstance(result, Tensor) else result if isinstance(result, list | tuple) else []
    for slot, output in zip(call.outputs, outputs, strict=False):
        if slot is not None:
            values[slot.index] = output


def _differentiable(value: Any, values: Sequence[Any], is_view: bool) -> Any:
    """Return an argument with the dependence of training."""
    if isinstance(value, list):
        return [_differentiable(item, values, is_view) for item in value]
    if not isinstance(value, Read):
        return resolved(value)
    tensor = values[value.slot.index]
    if is_view:
        return tensor
    if value.requires_grad and not tensor.requires_grad:
        raise NoTapeError("an autograd.Function has a derivative of its own")
    return tensor.detach() if tensor.requires_grad and not value.requires_grad else tensor


def tape(ray: Ray) -> Tensor:
    """Return the K losses by replays of a `Tape`.

    Raises:
        NoTapeError: The calls cannot be repeated.
    """
    assert isinstance(ray.objective, Tape)
    with ray.objective.rng_restored(), torch.no_grad():
        replay = Replay(ray.objective, ray.objective.start(ray.origin, ray.direction), ray.direction)
        return torch.stack(replay.losses(ray.step_sizes))
