"""The training loss of one update as a pure function of the parameters."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from landscape.errors import UserError

T = TypeVar("T")
Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor]
Place = tuple[Any, str, Any]
"""A module's own dict of buffers or parameters, the name of a tensor in it, and the tensor."""


class Scene(nn.Module):
    """A model and its criterion as one module, so that the tensors of both are known and can be swapped.

    The scene only holds them; it is never trained, moved or switched to another mode itself.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.moving: set[int] = set()
        """Frozen parameters (by id) that forward passes are known to write to, such as a momentum encoder's."""

    def written(self) -> list[Place]:
        """Buffers and moving parameters, which forward passes write to."""
        places: list[Place] = []
        for module in self.modules():
            places += [
                (module._buffers, name, buffer) for name, buffer in module._buffers.items() if buffer is not None
            ]
            places += [(module._parameters, name, p) for name, p in module._parameters.items() if id(p) in self.moving]
        return places

    def frozen_versions(self) -> dict[int, int]:
        """How often each frozen parameter (by id) was written to."""
        return {id(p): p._version for p in self.parameters() if not p.requires_grad and not p.is_inference()}

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
    """All that a forward pass reads besides its parameters and arguments, as far as it is held by the modules.

    Attributes:
        scene: The model and its criterion.
        attributes: The attributes of every module, the train flag among them; lists and the like are not copied.
        tensors: Copies of what a forward pass may write to, with the modules' own dicts that hold it: all buffers, and
            frozen parameters that are known to be written to.
        random: The random streams.
        autocast: The autocast state, for each kind of device.
    """

    scene: Scene
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]]
    tensors: Sequence[Place]
    random: RandomState
    autocast: tuple[Autocast, ...]

    @classmethod
    def capture(cls, scene: Scene) -> "ForwardState":
        """The state as it is now; the forward pass to come may move the tensors, so they are copied."""
        devices = scene.devices()
        return cls(
            scene,
            [(module, dict(vars(module))) for module in scene.modules()],
            _copies(scene.written()),
            RandomState.capture([device for device in devices if device.type in ("cuda", "xpu")]),
            Autocast.capture(sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})),
        )

    def each(self, function: Callable[[nn.Module], T], parameters: Parameters, moves: Iterable[object]) -> list[T]:
        """``function(model)`` after each of ``moves``, always from this state; the live model stays as it is.

        The moves write to ``parameters``, which stand for the model's own of these names meanwhile.
        """

        def run(model: nn.Module) -> Any:
            results = []
            for _ in moves:
                self._enter()
                results.append(function(model))
            return results

        tensors = {f"model.{name}": tensor for name, tensor in parameters.items()}
        with self._undone(), Autocast.restored(self.autocast):
            # One swap for all points: it takes as long as the forward pass of a small model.
            return functional_call(self.scene, tensors, (run,))

    def _enter(self) -> None:
        """Make this the current state, with tensors that may be written to."""
        self.random.restore()
        for module, attributes in self.attributes:
            vars(module).update(attributes)
        for owner, name, tensor in _copies(self.tensors):
            owner[name] = tensor

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """After the body, put back what the modules held before it."""
        attributes = [(module, dict(vars(module))) for module, _ in self.attributes]
        tensors = [(owner, name, owner[name]) for owner, name, _ in self.tensors]
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            for owner, name, tensor in tensors:
                owner[name] = tensor


def _copies(tensors: Iterable[Place]) -> list[Place]:
    """The same places with copies of their tensors; one that is in several places stays one."""
    places, copies = list(tensors), {}
    for _, _, tensor in places:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
    return [(owner, name, copies[id(tensor)]) for owner, name, tensor in places]


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
        return self.state.each(self._scalar, parameters, moves)

    def gradient(self, leaves: Parameters) -> tuple[Tensor, ...]:
        """The gradient of the weighted loss at ``leaves``, which require it, in their order.

        Raises:
            RuntimeError: The loss cannot be differentiated, or depends on none of them.
        """

        def differentiate(model: nn.Module) -> tuple[Tensor, ...]:
            # In here, so that what is computed again (checkpoints) finds the same tensors.
            loss = self.weighted(self._scalar(model))
            gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            if all(part is None for part in gradient):
                raise RuntimeError("The loss depends on no parameter that autograd knows of.")
            return tuple(
                torch.zeros_like(x) if part is None else part for x, part in zip(leaves.values(), gradient, strict=True)
            )

        return self.state.each(differentiate, leaves, [None])[0]

    def weighted(self, loss: Tensor) -> Tensor:
        """A loss, or several, times the weight."""
        return loss if self.weight is None else self.weight * loss

    def _scalar(self, model: nn.Module) -> Tensor:
        loss = self.closure(model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"The loss must be a scalar, a tensor with one element; the criterion or closure gave {got}."
            )
        # A copy: the loss could be (a view of) a parameter, and points share their memory.
        return loss.reshape(()).clone()


@dataclass(frozen=True)
class Objective:
    """The loss of one update, ``sum of weight * loss`` over its backward passes, as a function of the parameters.

    Calling it changes nothing in the live model: parameters and buffers are swapped for the call
    (:func:`torch.func.functional_call`), attributes of modules and random streams are put back.
    """

    terms: Sequence[Term]

    @classmethod
    def of(cls, model: nn.Module, closure: Closure) -> "Objective":
        """The objective ``closure(model)`` in the state that the model is in now."""
        scene = Scene(model)
        scene.moving = set(scene.frozen_versions())  # it is not known which of them the closure writes to
        return cls([Term(closure, ForwardState.capture(scene))])

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
        return torch.stack([term.weighted(loss) for term, loss in pairs]).sum(0)

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
