"""Slices of a batch: one channel in one group of samples, as dimensions of a view."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and other dtypes unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x


def with_strides_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y, in memory like ``x``, or like ``empty_like(x)``."""
    if y.stride() == x.stride() or y.stride() == (like := torch.empty_like(x)).stride():
        return y
    return like.copy_(y)


class Slices(NamedTuple):
    """View of a batch, with dimensions of its slices.

    A slice holds the values of one channel in one group of samples. The view follows the batch in memory, so that
    neither a contiguous nor a channels_last batch is copied.

    Attributes:
        shape: Shape of the view.
        dims: Dimensions of the view that run over the values of a slice, positions before samples.
        channels_last: True if the batch is channels_last in memory.

    Examples:
        >>> slices_of(torch.zeros(12, 64, 8, 8), groups=3, interleaved=False)
        Slices(shape=(3, 4, 64, 64), dims=(3, 1), channels_last=False)
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    channels_last: bool

    @property
    def numel(self) -> int:
        """Number of values of a slice."""
        return prod([self.shape[dim] for dim in self.dims])

    @property
    def channels_innermost(self) -> bool:
        """True if channels are the view's last dimension."""
        return 3 not in self.dims

    def view(self, x: Tensor) -> Tensor:
        """Return the view of a batch, in at least float32."""
        return at_least_float32((x.movedim(1, -1) if self.channels_last else x).reshape(self.shape))

    def unview(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a view in the form of the batch ``x``."""
        y = y.view(x.movedim(1, -1).shape).movedim(-1, 1) if self.channels_last else y.view(x.shape)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def broadcast(self, parameter: Tensor) -> Tensor:
        """Return (C,) in a shape that broadcasts over the view."""
        return parameter if self.channels_innermost else parameter.unsqueeze(-1)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over each slice, with dimensions kept."""
        # Two reductions over one dimension take less time than one over both.
        for dim in self.dims:
            x = x.sum(dim, keepdim=True)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each slice, with dimensions kept."""
        for dim in self.dims:
            x = x.mean(dim, keepdim=True)
        return x

    def of_slices(self, statistic: Tensor) -> Tensor:
        """Return (G, C) in a shape that broadcasts."""
        return statistic.view([1 if dim in self.dims else size for dim, size in enumerate(self.shape)])


def slices_of(x: Tensor, groups: int, interleaved: bool) -> Slices:
    """Return the slices of a batch in equal groups.

    Args:
        x: (M, C) or (M, C, ...).
        groups: Number of groups of samples; divides M.
        interleaved: True if sample i is in group i mod groups, False if a group is a run of consecutive samples.
    """
    size, channels, positions = x.shape[0] // groups, x.shape[1], prod(x.shape[2:])
    last = x.dim() > 2 and x.stride(-1) != 1 and x.movedim(1, -1).is_contiguous()
    batch, samples = ((size, groups), 0) if interleaved else ((groups, size), 1)
    # Dimensions are merged where possible, because operators over 4 dimensions take longer than over 3.
    if positions == 1:
        return Slices((*batch, channels), (samples,), last)
    if not last:
        return Slices((*batch, channels, positions), (3, samples), last)
    if interleaved:
        return Slices((*batch, positions, channels), (2, samples), last)
    return Slices((groups, size * positions, channels), (1,), last)


def split_uneven_groups(
    function: Callable[..., tuple[Tensor, ...]],
    batch: Sequence[Tensor],
    groups: int,
    interleaved: bool,
    statistics: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Apply a function of equal groups to any groups.

    Args:
        function: Function of the batch, the statistics, groups and interleaved, called only if ``groups`` divides the
            size of the batch. Its first output has a row per sample, the others have a row per group.
        batch: Tensors with a row per sample, (M, ...).
        groups: G, from 1 to M.
        interleaved: True if sample i is in group i mod G.
        statistics: Tensors with a row per group, (G, ...).

    Returns:
        Outputs of the function, for the whole batch.
    """
    samples = batch[0].shape[0]
    if samples % groups == 0:
        return function(*batch, *statistics, groups, interleaved)
    if interleaved:
        order = torch.arange(samples, device=batch[0].device).remainder(groups).argsort(stable=True)
        y, *others = split_uneven_groups(function, [x[order] for x in batch], groups, False, statistics)
        return y[order.argsort()], *others
    # 8 samples in 3 groups of 3, 3 and 2: the first 6 samples in 2 groups, and the last 2 in 1 group.
    size, larger = samples // groups, samples % groups  # torch.compile has no divmod.
    in_larger, smaller = larger * (size + 1), groups - larger
    heads = [x[:in_larger] for x in batch] + [statistic[:larger] for statistic in statistics]
    tails = [x[in_larger:] for x in batch] + [statistic[larger:] for statistic in statistics]
    parts = function(*heads, larger, False), function(*tails, smaller, False)
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
