"""Ghost normalization of equal groups: differentiable, in place, and by torch's batch normalization."""

import torch
from torch import Tensor

from landscape.norms.slices import Slices, slices_of

Output = tuple[Tensor, Tensor, Tensor, Tensor]
"""y in the form of the batch, and mean, unbiased variance and inv_std of its slices, each (G, C)."""

_NO_REDUCTION = 0
"""Argument of ``aten.mse_loss``, which then squares a difference in one pass."""

# Arguments: x is (M, C) or (M, C, ...), weight and bias are (C,) or None, mean and inv_std (G, C); dy is the gradient
# of y. The number of groups divides M. Backward passes return dweight and dbias of each slice, (G, C).


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    """Compute the formula of `standardize` for equal groups.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance of a channel in a group. All operations
    are differentiable.
    """
    slices = slices_of(x, groups, interleaved)
    normal, mean, var, inv_std = _normalize(slices.view(x), slices, eps)
    y = normal if weight is None else normal * slices.broadcast(weight)
    y = y if bias is None else y + slices.broadcast(bias)
    unbiased = var * (slices.numel / (slices.numel - 1))
    mean, unbiased, inv_std = (one.detach().view(groups, -1) for one in (mean, unbiased, inv_std))
    return slices.unview(y, x), mean, unbiased, inv_std


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, groups: int, interleaved: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, and dweight and dbias of each slice.

    With n values in a slice, normal = (x - mean) * inv_std and scale = inv_std * weight:
    dweight = sum(dy * normal), dbias = sum(dy), dx = scale * (dy - (dbias + normal * dweight) / n).
    All operations are differentiable.
    """
    slices = slices_of(x, groups, interleaved)
    above = slices.view(dy)
    normal, _, _, inv_std = _normalize(slices.view(x), slices, eps)
    scale = inv_std if weight is None else inv_std * slices.broadcast(weight)
    dweight, dbias = slices.sum(above * normal), slices.sum(above)
    dx = scale * (above - (dbias + normal * dweight) / slices.numel)
    return slices.unview(dx, x), dweight.view(groups, -1), dbias.view(groups, -1)


def _normalize(x: Tensor, slices: Slices, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normalized x, mean, variance and inv_std of a view."""
    mean = slices.mean(x)
    centered = x - mean
    var = slices.mean(centered.square())
    inv_std = (var + eps).rsqrt()
    return centered * inv_std, mean, var, inv_std


def forward_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    """Compute `forward` with one allocation.

    A new allocation of the size of x costs more than the arithmetic, so y first holds the squared deviations, then
    y = scale * x + (bias - scale * mean), where scale = inv_std * weight.
    """
    slices = slices_of(x, groups, interleaved)
    view, n = slices.view(x), slices.numel
    mean = slices.mean(view)
    y = torch.ops.aten.mse_loss(view, mean, _NO_REDUCTION)
    var = slices.sum(y).mul_(1 / (n - 1))
    inv_std = torch.add(var.new_full((), eps), var, alpha=(n - 1) / n).rsqrt_()
    scale = inv_std if weight is None else inv_std * slices.broadcast(weight)
    shift = mean.new_zeros(()) if bias is None else slices.broadcast(bias)
    _scale_and_shift(view, scale, torch.addcmul(shift, mean, scale, value=-1), 1, slices, out=y)
    return slices.unview(y, x), mean.view(groups, -1), var.view(groups, -1), inv_std.view(groups, -1)


def backward_in_place(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inv_std: Tensor, groups: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `backward` with one allocation.

    With slope = dweight * inv_std * scale / n, dx is gathered by powers of x:
    dx = (slope * mean - dbias * scale / n) - slope * x + scale * dy.
    """
    slices = slices_of(x, groups, interleaved)
    above, view = slices.view(dy), slices.view(x)
    mean, inv_std = slices.of_slices(mean), slices.of_slices(inv_std)
    scale = inv_std if weight is None else inv_std * slices.broadcast(weight)
    dx = view.new_empty(slices.shape)
    # 2 (x - mean) dy
    doubled = torch.ops.aten.mse_loss_backward.grad_input(above, view, mean, _NO_REDUCTION, grad_input=dx)
    dweight, dbias = slices.sum(doubled).mul_(inv_std).mul_(0.5), slices.sum(above)
    scale_by_n = scale * (1 / slices.numel)
    slope = dweight * inv_std * scale_by_n
    shift = torch.addcmul(mean * slope, dbias, scale_by_n, value=-1)
    _scale_and_shift(view, slope, shift, -1, slices, out=dx).addcmul_(above, scale)
    return slices.unview(dx, x), dweight.view(groups, -1), dbias.view(groups, -1)


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, sign: int, slices: Slices, out: Tensor) -> Tensor:
    """Return shift + sign * scale * x."""
    if slices.channels_innermost:
        return torch.addcmul(shift, x, scale, value=sign, out=out)
    # With positions innermost, addcmul is not vectorized and takes longer than two passes.
    return torch.add(shift, torch.mul(x, scale, out=out), alpha=sign, out=out)


def forward_native(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    """Compute `forward` in few launches of kernels.

    Groups become channels of torch's batch normalization, which is a copy unless they are interleaved.
    """
    merged, shape = _groups_as_channels(x, groups, interleaved)
    # With a momentum of 1 the running statistics are those of the batch.
    mean, var = torch.zeros(2, merged.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    scale, shift = (None if one is None else one.repeat(groups) for one in (weight, bias))
    y, _, inv_std = torch.native_batch_norm(merged, scale, shift, mean, var, True, 1.0, eps)
    y = _channels_as_groups(y, shape, x, groups, interleaved)
    return y, mean.view(groups, -1), var.view(groups, -1), inv_std.view(groups, -1)


def backward_native(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    groups: int,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `backward` in few launches of kernels."""
    merged, shape = _groups_as_channels(x, groups, interleaved)
    above, _ = _groups_as_channels(dy, groups, interleaved)
    repeated = None if weight is None else weight.repeat(groups)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        above, merged, repeated, None, None, mean.flatten(), inv_std.flatten(), True, eps, [True, True, True]
    )
    return _channels_as_groups(dx, shape, x, groups, interleaved), dweight.view(groups, -1), dbias.view(groups, -1)


def _groups_as_channels(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor, torch.Size]:
    """Return the batch as (M / G, G C, ...).

    The second value is its shape before groups and channels were merged.
    """
    shape = x.shape[1:] if x.dim() > 2 else (*x.shape[1:], 1)
    split = x.reshape(*((-1, groups) if interleaved else (groups, x.shape[0] // groups)), *shape)
    moved = split if interleaved else split.transpose(0, 1)
    return moved.flatten(1, 2), moved.shape


def _channels_as_groups(y: Tensor, shape: torch.Size, x: Tensor, groups: int, interleaved: bool) -> Tensor:
    """Return the batch in the form of ``x``."""
    moved = y.view(shape) if interleaved else y.view(shape).transpose(0, 1)
    return moved.reshape(x.shape)
