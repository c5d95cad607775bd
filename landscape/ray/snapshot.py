"""Snapshot and restore what a forward pass depends on besides parameters and inputs.

That is: buffers, attributes of modules, RNG state and autocast state.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from landscape.distributed.parameter_space import Parameters, clones
from landscape.errors import ProbeDeferred
from landscape.ray.loss_module import COMPARED_BYTES, LossModule, TensorSlot
from landscape.rng import HostRngState, RngState, has_rng_state

T = TypeVar("T")


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one type of device."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def capture(cls, device_types: Sequence[str]) -> "tuple[Autocast, ...]":
        """Return the current state of each device type."""
        return tuple(
            cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types
        )

    @staticmethod
    @contextmanager
    def restored(states: "tuple[Autocast, ...]") -> Iterator[None]:
        """Run the body in ``states``.

        Cast weights are not cached, because points share the memory of the weights.
        """
        with ExitStack() as stack:
            for was in states:
                if was.enabled or Autocast.capture([was.device_type]) != (was,):
                    stack.enter_context(torch.autocast(was.device_type, was.dtype, was.enabled, cache_enabled=False))
            yield


@dataclass(frozen=True)
class ForwardSnapshot:
    """State of a forward pass besides parameters and inputs.

    Attributes:
        loss_module: The model and its criterion.
        attributes: The attributes of every module, the train flag among them; lists and the like are not copied.
        tensors: Copies of the tensors to which a forward pass may write, with the dicts of the modules that hold them:
            all buffers, and parameters that are known to be written to.
        random: The RNG state.
        autocast: The autocast state of each type of device.
    """

    loss_module: LossModule
    attributes: Sequence[tuple[nn.Module, dict[str, Any]]]
    tensors: Sequence[TensorSlot]
    random: RngState
    autocast: tuple[Autocast, ...]

    @classmethod
    def capture(cls, loss_module: LossModule) -> "ForwardSnapshot":
        """Return the current state.

        Tensors that the next forward pass may write to are copied.
        """
        devices = loss_module.devices()
        return cls(
            loss_module,
            [(module, dict(vars(module))) for module in loss_module.modules() if module is not loss_module],
            _copies(loss_module.written_slots()),
            RngState.capture([device for device in devices if has_rng_state(device)]),
            Autocast.capture(sorted({"cpu"} | {device.type for device in devices if device.type != "meta"})),
        )

    def evaluate_at(
        self, function: Callable[[nn.Module], T], parameters: Parameters, moves: Sequence[Callable[[], object]]
    ) -> list[T]:
        """Return ``function(model)`` after each of ``moves``, from this state.

        The live model stays as it is. A timeline for two moves::

            replace the model's parameters by `parameters`, enter the autocast state
            restore RNG state, attributes, buffers; moves[0](); function(model)
            restore RNG state, attributes, buffers; moves[1](); function(model)
            put the model's parameters, attributes and buffers back

        Args:
            function: Evaluation of the model.
            parameters: Tensors by the names of ``model.named_parameters()``.
            moves: Functions that write to ``parameters``.

        Raises:
            ProbeDeferred: A module that is in neither the model nor its criterion was called and has changed. It is
                restored, and is a part of later snapshots.
        """
        loss_module = self.loss_module

        def run() -> list[T]:
            results = []
            for point, move in enumerate(moves):
                self._apply()
                move()
                detecting = nullcontext() if point else self._detect_foreign_modules()
                with loss_module.space.set_to(parameters), detecting:
                    results.append(function(loss_module.model))
            return results

        # One replacement for all points: it takes as long as the forward pass of a small model.
        replaced = loss_module.space.replaced_by(parameters, loss_module.modules())
        with self._modules_restored(), Autocast.restored(self.autocast), replaced:
            before = HostRngState.capture()
            results = run()
            if not loss_module.traits.draws and before.has_changed():
                loss_module.traits.draws = True
                results = run()
            return results

    def _apply(self) -> None:
        """Make this the current state, with new copies of tensors."""
        self.random.restore(host=self.loss_module.traits.draws)
        for module, attributes in self.attributes:
            vars(module).update(attributes)
        for owner, name, tensor in _copies(self.tensors):
            owner[name] = tensor

    @contextmanager
    def _modules_restored(self) -> Iterator[None]:
        """Restore what the modules hold after the body."""
        modules = [module for module, _ in self.attributes]
        attributes = [(module, dict(vars(module))) for module in modules]
        contents = ModuleContents(modules)
        try:
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            contents.restore()

    @contextmanager
    def _detect_foreign_modules(self) -> Iterator[None]:
        """Restore called modules that are not in this snapshot.

        They are in later ones.

        Raises:
            ProbeDeferred: One of them has changed.
        """
        # If parameters are sharded, an error on one rank would make the others wait.
        if self.loss_module.space.is_sharded:
            yield
            return
        known = {id(module) for module, _ in self.attributes}
        foreign: dict[int, ForeignModule] = {}
        thread = threading.get_ident()

        def before_forward(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() != thread:
                return  # another thread has a training of its own
            if id(module) not in known:
                for part in module.modules():
                    if id(part) not in known and id(part) not in foreign:
                        foreign[id(part)] = ForeignModule(part)

        hook = register_module_forward_pre_hook(before_forward)
        try:
            with self._hook_warnings_ignored():
                yield
        finally:
            hook.remove()
            changed = {key for key, module in foreign.items() if module.restore(self.loss_module)}
            alive = self._add_foreign(foreign)
        if names := sorted({type(alive[key]).__name__ for key in changed & alive.keys()}):
            raise ProbeDeferred(
                f"The loss changes modules outside of the model ({', '.join(names)}), which must be restored at each "
                "point. This update is skipped; later ones include these modules."
            )

    def _add_foreign(self, foreign: "dict[int, ForeignModule]") -> dict[int, nn.Module]:
        """Add foreign modules to the loss module, and return them.

        Only those that have tensors, and that outlive the pass.
        """
        # A module that the pass has made, such as nn.MSELoss() within the loss, dies when `foreign` releases it.
        stateful = [(key, weakref.ref(module.module)) for key, module in foreign.items() if module.has_state]
        foreign.clear()
        alive = {key: module for key, ref in stateful if (module := ref()) is not None}
        ids = {id(part) for part in self.loss_module.modules()}
        for key, module in alive.items():
            if key not in ids:
                self.loss_module.others.append(module)
                ids |= {id(part) for part in module.modules()}
        return alive

    @contextmanager
    def _hook_warnings_ignored(self) -> Iterator[None]:
        """Ignore warnings of compiled modules about global hooks."""
        if not any(hasattr(module, "_orig_mod") for module, _ in self.attributes):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*global hooks on modules", UserWarning)
            yield


class ModuleContents:
    """Parameters, buffers and submodules, compared and restored by identity."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (owner, dict(owner))
            for module in modules
            for owner in (module._parameters, module._buffers, module._modules)
            if owner
        ]

    def restore(self) -> list[str]:
        """Restore the objects, and return the names of changed ones."""
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
    """A module outside of a `LossModule`, before its first call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = dict(vars(module))
        self._contents = ModuleContents([module])
        owners = (module._buffers, module._parameters)
        tensors = [tensor for owner in owners for tensor in owner.values() if tensor is not None]
        self.has_state = bool(tensors)
        compared = tensors if sum(tensor.nbytes for tensor in tensors) <= COMPARED_BYTES else []
        self._values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in compared]

    def restore(self, loss_module: LossModule) -> bool:
        """Restore the module, and return True if it had changed.

        Parameters that had changed are added to the traits.
        """
        vars(self.module).clear()
        vars(self.module).update(self._attributes)
        changed = bool(self._contents.restore())
        for tensor, data, values in self._values:
            if tensor.data_ptr() != data.data_ptr() or not torch.equal(tensor, values):
                with torch.no_grad():
                    tensor.data = data
                    data.copy_(values)
                changed = True
                if isinstance(tensor, nn.Parameter):
                    loss_module.traits.written_parameters.add(id(tensor))
        return changed


def _copies(slots: Iterable[TensorSlot]) -> list[TensorSlot]:
    """Return the slots with one copy of each tensor."""
    slots = list(slots)
    copies = clones({id(tensor): tensor for _, _, tensor in slots})
    return [(owner, name, copies[id(tensor)]) for owner, name, tensor in slots]
