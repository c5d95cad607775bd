"""Ghost and sequential normalization as pure functions of a batch."""

import functools
import inspect
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape.errors import UserError

Layout = Literal["contiguous", "interleaved"]
_SAMPLES: dict[Layout, int] = {"contiguous": -3, "interleaved": -4}
"""By layout: where a group's samples are in the (G, M / G, C, F) or (M / G, G, C, F) view of a batch."""

Normalized = tuple[Tensor, Tensor, Tensor]
"""The output, like the input; means and unbiased variances of the slices, each (G, C)."""


def ghost_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> Tensor:
    """Normalize every channel within each of ``groups`` parts of the batch.

    Dimitriou & Arandjelovic (arXiv:2007.08554), equations 1-3 on C x G slices of (M / G, F) values, with the biased
    variance. One group is batch normalization. Where G does not divide M, sizes of groups differ by at most one.

    Args:
        x: (M, C) or (M, C, ...): M samples, C channels, F positions in the remaining dimensions.
        groups: G, from 1 to M.
        weight: (C,), scale per channel; 1 if None.
        bias: (C,), shift per channel; 0 if None.
        layout: ``contiguous``: a group is a run of consecutive samples, the larger groups first;
            ``interleaved``: sample i is in group i mod G.
        eps: added to the variance.

    Returns:
        Shape and dtype of ``x``. Half precision is computed in float32.

    Raises:
        UserError: ``groups`` is not in 1..M, or leaves a group with a single value per channel.
    """
    return ghost_norm_with_statistics(x, groups, weight, bias, layout, eps)[0]


def seq_norm(
    x: Tensor,
    groups: int,
    channel_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> Tensor:
    """Group normalization over ``channel_groups``, then `ghost_norm` over ``groups``, then one scale and shift.

    SeqNorm of Dimitriou & Arandjelovic (arXiv:2007.08554). Arguments as in `ghost_norm` and `group_norm`.

    Raises:
        UserError: As `ghost_norm` and `group_norm`.
    """
    return ghost_norm(group_norm(x, channel_groups, eps=eps), groups, weight, bias, layout=layout, eps=eps)


def group_norm(
    x: Tensor, channel_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`, which refuses slices of a single value.

    Raises:
        UserError: ``channel_groups`` does not divide C, or each slice holds one value.
    """
    check_channel_groups(x.shape[1], channel_groups)
    if x.shape[1:].numel() == channel_groups:
        raise UserError(
            f"{channel_groups} channel groups on an input of shape {tuple(x.shape)} leave a single value to normalize, "
            "so its variance is undefined (instance norm on a fully-connected layer is). Use fewer channel groups or "
            "another norm."
        )
    return F.group_norm(x, channel_groups, weight, bias, eps)


def check_channel_groups(channels: int, channel_groups: int | None) -> int:
    """``channel_groups``; UserError unless it divides ``channels``."""
    if not channel_groups or channel_groups < 1 or channels % channel_groups:
        raise UserError(
            f"channel_groups={channel_groups} on {channels} channels: it has to divide the number of channels. "
            f"Choose a divisor of {channels}."
        )
    return channel_groups


def ghost_norm_with_statistics(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, layout: Layout, eps: float
) -> Normalized:
    """`ghost_norm`, together with the statistics that it computed on the way."""
    _check_batch(x, groups, layout)
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    if len(x) % groups == 0:
        return _even_groups(x, groups, weight, bias, layout, eps)
    if layout == "contiguous":
        return _uneven_groups(x, groups, weight, bias, eps)
    order = torch.arange(len(x), device=x.device).remainder(groups).argsort(stable=True)
    y, mean, var = _uneven_groups(x[order], groups, weight, bias, eps)
    return y[order.argsort()], mean, var


def _uneven_groups(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Normalized:
    """The larger groups, which come first, and the smaller ones: two batches that are even."""
    size, larger = divmod(len(x), groups)
    head, tail = x.split([larger * (size + 1), (groups - larger) * size])
    parts = (
        _even_groups(head, larger, weight, bias, "contiguous", eps),
        _even_groups(tail, groups - larger, weight, bias, "contiguous", eps),
    )
    y, mean, var = (torch.cat(pair) for pair in zip(*parts, strict=True))
    return y, mean, var


def _even_groups(x: Tensor, groups: int, weight: Tensor, bias: Tensor, layout: Layout, eps: float) -> Normalized:
    """Standardize the batch over the samples and positions of each group, in a view that has a dimension for each."""
    size, positions = len(x) // groups, x.shape[2:].numel()
    batch = (groups, size) if layout == "contiguous" else (size, groups)
    # No dimension for a single position: operators take longer over four dimensions than over three.
    slices = x.reshape(*batch, x.shape[1], *[positions][: x.dim() - 2])
    dims = (_SAMPLES[layout], -1) if x.dim() > 2 else (_SAMPLES[layout] + 1,)
    y, mean, var, _ = _Standardize.apply(slices, weight, bias, dims, eps)
    values = size * positions
    return y.reshape(x.shape), mean.reshape(groups, -1), var.reshape(groups, -1) * (values / (values - 1))


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the dimensions ``dims`` of x.

    Differentiated by hand, because fresh memory, passes over it and calls of small operators cost more than the
    arithmetic: as in BatchNorm, only x is kept, and each direction allocates one tensor of its size.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, ...]:
        y, mean, var, inv_std = _moments(x, dims, eps)
        scale = inv_std * _per_channel(weight, dims)
        shift = torch.addcmul(_per_channel(bias, dims), mean, scale, value=-1)
        return _scale_and_shift(x, scale, shift, out=y).to(x.dtype), mean, var, inv_std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.dims, ctx.eps = inputs
        _, mean, var, inv_std = output
        ctx.mark_non_differentiable(mean, var, inv_std)
        ctx.set_materialize_grads(False)  # no zeros for the gradients of statistics
        ctx.save_for_backward(x, weight, mean, inv_std)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, (x, weight, mean, inv_std) = gradients[0], ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():  # a second derivative needs the statistics as functions of x
            _, mean, _, inv_std = _moments(x, ctx.dims, ctx.eps)
        centered = x - mean
        spare, values = None if torch.is_grad_enabled() else centered, x.numel() // mean.numel()
        dbias = dy.sum(ctx.dims, keepdim=True, dtype=mean.dtype)
        dweight = torch.mul(centered, dy, out=spare).sum(ctx.dims, keepdim=True) * inv_std
        # dx = scale * (dy - dbias / values - (x - mean) * inv_std * dweight / values), gathered by powers of x
        scale = inv_std * _per_channel(weight, ctx.dims)
        share = scale * (-1 / values)
        slope = dweight * inv_std * share
        shift = torch.addcmul(dbias * share, mean, slope, value=-1)
        dx = _scale_and_shift(x, slope, shift, out=spare)
        dx = torch.addcmul(dx, dy, scale, out=spare)
        others = tuple(dim for dim in range(-len(ctx.dims) - 2, 0) if dim != -len(ctx.dims))
        return dx.to(x.dtype), dweight.sum(others), dbias.sum(others), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tensors = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims, strict=False)
        )
        return _Standardize.apply(*tensors, *args[3:]), (0, 0, 0, 0)


# Function.apply asks for the signature at every call; deriving it anew takes longer than a pass over SimpleNet's data.
_Standardize.forward.__signature__ = inspect.signature(_Standardize.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _per_channel(parameter: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(C,) as (1, 1, C), or (1, 1, C, 1) where there are positions, also below the batch dimension that vmap adds."""
    return parameter.unflatten(-1, (1, 1, -1, 1)[: len(dims) + 2])


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
    if scale.shape[-1] == x.shape[-1]:
        return torch.addcmul(shift, x, scale, out=out)
    # Over positions addcmul is not vectorized, and two passes are faster than its one.
    return torch.add(torch.mul(x, scale, out=out), shift, out=out)


def _moments(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, ...]:
    """A tensor like ``x`` to write to, mean, biased variance and 1 / sqrt(var + eps), in at least float32."""
    mean = x.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    squares = (x - mean).square_()
    var = squares.mean(dims, keepdim=True)
    return squares, mean, var, (var + eps).rsqrt()


def _check_batch(x: Tensor, groups: int, layout: Layout) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise UserError(f"Got {x.dtype} of shape {tuple(x.shape)}: the input is (M, C) or (M, C, ...), floating-point.")
    if layout not in _SAMPLES:
        raise UserError(f"Unknown layout {layout!r}: choose one of {', '.join(_SAMPLES)}.")
    samples, positions = len(x), x.shape[2:].numel()
    if not 1 <= groups <= samples:
        raise UserError(
            f"groups={groups} on a batch of {samples} samples: allowed are 1 to {samples}. "
            "Use fewer groups or a larger batch."
        )
    values = samples // groups * positions
    if values < 2:
        raise UserError(
            f"{samples} samples in {groups} groups leave a group with a single value per channel, so its variance is "
            "undefined. Use fewer groups or a larger batch, so that each group has two samples or more."
        )
    if values == 2:
        _warn_of_signs(samples, groups)


@functools.cache
def _warn_of_signs(samples: int, groups: int) -> None:
    warnings.warn(
        f"{samples} samples in {groups} groups leave two values per channel, which normalization turns into +1 and -1 "
        "whatever they were. Use fewer groups or a larger batch.",
        UserWarning,
        stacklevel=2,
    )
