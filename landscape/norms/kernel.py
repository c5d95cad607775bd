"""The compiled kernel of ghost normalization, if there is one for a batch.

It is built when the package is installed where there is a C++ compiler with OpenMP.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_NAMES = {torch.float32: "float32", torch.float64: "float64"}
_BATCH = [*[ctypes.c_int64] * 4, *[ctypes.c_int] * 3]
"""Types of samples, positions, channels, groups, interleaved, channels_innermost, threads."""
_ARGUMENTS = {
    "forward": [*[ctypes.c_void_p] * 7, *_BATCH, ctypes.c_double],
    "backward": [*[ctypes.c_void_p] * 8, *_BATCH],
    "update": [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2, ctypes.c_double],
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None if there is none."""
    for suffix in EXTENSION_SUFFIXES:
        if (path := Path(__file__).with_name(f"_kernel{suffix}")).exists():
            try:
                return load(path)
            except OSError:  # built for another machine, or its OpenMP is gone
                return None
    return None


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled ``kernel.cpp``.

    Raises:
        OSError: It is not for this machine.
    """
    # Not imported: it is no module, so that it serves all versions of Python and torch. With torch's OpenMP, which is
    # loaded for all, there is one pool of threads.
    found = ctypes.CDLL(str(path))
    for name in _NAMES.values():
        for part, types in _ARGUMENTS.items():
            function = getattr(found, f"{name}_{part}")
            function.argtypes, function.restype = types, None
    return found


def takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return True if the kernel can normalize a batch.

    It must be contiguous or channels_last in memory.
    """
    if not x.is_cpu or x.dtype not in _NAMES or library() is None or not x.numel():
        return False
    return (x.is_contiguous() or _has_channels_innermost(x)) and all(
        one is None or _is_plain(one, x.dtype, x.shape[1:2]) for one in parameters
    )


def _has_channels_innermost(x: Tensor) -> bool:
    return (x if x.dim() == 2 else x.movedim(1, -1)).is_contiguous()


def takes_backward(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inv_std: Tensor, groups: int) -> bool:
    """Return True if the kernel can compute a backward pass."""
    # Saved tensors may come back in another form, from the hooks of torch.autograd.graph.
    statistics = torch.Size((groups, x.shape[1]))
    is_plain = all(_is_plain(one, x.dtype, statistics) for one in (mean, inv_std))
    return is_plain and takes(x, weight) and dy.is_cpu and dy.dtype is x.dtype and dy.shape == x.shape


def takes_statistics(running: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> bool:
    """Return True if the kernel can update running statistics."""
    (first, _), shape = running, batch[0].shape
    if first.dtype not in _NAMES or library() is None:
        return False
    return all(
        _is_plain(one, first.dtype, size) for pair, size in ((running, shape[1:]), (batch, shape)) for one in pair
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> bool:
    # The kernel gets addresses, so that anything else would be read beyond its end.
    return tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, and mean, unbiased variance and inv_std (G, C)."""
    y = torch.empty_like(x)
    mean, var, inv_std = (x.new_empty(groups, x.shape[1]) for _ in range(3))
    addresses = map(_address, (x, weight, bias, y, mean, var, inv_std))
    _function(x, "forward")(*addresses, *_batch(x, groups, interleaved), eps)
    return y, mean, var, inv_std


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inv_std: Tensor, groups: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias."""
    dy = dy.movedim(1, -1).contiguous() if x.dim() > 2 and _has_channels_innermost(x) else dy.contiguous()
    dx = torch.empty_like(x)
    # The first row is the sum over the groups.
    dweight, dbias = mean.new_empty(2, groups, mean.shape[1])
    addresses = map(_address, (dy, x, weight, mean, inv_std, dx, dweight, dbias))
    _function(x, "backward")(*addresses, *_batch(x, groups, interleaved))
    return dx, dweight[0], dbias[0]


def update_running_stats(running: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor], momentum: float) -> None:
    """Move running statistics (C,) towards means over groups (G, C)."""
    _function(running[0], "update")(*map(_address, (*running, *batch)), *batch[0].shape, momentum)
    increment_version(running)


def _function(x: Tensor, name: str) -> Callable[..., None]:
    return getattr(library(), f"{_NAMES[x.dtype]}_{name}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _batch(x: Tensor, groups: int, interleaved: bool) -> tuple[int, ...]:
    samples, channels = x.shape[:2]
    layout = int(interleaved), int(_has_channels_innermost(x))
    return samples, x.shape[2:].numel(), channels, groups, *layout, torch.get_num_threads()
