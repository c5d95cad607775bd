"""All that a forward pass reads besides its parameters and arguments: remembered, entered again, and put back."""

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from landscape.distributed.fsdp import ShardedParameters, local
from landscape.errors import ProbeDeferred
from landscape.rng import HostRngState, RngState

T = TypeVar("T")
Closure = Callable[[nn.Module], Tensor]
Parameters = Mapping[str, Tensor]
TensorSlot = tuple[Any, str, Any]
"""A module's own dict of buffers or parameters, the name of a tensor in it, and the tensor."""


COMPARED_BYTES = 1 << 30
"""Most bytes of parameters that are compared before and after a first evaluation."""


class LossModule(nn.Module):
    """A model and its criterion as one module, so that the tensors of both are known and can be swapped.

    The scene only holds them; it is never called, trained, moved or switched to another mode itself.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module | None = None, shards: ShardedParameters | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.others = nn.ModuleList()
        """Modules that belong to neither, but are called by the loss: a discriminator, a teacher."""
        self.shards = shards
        """What this process holds of the model, where it is spread over several."""
        self.written_parameters: set[int] = set()
        """Parameters (by id) that forward passes are known to write to, such as a momentum encoder's."""
        self.draws = shards is not None
        """Whether forward passes are known to draw from Python's or numpy's random streams, or may on another rank."""
        self.differentiates = False
        """Whether the loss is known to compute derivatives itself, so that it needs gradients where they are off."""
        self.streamed: set[str] = set()
        """Weights of the model that are known to be built in blocks."""
        self.shares_nothing = False
        """Whether points of a ray are known to have no linear operation in common."""
        self.shared: set[str] = set()
        """Parameters of the model whose linear layers are known to have the same input all along a ray."""

    def written_slots(self) -> list[TensorSlot]:
        """Buffers and moving parameters, which forward passes write to."""
        places: list[TensorSlot] = []
        for module in self.modules():
            places += [
                (module._buffers, name, buffer) for name, buffer in module._buffers.items() if buffer is not None
            ]
            places += [
                (module._parameters, name, p)
                for name, p in module._parameters.items()
                if id(p) in self.written_parameters
            ]
        return places

    def frozen_versions(self) -> dict[int, int]:
        """How often each frozen parameter (by id) was written to; not known where forward passes gather them."""
        if self.shards is not None:
            return {}
        return {id(p): p._version for p in self.parameters() if not p.requires_grad and not p.is_inference()}

    @contextmanager
    def detect_writes(self, walked: Collection[str]) -> Iterator[None]:
        """Put back what the body writes to parameters of the model but the ``walked``, and know that it was written to.

        Values are compared, because a write through ``.data`` leaves no other trace. Above 1 GiB nothing is.
        """
        others = [p for name, p in self.model.named_parameters() if name not in walked]
        known = others if sum(p.nbytes for p in others) <= COMPARED_BYTES else []
        before = [(parameter, parameter.data, parameter.detach().clone()) for parameter in known]
        try:
            yield
        finally:
            for parameter, data, values in before:
                if parameter.data_ptr() != data.data_ptr() or not torch.equal(parameter, values):
                    parameter.data = data
                    data.copy_(values)
                    self.written_parameters.add(id(parameter))

    @contextmanager
    def parameters_replaced_by(self, tensors: Parameters) -> Iterator[None]:
        """For the body, put ``tensors`` where the model's parameters of these names are, in every module that has them.

        A parameter is known by identity: it, or the module that holds it, may have several names.
        """
        named = self.model.named_parameters()
        stand_ins = {id(parameter): tensors[name] for name, parameter in named if name in tensors}
        places: list[TensorSlot] = [
            (module._parameters, name, parameter)
            for module in self.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in stand_ins
        ]
        try:
            for owner, name, parameter in places:
                owner[name] = stand_ins[id(parameter)]
            yield
        finally:
            for owner, name, parameter in places:
                owner[name] = parameter

    def is_lazy(self) -> bool:
        """Whether a module does not know its shapes before its first forward pass."""
        tensors = [*self.parameters(), *self.buffers()]
        return any(map(is_lazy, tensors))

    def devices(self) -> set[torch.device]:
        """Every device that a parameter or a buffer lives on, or is gathered on."""
        gathered = set() if self.shards is None else {self.shards.device}
        return gathered | {tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors}

    def named_trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the model by name, as an optimizer holds them."""
        return dict(self.model.named_parameters()) if self.shards is None else self.shards.parameters()

    def local(self, tensor: Tensor) -> Tensor:
        """A parameter or its gradient, detached; where it is spread, what this process holds of it."""
        return tensor.detach() if self.shards is None else local(tensor)

    @contextmanager
    def sharded_parameters_set_to(self, point: Parameters) -> Iterator[None]:
        """For the body, which is a forward pass, put ``point`` where parameters are spread; elsewhere it is swapped."""
        with nullcontext() if self.shards is None else self.shards.parameters_set_to(point):
            yield


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
class ForwardSnapshot:
    """All that a forward pass reads besides its parameters and arguments, as far as it is held by the modules.

    Attributes:
        scene: The model and its criterion.
        attributes: The attributes of every module, the train flag among them; lists and the like are not copied.
        tensors: Copies of what a forward pass may write to, with the modules' own dicts that hold it: all buffers, and
            parameters that are known to be written to.
        random: The random streams.
        autocast: The autocast state, for each kind of device.
    """

    scene: LossModule
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]]
    tensors: Sequence[TensorSlot]
    random: RngState
    autocast: tuple[Autocast, ...]
    detects_foreign_modules: bool = True
    """Whether to look for modules outside of the scene; code that is to be compiled does not bear it."""

    @classmethod
    def capture(cls, scene: LossModule) -> "ForwardSnapshot":
        """The state as it is now; the forward pass to come may move the tensors, so they are copied."""
        devices = scene.devices()
        return cls(
            scene,
            [(module, dict(vars(module))) for module in scene.modules() if module is not scene],
            _copies(scene.written_slots()),
            RngState.capture([device for device in devices if device.type in ("cuda", "xpu")]),
            Autocast.capture(sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})),
        )

    def evaluate_at(
        self, function: Callable[[nn.Module], T], parameters: Parameters, moves: Sequence[Callable[[], object]]
    ) -> list[T]:
        """``function(model)`` after each of ``moves``, always from this state; the live model stays as it is.

        The moves write to ``parameters``, which stand for the model's own of these names meanwhile.

        Raises:
            ProbeDeferred: A module that belongs neither to the model nor to its criterion was called, and has changed. It
                is put back, and belongs to the states that are captured from now on.
        """

        def run() -> list[T]:
            results = []
            for point, move in enumerate(moves):
                self._apply()
                move()
                looking = nullcontext() if point else self._detect_foreign_modules()
                with self.scene.sharded_parameters_set_to(parameters), looking:
                    results.append(function(self.scene.model))
            return results

        swapped = parameters if self.scene.shards is None else {}
        # One swap for all points: it takes as long as the forward pass of a small model.
        with self._modules_restored(), Autocast.restored(self.autocast), self.scene.parameters_replaced_by(swapped):
            before = HostRngState.capture()
            results = run()
            if not self.scene.draws and before.has_changed():
                self.scene.draws = True
                results = run()
            return results

    def written_copies(self, points: int) -> list[Tensor]:
        """Copies of what a forward pass may write to, in the order of ``tensors``; the first dimension is the point."""
        copies: dict[int, Tensor] = {}
        for _, _, tensor in self.tensors:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.expand(points, *tensor.shape).clone()
        return [copies[id(tensor)] for _, _, tensor in self.tensors]

    def enter_written(self, tensors: Sequence[Tensor]) -> None:
        """Put ``tensors``, in the order of this state's own, where the modules hold what forward passes write to."""
        for (owner, name, _), tensor in zip(self.tensors, tensors, strict=True):
            owner[name] = tensor

    def _apply(self) -> None:
        """Make this the current state, with tensors that may be written to."""
        self.random.restore(host=self.scene.draws)
        for module, attributes in self.attributes:
            vars(module).update(attributes)
        for owner, name, tensor in _copies(self.tensors):
            owner[name] = tensor

    @contextmanager
    def _modules_restored(self) -> Iterator[None]:
        """After the body, put back what the modules held before it."""
        modules = [module for module, _ in self.attributes]
        attributes = [(module, dict(vars(module))) for module in modules]
        held = ModuleContents(modules)
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            held.restore()

    @contextmanager
    def _detect_foreign_modules(self) -> Iterator[None]:
        """Look for modules that the body calls although they are not in this state, and put back what it does to them.

        Raises:
            ProbeDeferred: One of them has changed.
        """
        # An error on one of several ranks that gather parameters would leave the others waiting.
        if not self.detects_foreign_modules or self.scene.shards is not None:
            yield
            return
        known = {id(module) for module, _ in self.attributes}
        met: dict[int, ForeignModule] = {}
        thread = threading.get_ident()

        def meet(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() != thread:
                return  # another thread has a training of its own
            if id(module) not in known:
                for part in module.modules():
                    if id(part) not in known and id(part) not in met:
                        met[id(part)] = ForeignModule(part)

        hook = register_module_forward_pre_hook(meet)
        try:
            with self._quietly():
                yield
        finally:
            hook.remove()
            changed = {number for number, stranger in met.items() if stranger.restore(self.scene)}
            ids = {id(part) for part in self.scene.modules()}
            # One that was made during the pass, such as nn.MSELoss() inside of the loss, is gone when it is let go.
            kept = [(number, weakref.ref(stranger.module)) for number, stranger in met.items() if stranger.has_state]
            met.clear()
            alive = {number: module for number, ref in kept if (module := ref()) is not None}
            for number, module in alive.items():
                if number not in ids:
                    self.scene.others.append(module)
                    ids |= {id(part) for part in module.modules()}
        if names := sorted({type(alive[number]).__name__ for number in changed & alive.keys()}):
            raise ProbeDeferred(
                f"The loss calls modules outside of the model that it changes ({', '.join(names)}); they are put back, "
                "and from the next update on they are measured in the state of the training step, too."
            )

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Keep compiled modules, which run as they are within the body, from warning of the hook that is there."""
        if not any(hasattr(module, "_orig_mod") for module, _ in self.attributes):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*global hooks on modules", UserWarning)
            yield


class ModuleContents:
    """What modules hold by name: parameters, buffers and other modules, compared and put back by identity."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (owner, dict(owner))
            for module in modules
            for owner in (module._parameters, module._buffers, module._modules)
            if owner
        ]

    def restore(self) -> list[str]:
        """Put back what is not the same object any more; the names that this has changed."""
        names = []
        for owner, before in self._held:
            if len(owner) == len(before) and all(map(_same, owner.items(), before.items())):
                continue
            names += [name for name in owner | before if owner.get(name) is not before.get(name)]
            owner.clear()
            owner.update(before)
        return names


def _same(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    return one[1] is other[1] and one[0] == other[0]


class ForeignModule:
    """A module outside of a scene, as it is before a pass calls it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = dict(vars(module))
        self._held = ModuleContents([module])
        owners = (module._buffers, module._parameters)
        tensors = [tensor for owner in owners for tensor in owner.values() if tensor is not None]
        self.has_state = bool(tensors)
        values = tensors if sum(tensor.nbytes for tensor in tensors) <= COMPARED_BYTES else []
        self._values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in values]

    def restore(self, scene: LossModule) -> bool:
        """Make the module what it was, and return whether it had changed; parameters that had are moving ones."""
        vars(self.module).clear()
        vars(self.module).update(self._attributes)
        changed = bool(self._held.restore())
        for tensor, data, values in self._values:
            if tensor.data_ptr() != data.data_ptr() or not torch.equal(tensor, values):
                with torch.no_grad():
                    tensor.data = data
                    data.copy_(values)
                changed = True
                if isinstance(tensor, nn.Parameter):
                    scene.written_parameters.add(id(tensor))
        return changed


def _copies(tensors: Iterable[TensorSlot]) -> list[TensorSlot]:
    """The same places with copies of their tensors; one that is in several places stays one."""
    places, copies = list(tensors), {}
    for _, _, tensor in places:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
    return [(owner, name, copies[id(tensor)]) for owner, name, tensor in places]
