"""Standardize the slices of a batch in few operator calls and few passes over memory."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

NormOutput = tuple[Tensor, Tensor, Tensor]
"""Output, means and unbiased variances of the slices."""

_NO_REDUCTION = 0
"""Argument of ``aten.mse_loss``, which then squares a difference in one pass."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and other dtypes unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x


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

    def sum_over_groups(self, sums: Tensor) -> Tensor:
        """Return (C,): sums of slices, added over the groups."""
        return sums.view(-1, sums.shape[-1 if self.channels_innermost else -2]).sum(0)


def slices_of(x: Tensor, groups: int, interleaved: bool) -> Slices:
    """Return the slices of a batch in equal groups.

    Args:
        x: (M, C) or (M, C, ...).
        groups: Number of groups of samples; divides M.
        interleaved: True if sample i is in group i mod groups, False if a group is a run of consecutive samples.
    """
    size, channels, positions = len(x) // groups, x.shape[1], x.shape[2:].numel()
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


def standardize(x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: Slices, eps: float) -> NormOutput:
    """Standardize each slice, then scale and shift its channel.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance of the slice. The returned statistics
    broadcast over the view.
    """
    if _is_transformed() or not (x.is_cpu or x.is_cuda):
        y, mean, var = _forward(x, weight, bias, slices, eps)
    elif torch.is_grad_enabled():
        y, mean, var = _Standardize.apply(x, weight, bias, slices, eps)
    else:
        y, mean, var, _, _ = _forward_in_place(x, weight, bias, slices, eps)
    # Outside of _Standardize, because autograd forbids in-place operations on a view that a Function returns.
    return slices.unview(y, x), mean, var


def _is_transformed() -> bool:
    # These transform plain operations, not an autograd.Function that writes in place.
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: Slices, eps: float) -> NormOutput:
    """Compute the formula with differentiable operations."""
    y, mean, var, _ = _normalize(slices.view(x), slices, eps)
    y = y if weight is None else y * slices.broadcast(weight)
    y = y if bias is None else y + slices.broadcast(bias)
    return y, mean.detach(), var.detach()


def _normalize(x: Tensor, slices: Slices, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normalized x, mean, unbiased variance and inv_std."""
    mean = slices.mean(x)
    centered = x - mean
    var = slices.mean(centered.square())
    inv_std = (var + eps).rsqrt()
    return centered * inv_std, mean, var * (slices.numel / (slices.numel - 1)), inv_std


def _forward_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slices: Slices, eps: float
) -> tuple[Tensor, ...]:
    """Compute `_forward` with one allocation; also return inv_std and scale.

    A new allocation of the size of x costs more than the arithmetic, so y first holds the squared deviations, then
    y = scale * x + (bias - scale * mean), where scale = inv_std * weight.
    """
    x, n = slices.view(x), slices.numel
    mean = slices.mean(x)
    y = torch.ops.aten.mse_loss(x, mean, _NO_REDUCTION)
    var = slices.sum(y).mul_(1 / (n - 1))
    inv_std = torch.add(var.new_full((), eps), var, alpha=(n - 1) / n).rsqrt_()
    scale = inv_std if weight is None else inv_std * slices.broadcast(weight)
    shift = mean.new_zeros(()) if bias is None else slices.broadcast(bias)
    _scale_and_shift(x, scale, torch.addcmul(shift, mean, scale, value=-1), 1, slices, out=y)
    return y, mean, var, inv_std, scale


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, sign: int, slices: Slices, out: Tensor) -> Tensor:
    """Return shift + sign * scale * x."""
    if slices.channels_innermost:
        return torch.addcmul(shift, x, scale, value=sign, out=out)
    # With positions innermost, addcmul is not vectorized and takes longer than two passes.
    return torch.add(shift, torch.mul(x, scale, out=out), alpha=sign, out=out)


class _Standardize(torch.autograd.Function):
    """Standardization with a hand-written derivative.

    As in BatchNorm, x is the only large tensor that is saved, and each direction allocates one tensor of its size.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> NormOutput:
        x, weight, _, ctx.slices, ctx.eps = inputs
        y, mean, var, inv_std, scale = _forward_in_place(*inputs)
        ctx.save_for_backward(x, weight, mean, inv_std, scale)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # Gradients of the statistics are not allocated.
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if (dy := gradients[0]) is None:
            return None, None, None, None, None
        slices, (x, weight, mean, inv_std, scale) = ctx.slices, ctx.saved_tensors
        if torch.is_grad_enabled() or _is_transformed():
            dx, dweight, dbias = _backward(slices.view(x), weight, dy, slices, ctx.eps)
        else:
            dx, dweight, dbias = _backward_in_place(slices.view(x), mean, inv_std, scale, dy, slices)
        _, needs_dweight, needs_dbias, _, _ = ctx.needs_input_grad
        return (
            slices.unview(dx, x),
            slices.sum_over_groups(dweight) if needs_dweight else None,
            slices.sum_over_groups(dbias) if needs_dbias else None,
            None,
            None,
        )


def _backward(x: Tensor, weight: Tensor | None, dy: Tensor, slices: Slices, eps: float) -> tuple[Tensor, ...]:
    """Return dx, and dweight and dbias of each slice.

    With n values in a slice, normal = (x - mean) * inv_std and scale = inv_std * weight:
    dweight = sum(dy * normal), dbias = sum(dy), dx = scale * (dy - (dbias + normal * dweight) / n).
    All operations are differentiable.
    """
    normal, _, _, inv_std = _normalize(x, slices, eps)
    scale = inv_std if weight is None else inv_std * slices.broadcast(weight)
    dweight, dbias = slices.sum(dy * normal), slices.sum(dy)
    return scale * (dy - (dbias + normal * dweight) / slices.numel), dweight, dbias


def _backward_in_place(
    x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, dy: Tensor, slices: Slices
) -> tuple[Tensor, ...]:
    """Compute `_backward` with one allocation.

    With slope = dweight * inv_std * scale / n, dx is gathered by powers of x:
    dx = (slope * mean - dbias * scale / n) - slope * x + scale * dy.
    """
    dx = x.new_empty(slices.shape)
    doubled = torch.ops.aten.mse_loss_backward.grad_input(dy, x, mean, _NO_REDUCTION, grad_input=dx)  # 2 (x - mean) dy
    dweight, dbias = slices.sum(doubled).mul_(inv_std).mul_(0.5), slices.sum(dy)
    scale_by_n = scale * (1 / slices.numel)
    slope = dweight * inv_std * scale_by_n
    shift = torch.addcmul(mean * slope, dbias, scale_by_n, value=-1)
    return _scale_and_shift(x, slope, shift, -1, slices, out=dx).addcmul_(dy, scale), dweight, dbias
