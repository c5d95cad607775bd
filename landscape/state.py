"""All that a forward pass reads besides its parameters and arguments: remembered, entered again, and put back."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from landscape.sharded import Shards, local

T = TypeVar("T")
Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor]
Place = tuple[Any, str, Any]
"""A module's own dict of buffers or parameters, the name of a tensor in it, and the tensor."""


GUARDED = 1 << 30
"""Most bytes of parameters that are compared before and after a first evaluation."""


class Scene(nn.Module):
    """A model and its criterion as one module, so that the tensors of both are known and can be swapped.

    The scene only holds them; it is never trained, moved or switched to another mode itself.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None, shards: Shards | None = None) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.shards = shards
        """What this process holds of the model, where it is spread over several."""
        self.moving: set[int] = set()
        """Parameters (by id) that forward passes are known to write to, such as a momentum encoder's."""
        self.draws = shards is not None
        """Whether forward passes are known to draw from Python's or numpy's random streams, or may on another rank."""
        self.streamed: set[str] = set()
        """Weights of the model that are known to be built in blocks."""
        self.shares_nothing = False
        """Whether points of a ray are known to have no linear operation in common."""
        self.shared: set[str] = set()
        """Parameters of the model whose linear layers are known to have the same input all along a ray."""

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
        """How often each frozen parameter (by id) was written to; not known where forward passes gather them."""
        if self.shards is not None:
            return {}
        return {id(p): p._version for p in self.parameters() if not p.requires_grad and not p.is_inference()}

    @contextmanager
    def guarded(self, walked: Collection[str]) -> Iterator[None]:
        """Put back what the body writes to parameters of the model but the ``walked``, and know that it was written to.

        Values are compared, because a write through ``.data`` leaves no other trace. Above 1 GiB nothing is.
        """
        others = [p for name, p in self.model.named_parameters() if name not in walked]
        known = others if sum(p.nbytes for p in others) <= GUARDED else []
        before = [(parameter, parameter.data, parameter.detach().clone()) for parameter in known]
        try:
            yield
        finally:
            for parameter, data, values in before:
                if parameter.data_ptr() != data.data_ptr() or not torch.equal(parameter, values):
                    parameter.data = data
                    data.copy_(values)
                    self.moving.add(id(parameter))

    def forward(self, closure: Closure) -> Tensor:
        """``closure(model)``; a forward pass, so that ``functional_call`` can swap tensors around it."""
        return closure(self.model)

    def is_lazy(self) -> bool:
        """Whether a module does not know its shapes before its first forward pass."""
        tensors = [*self.parameters(), *self.buffers()]
        return any(map(is_lazy, tensors))

    def devices(self) -> set[torch.device]:
        """Every device that a parameter or a buffer lives on, or is gathered on."""
        gathered = set() if self.shards is None else {self.shards.device}
        return gathered | {tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the model by name, as an optimizer holds them."""
        return dict(self.model.named_parameters()) if self.shards is None else self.shards.parameters()

    def own(self, tensor: Tensor) -> Tensor:
        """A parameter or its gradient, detached; where it is spread, what this process holds of it."""
        return tensor.detach() if self.shards is None else local(tensor)

    @contextmanager
    def at(self, point: Parameters) -> Iterator[None]:
        """For the body, which is a forward pass, put ``point`` where parameters are spread; elsewhere it is swapped."""
        with nullcontext() if self.shards is None else self.shards.at(point):
            yield


@dataclass(frozen=True)
class HostStreams:
    """The state of Python's and numpy's random streams, which take longer to put back than a small layer takes."""

    python: Any
    numpy: dict[str, Any]

    @classmethod
    def capture(cls) -> "HostStreams":
        """The state as it is now."""
        return cls(random.getstate(), np.random.get_state(legacy=False))  # noqa: NPY002

    def restore(self) -> None:
        """Make it the current state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        now = HostStreams.capture()
        if now.python != self.python or now.numpy["has_gauss"] != self.numpy["has_gauss"]:
            return True
        states = now.numpy["state"].values(), self.numpy["state"].values()
        return not all(map(np.array_equal, *states))


@dataclass(frozen=True)
class RandomState:
    """The state of every global random stream: the host's, torch's on the CPU and on accelerators."""

    host: HostStreams
    cpu: Tensor
    accelerators: Mapping[torch.device, Tensor]

    @classmethod
    def capture(cls, accelerators: Sequence[torch.device]) -> "RandomState":
        """The state as it is now, on the host and on the ``accelerators``."""
        on_device = {device: torch.get_device_module(device).get_rng_state(device) for device in accelerators}
        return cls(HostStreams.capture(), torch.get_rng_state(), on_device)

    def restore(self, host: bool = True) -> None:
        """Make it the current state; ``host=False`` leaves out the streams of Python and numpy."""
        if host:
            self.host.restore()
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
        """Run the body in ``states``, without the cache of weights that were cast: points share their memory."""
        with ExitStack() as stack:
            for was in states:
                if was.enabled or Autocast.capture([was.device_type]) != (was,):
                    stack.enter_context(torch.autocast(was.device_type, was.dtype, was.enabled, cache_enabled=False))
            yield


@dataclass(frozen=True)
class ForwardState:
    """All that a forward pass reads besides its parameters and arguments, as far as it is held by the modules.

    Attributes:
        scene: The model and its criterion.
        attributes: The attributes of every module, the train flag among them; lists and the like are not copied.
        tensors: Copies of what a forward pass may write to, with the modules' own dicts that hold it: all buffers, and
            parameters that are known to be written to.
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
            [(module, dict(vars(module))) for module in scene.modules() if module is not scene],
            _copies(scene.written()),
            RandomState.capture([device for device in devices if device.type in ("cuda", "xpu")]),
            Autocast.capture(sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})),
        )

    def each(
        self, function: Callable[[nn.Module], T], parameters: Parameters, moves: Sequence[Callable[[], object]]
    ) -> list[T]:
        """``function(model)`` after each of ``moves``, always from this state; the live model stays as it is.

        The moves write to ``parameters``, which stand for the model's own of these names meanwhile.
        """

        def run(model: nn.Module) -> Any:
            results = []
            for move in moves:
                self._enter()
                move()
                with self.scene.at(parameters):
                    results.append(function(model))
            return results

        swapped = parameters if self.scene.shards is None else {}
        tensors = {f"model.{name}": tensor for name, tensor in swapped.items()}
        with self._undone(), Autocast.restored(self.autocast):
            before = HostStreams.capture()
            # One swap for all points: it takes as long as the forward pass of a small model.
            results = functional_call(self.scene, tensors, (run,))
            if not self.scene.draws and before.moved():
                self.scene.draws = True
                results = functional_call(self.scene, tensors, (run,))
            return results

    def written_copies(self, points: int) -> dict[str, Tensor]:
        """What a forward pass may write to, once for each of ``points`` (the first dimension), by the scene's names."""
        places = {
            (id(module._buffers), id(module._parameters)): prefix for prefix, module in self.scene.named_modules()
        }
        copies = {}
        for owner, name, tensor in self.tensors:
            prefix = next(prefix for owners, prefix in places.items() if id(owner) in owners)
            copies[f"{prefix}.{name}".lstrip(".")] = tensor.expand(points, *tensor.shape).clone()
        return copies

    def _enter(self) -> None:
        """Make this the current state, with tensors that may be written to."""
        self.random.restore(host=self.scene.draws)
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
