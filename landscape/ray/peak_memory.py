"""Peak memory of a piece of code on any device, from all tensors it makes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryLimitError(RuntimeError):
    """A computation that was stopped at a limit of memory."""


class PeakMemory(TorchDispatchMode):
    """A mode that measures the peak of held memory.

    ``peak`` is the most bytes held at one time by dense tensors made within it. Memory that kernels use inside, or that
    an allocator reserves, is not counted.

    Args:
        limit: Most bytes that may be held; None for any number.

    Raises:
        MemoryLimitError: More is held, from within the call that made the last tensor.

    Examples:
        >>> with PeakMemory() as memory:
        ...     twice = torch.ones(100) * 2  # 400 bytes, and as many of ones
        >>> memory.peak, memory.held()
        (800, 400)
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.peak, self._limit = 0, limit
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add((args, kwargs), counted=False)
        result = func(*args, **kwargs)
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self._add(result, counted=True)
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        if self._limit is not None and self.peak > self._limit:
            raise MemoryLimitError(f"{self.peak:,} bytes are held, of {self._limit:,} that are allowed")
        return result

    def held(self) -> int:
        """Return the bytes of tensors that are still alive."""
        return sum(size for reference, size in self._held.values() if not reference.expired())

    def _add(self, values: Any, counted: bool) -> None:
        # A tensor that is first an argument was there before, and counts 0 bytes.
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                # While its weak reference is held, the key cannot be that of another storage.
                self._held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counted else 0))


def memory_limit(limit: int | None) -> AbstractContextManager[object]:
    """Bound the memory that the body holds; None does nothing.

    Raises:
        MemoryLimitError: The body holds more bytes.
    """
    return nullcontext() if limit is None else PeakMemory(limit)
