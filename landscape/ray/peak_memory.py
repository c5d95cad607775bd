"""How much memory a piece of code holds at its peak, on any device, by looking at every tensor that it makes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within it, ``peak`` is the most bytes that tensors made since it was entered have held at one time.

    Counted are dense tensors, not what kernels use inside or what an allocator keeps in reserve.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._hold((args, kwargs), counted=False)
        result = func(*args, **kwargs)
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self._hold(result, counted=True)
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result

    def held(self) -> int:
        """Bytes of tensors made within it that are still there."""
        return sum(size for reference, size in self._held.values() if not reference.expired())

    def _hold(self, values: Any, counted: bool) -> None:
        """Know the memory of these tensors; what is first seen as an argument was there before."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                # While its weak reference is held, the key cannot be that of another storage.
                self._held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counted else 0))
