"""The training loss of one update as a pure function of the parameters."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from landscape.errors import UserError

Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor]


class Scene(nn.Module):
    """A model and its criterion as one module, so that the buffers of both are known and can be swapped.

    The scene only holds them; it is never trained, moved or switched to another mode itself.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, closure: Closure) -> Tensor:
        """``closure(model)``; a forward pass, so that ``functional_call`` can swap tensors around it."""
        return closure(self.model)

    def devices(self) -> set[torch.device]:
        """Every device that a parameter or a buffer lives on."""
        return {tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors}


@dataclass(frozen=True)
class RandomState:
    """The state of every global random stream: Python's, numpy's, torch's on the CPU and on accelerators."""

    python: Any
    numpy: dict[str, Any]
    cpu: Tensor
    accelerators: Mapping[torch.device, Tensor]

    @classmethod
    def capture(cls, accelerators: Sequence[torch.device]) -> "RandomState":
        """The state as it is now, on the CPU and on the ``accelerators``."""
        on_device = {device: torch.get_device_module(device).get_rng_state(device) for device in accelerators}
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), on_device)  # noqa: NPY002

    def restore(self) -> None:
        """Make it the current state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one kind of device."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def capture(cls, device_types: Sequence[str]) -> "tuple[Autocast, ...]":
        """The state as it is now, for each of the ``device_types``."""
        return tuple(
            cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types
        )

    @staticmethod
    @contextmanager
    def restored(states: "tuple[Autocast, ...]") -> Iterator[None]:
        """Run the body in ``states``; enters nothing where they are the current ones."""
        with ExitStack() as stack:
            for was in states:
                if Autocast.capture([was.device_type]) != (was,):
                    stack.enter_context(torch.autocast(was.device_type, was.dtype, was.enabled, cache_enabled=False))
            yield


@dataclass(frozen=True)
class ForwardState:
    """All that a forward pass reads besides its parameters and arguments."""

    scene: Scene
    buffers: Sequence[tuple[nn.Module, str, Tensor]]
    modes: Sequence[tuple[nn.Module, bool]]
    random: RandomState
    autocast: tuple[Autocast, ...]

    @classmethod
    def capture(cls, scene: Scene) -> "ForwardState":
        """The state as it is now; buffers are cloned, since the forward pass to come may move them."""
        devices = scene.devices()
        return cls(
            scene,
            [(module, name, buffer.clone()) for module, name, buffer in _buffers(scene)],
            [(module, module.training) for module in scene.modules()],
            RandomState.capture([device for device in devices if device.type in ("cuda", "xpu")]),
            Autocast.capture(sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})),
        )

    def losses(self, closure: Closure, parameters: Parameters, moves: Iterable[object]) -> list[Tensor]:
        """``closure(model)`` after each of ``moves``, always from this state; the live model stays as it is.

        The moves write to ``parameters``, which stand for the model's own of these names meanwhile.
        """

        def run(model: nn.Module) -> Any:
            return [closure(model) for _ in moves if self._enter()]

        tensors = {f"model.{name}": tensor for name, tensor in parameters.items()}
        with self._undone(), Autocast.restored(self.autocast):
            # One swap for all points: it takes as long as the forward pass of a small model.
            return functional_call(self.scene, tensors, (run,))

    def _enter(self) -> bool:
        """Make this the current state, with buffers that may be written to; always true."""
        self.random.restore()
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer.clone()
        return True

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Run the body in the train flags of this state; then put back the flags and buffers that were there before."""
        buffers, changed = _buffers(self.scene), [module for module, mode in self.modes if module.training != mode]
        # Set as plain flags: train() and eval() recurse and may be overridden.
        for module in changed:
            module.training = not module.training
        try:
            yield
        finally:
            for module in changed:
                module.training = not module.training
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


def _buffers(scene: Scene) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer with the module that owns it and its name there."""
    return [(module, name, b) for module in scene.modules() for name, b in module.named_buffers(recurse=False)]


@dataclass
class Term:
    """The loss of one backward pass: ``weight * closure(model)`` in the state of the forward pass."""

    closure: Closure
    state: ForwardState
    value: Tensor | None = None
    """What the forward pass gave, detached."""
    weight: Tensor | None = None
    """Derivative of what was differentiated by this loss (1/n under accumulation over n batches); None is 1."""

    def __call__(self, parameters: Parameters) -> Tensor:
        """The unweighted loss at ``parameters``, a scalar tensor."""
        return self.losses(parameters, [None])[0]

    def losses(self, parameters: Parameters, moves: Iterable[object]) -> list[Tensor]:
        """The unweighted loss after each of ``moves``, which write to ``parameters``; scalar tensors."""
        return self.state.losses(self._scalar, parameters, moves)

    def _scalar(self, model: nn.Module) -> Tensor:
        loss = self.closure(model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"The closure must return a scalar loss, a tensor with one element; it returned {got}.")
        # A copy: the loss could be (a view of) a parameter, and points share their memory.
        return loss.reshape(()).clone()


@dataclass(frozen=True)
class Objective:
    """The loss of one update, ``sum of weight * loss`` over its backward passes, as a function of the parameters.

    Calling it changes nothing in the live model: parameters and buffers are swapped for the call
    (:func:`torch.func.functional_call`), train flags and random streams are put back.
    """

    terms: Sequence[Term]

    @classmethod
    def of(cls, model: nn.Module, closure: Closure) -> "Objective":
        """The objective ``closure(model)`` in the state that the model is in now."""
        return cls([Term(closure, ForwardState.capture(Scene(model)))])

    def __call__(self, parameters: Parameters) -> Tensor:
        """The loss at ``parameters`` (tensors by the names of ``model.named_parameters()``), a scalar tensor."""
        with self.undisturbed():
            return self.total([term(parameters) for term in self.terms])

    def recorded(self) -> Tensor:
        """The loss that the forward passes of the update gave, a scalar tensor."""
        return self.total([term.value for term in self.terms if term.value is not None])

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Weighted sum over the terms of their ``losses``, which may all carry the same further dimensions."""
        pairs = zip(self.terms, losses, strict=True)
        return torch.stack([loss if term.weight is None else term.weight * loss for term, loss in pairs]).sum(0)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put the random streams back after the body, which calls terms."""
        before = RandomState.capture(list(self.terms[0].state.random.accelerators))
        # Compiled code is specialized on live parameters: swapping them would compile anew at every point.
        with torch.compiler.set_stance("force_eager"):
            try:
                yield
            finally:
                before.restore()
