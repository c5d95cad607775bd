"""Linear layers of a model whose outputs in the training step are kept, because rays can make use of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from landscape.ray.linear_cache import CachedLinear
from landscape.ray.loss_module import LossModule


@dataclass(frozen=True)
class Hook:
    """A hook that stays behind when its module is copied or pickled."""

    function: Any

    def __call__(self, *args: Any) -> None:
        """Call the function."""
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What the hook of a copied module does."""


class Layers:
    """Listens to the layers that rays have turned out to share: one product less for each of them."""

    def __init__(self, scene: LossModule) -> None:
        self._scene = scene
        self._handles: list[RemovableHandle] = []
        self._watched: set[str] = set()
        self.bases: list[CachedLinear] | None = None
        """What is kept of the forward pass that is under way."""

    def refresh(self) -> None:
        """Before a forward pass: listen to the layers that are shared by now."""
        if self._scene.traits.shared == self._watched:
            return
        self.detach()
        self._watched = set(self._scene.traits.shared)
        model = self._scene.model
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
            return  # a hook would make compiled code compile anew
        for name, parameter in model.named_parameters():
            path, _, own = name.rpartition(".")
            layer = model.get_submodule(path)
            if name in self._watched and own == "weight" and type(layer) is nn.Linear:
                hook = Hook(partial(self._after_linear, path=path, weight=parameter))
                self._handles.append(layer.register_forward_hook(hook, prepend=True))

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], set()

    def current(self, bases: Sequence[CachedLinear]) -> list[CachedLinear]:
        """Those that are still true; where an activation has overwritten one, the next is kept as a copy."""
        current = [base for base in bases if base.is_valid()]
        self._scene.traits.overwritten.update(*(base.parameters for base in bases if base not in current))
        return current

    def _after_linear(self, layer: nn.Module, args: tuple[Any, ...], outputs: Any, path: str, weight: Tensor) -> None:
        """Keep what the layer has computed, if it is what affine evaluation would compute."""
        own = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
        if self.bases is None or own.get("weight") is not weight or len(args) != 1 or "forward" in vars(layer):
            return
        tensors = [*args, outputs]
        if not all(type(tensor) is Tensor and not tensor.is_inference() for tensor in tensors):
            return
        if own.keys() <= {"weight", "bias"} and outputs.dtype in (torch.float32, torch.float64):
            parameters = {f"{path}.{name}".lstrip("."): own[name] for name in ("weight", "bias") if name in own}
            outputs = outputs.detach().clone() if self._scene.traits.overwritten & parameters.keys() else outputs
            self.bases.append(CachedLinear.of(parameters, args[0], outputs))
