"""Standardization of the slices of a batch, in few passes over memory and few calls of operators."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

Standardized = tuple[Tensor, Tensor, Tensor]
"""The output; means and unbiased variances of the slices, to broadcast over their view."""


_EACH = 0
"""No reduction: the squared error is the square of a difference in one pass, and its derivative a product with one."""


class Slices(NamedTuple):
    """A view of a batch that gives each slice, a channel in a group of samples, dimensions of its own.

    It follows the batch in memory, so that neither a contiguous nor a channels_last batch is copied.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]  # over the values of a slice: positions before samples
    channels_last: bool

    @property
    def values(self) -> int:
        """Number of values of a slice."""
        return prod([self.shape[dim] for dim in self.dims])

    @property
    def rows(self) -> bool:
        """Whether the channels are the last dimension."""
        return 3 not in self.dims

    def view(self, x: Tensor) -> Tensor:
        """The slices of a batch, in at least float32."""
        view = (x.movedim(1, -1) if self.channels_last else x).reshape(self.shape)
        return view.float() if x.dtype.itemsize < 4 else view

    def unview(self, y: Tensor, x: Tensor) -> Tensor:
        """Slices as a batch in shape, dtype and memory format of ``x``."""
        y = y.view(x.movedim(1, -1).shape).movedim(-1, 1) if self.channels_last else y.view(x.shape)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def broadcast(self, parameter: Tensor) -> Tensor:
        """(C,) in a shape that broadcasts over the slices."""
        return parameter if self.rows else parameter.unsqueeze(-1)

    def sum(self, x: Tensor) -> Tensor:
        """Over the values of each slice; one dimension after the other, because that takes less than both at once."""
        for dim in self.dims:
            x = x.sum(dim, keepdim=True)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Of the values of each slice."""
        for dim in self.dims:
            x = x.mean(dim, keepdim=True)
        return x

    def sum_over_groups(self, x: Tensor) -> Tensor:
        """What was summed over each slice, summed over the groups: (C,)."""
        return x.view(-1, x.shape[-1 - (not self.rows)]).sum(0)


def slices(x: Tensor, groups: int, interleaved: bool) -> Slices:
    """Those of (M, C, ...) where G divides M: group after group, or sample i in group i mod G."""
    size, channels, positions = len(x) // groups, x.shape[1], x.shape[2:].numel()
    last = x.dim() > 2 and x.stride(-1) != 1 and x.movedim(1, -1).is_contiguous()
    batch, samples = ((size, groups), 0) if interleaved else ((groups, size), 1)
    # No dimension that can be spared: operators take longer over four than over three.
    if positions == 1:
        return Slices((*batch, channels), (samples,), last)
    if not last:
        return Slices((*batch, channels, positions), (3, samples), last)
    if interleaved:
        return Slices((*batch, positions, channels), (2, samples), last)
    return Slices((groups, size * positions, channels), (1,), last)


def standardize(x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Slices, eps: float) -> Standardized:
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance of each slice."""
    if _is_transformed() or not (x.is_cpu or x.is_cuda):
        y, mean, var = _by_formula(x, weight, bias, view, eps)
    elif torch.is_grad_enabled():
        y, mean, var = _Standardize.apply(x, weight, bias, view, eps)
    else:
        y, mean, var, _, _ = _in_place(x, weight, bias, view, eps)
    return (
        view.unview(y, x),
        mean,
        var,
    )  # out here, because autograd lets no view that a function returns be overwritten


def _is_transformed() -> bool:
    """Whether ``torch.func`` or ``torch.compile`` looks on: they take plain operations, and do the rest themselves."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _by_formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Slices, eps: float) -> Standardized:
    y, mean, var, _ = _normal(view.view(x), view, eps)
    y = y if weight is None else y * view.broadcast(weight)
    y = y if bias is None else y + view.broadcast(bias)
    return y, mean.detach(), var.detach()


def _normal(x: Tensor, view: Slices, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardized slices, their means and unbiased variances, and 1 / sqrt(var + eps): functions to differentiate."""
    mean = view.mean(x)
    centered = x - mean
    var = view.mean(centered.square())
    inv_std = (var + eps).rsqrt()
    return centered * inv_std, mean, var * (view.values / (view.values - 1)), inv_std


def _in_place(x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Slices, eps: float) -> tuple[Tensor, ...]:
    """`_by_formula` with one allocation, because fresh memory costs more than arithmetic; also 1 / std and scale."""
    part, values = view.view(x), view.values
    mean = view.mean(part)
    y = torch.ops.aten.mse_loss(part, mean, _EACH)
    var = view.sum(y).mul_(1 / (values - 1))
    inv_std = torch.add(var.new_full((), eps), var, alpha=(values - 1) / values).rsqrt_()
    scale = inv_std if weight is None else inv_std * view.broadcast(weight)
    shift = mean.new_zeros(()) if bias is None else view.broadcast(bias)
    _scale_and_shift(part, scale, torch.addcmul(shift, mean, scale, value=-1), 1, view, out=y)
    return y, mean, var, inv_std, scale


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, sign: int, view: Slices, out: Tensor) -> Tensor:
    """Shift + sign * scale * x."""
    if view.rows:
        return torch.addcmul(shift, x, scale, value=sign, out=out)
    # Over positions addcmul is not vectorized, and two passes take less than its one.
    return torch.add(shift, torch.mul(x, scale, out=out), alpha=sign, out=out)


class _Standardize(torch.autograd.Function):
    """Differentiated by hand: as in BatchNorm only x is kept, and each direction allocates one tensor of its size."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Standardized:
        x, weight, _, ctx.view, ctx.eps = inputs
        y, mean, var, inv_std, scale = _in_place(*inputs)
        ctx.save_for_backward(x, weight, mean, inv_std, scale)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for the gradients of statistics
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradients[0] is None:
            return None, None, None, None, None
        view, (x, weight, mean, inv_std, scale) = ctx.view, ctx.saved_tensors
        part, dy = view.view(x), gradients[0]
        if torch.is_grad_enabled() or _is_transformed():
            dx, dweight, dbias = _derivatives(part, weight, dy, view, ctx.eps)
        else:
            dx, dweight, dbias = _derivatives_in_place(part, mean, inv_std, scale, dy, view)
        _, weighted, biased, _, _ = ctx.needs_input_grad
        parameters = (
            view.sum_over_groups(dweight) if weighted else None,
            view.sum_over_groups(dbias) if biased else None,
        )
        return view.unview(dx, x), *parameters, None, None


def _derivatives(x: Tensor, weight: Tensor | None, dy: Tensor, view: Slices, eps: float) -> tuple[Tensor, ...]:
    """Of x, and of weight and bias slice by slice, as functions of ``x`` and ``dy`` to differentiate again."""
    normal, _, _, inv_std = _normal(x, view, eps)
    scale = inv_std if weight is None else inv_std * view.broadcast(weight)
    dweight, dbias = view.sum(dy * normal), view.sum(dy)
    return scale * (dy - (dbias + normal * dweight) / view.values), dweight, dbias


def _derivatives_in_place(
    x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, dy: Tensor, view: Slices
) -> tuple[Tensor, ...]:
    """`_derivatives`, gathered by powers of x, with one allocation."""
    dx = x.new_empty(view.shape)
    doubled = torch.ops.aten.mse_loss_backward.grad_input(dy, x, mean, _EACH, grad_input=dx)  # 2 (x - mean) dy
    dweight, dbias = view.sum(doubled).mul_(inv_std).mul_(0.5), view.sum(dy)
    share = scale * (1 / view.values)
    slope = dweight * inv_std * share
    shift = torch.addcmul(mean * slope, dbias, share, value=-1)
    return _scale_and_shift(x, slope, shift, -1, view, out=dx).addcmul_(dy, scale), dweight, dbias
