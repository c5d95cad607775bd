"""Ghost normalization and its relatives as pure functions of a batch.

In all of them M is the number of samples, C of channels, F of positions (the remaining dimensions), and each slice of
values is normalized by its own mean and biased variance.
"""

import functools
import warnings
from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape.errors import LandscapeError
from landscape.norms.operators import standardize
from landscape.norms.slices import at_least_float32, slices_of, split_uneven_groups

Layout = Literal["contiguous", "interleaved"]
NormOutput = tuple[Tensor, Tensor, Tensor]
"""Output, means and unbiased variances of the slices."""

_REMEDY = (
    "Use fewer groups or a larger batch. If it is a smaller last batch, use group_size instead of groups in the layer, "
    "or drop_last=True in the DataLoader."
)


def ghost_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel within each group of samples.

    For a value of channel c in group g of M / G samples::

        y = (x - mu[g, c]) / sqrt(sigma2[g, c] + eps) * weight[c] + bias[c]

    where mu and sigma2 are the mean and biased variance of the (M / G) * F values of that channel in that group.
    1 group is batch normalization. If G does not divide M, the sizes of groups differ by 1.

    Source: Hoffer et al. 2017 (arXiv:1705.08741); Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2,
    equations 1-3.

    Args:
        x: (M, C) or (M, C, ...), floating-point. Half precision is computed in float32.
        groups: G, from 1 to M.
        weight: (C,), scale gamma of each channel; None for 1.
        bias: (C,), shift beta of each channel; None for 0.
        layout: ``"contiguous"``: a group is a run of consecutive samples, larger groups first. ``"interleaved"``:
            sample i is in group i mod G.
        eps: Added to the variance.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        LandscapeError: ``groups`` is not in 1, ..., M, or a group has a single value per channel; or a dtype, a shape
            or the layout is not one of the above. An empty batch is returned, as by batch normalization.

    Examples:
        >>> import torch
        >>> x = torch.tensor([35.0, 39, 30, 4, 38, 26, 27, 19]).view(8, 1)
        >>> ghost_norm(x, groups=2).flatten()
        tensor([ 0.5858,  0.8787,  0.2197, -1.6842,  1.5440, -0.2206, -0.0735, -1.2499])
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
    """Apply group normalization, then ghost normalization.

    ``y = ghost_norm(group_norm(x, channel_groups), groups, weight, bias)``: one scale and shift after both steps.

    Source: SeqNorm of Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.

    Args:
        x: (M, C) or (M, C, ...), floating-point. Half precision is computed in float32.
        groups: G_M, number of groups of samples, from 1 to M.
        channel_groups: G_C, number of groups of channels; divides C.
        weight: (C,), scale gamma of each channel; None for 1.
        bias: (C,), shift beta of each channel; None for 0.
        layout: Groups of samples: ``"contiguous"`` or ``"interleaved"``, as for `ghost_norm`.
        eps: Added to the variances of both steps.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        LandscapeError: A constraint of `ghost_norm` or `group_norm` is violated.

    Examples:
        >>> import torch
        >>> y = seq_norm(torch.randn(8, 6, 5), groups=2, channel_groups=3)
        >>> torch.allclose(y[:4].mean((0, 2)), torch.zeros(6), atol=1e-6)  # each channel of the first group
        True
    """
    return ghost_norm(group_norm(x, channel_groups, eps=eps), groups, weight, bias, layout=layout, eps=eps)


def group_norm(
    x: Tensor, channel_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Normalize each group of channels of each sample.

    `torch.nn.functional.group_norm`, except that slices of a single value raise. For a value of sample m and channel c
    in group k of C / G_C channels::

        y = (x - mu[m, k]) / sqrt(sigma2[m, k] + eps) * weight[c] + bias[c]

    Source: Wu & He 2018 (arXiv:1803.08494), section 3; Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.

    Args:
        x: (M, C) or (M, C, ...), floating-point.
        channel_groups: G_C, number of groups of channels; divides C. 1 is layer, C is instance normalization.
        weight: (C,), scale gamma of each channel; None for 1.
        bias: (C,), shift beta of each channel; None for 0.
        eps: Added to the variance.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        LandscapeError: ``channel_groups`` does not divide C, or each slice has a single value.

    Examples:
        >>> import torch
        >>> group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), channel_groups=2)
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    check_channel_groups(x.shape[1], channel_groups)
    # In this order, so that torch.export may leave the number of positions open.
    if x.shape[1] == channel_groups and prod(x.shape[2:]) == 1:
        raise LandscapeError(
            f"channel_groups={channel_groups} on an input of shape {tuple(x.shape)}: the variance of a single value is "
            "undefined (as of instance norm on a fully-connected layer). Use fewer channel groups or another norm."
        )
    return F.group_norm(x, channel_groups, weight, bias, eps)


def ghost_mean_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> NormOutput:
    """Normalize by the means of groups and the batch's variance.

    For a value of channel c in group g of M / G samples::

        y = (x - mu[g, c]) / sqrt(sigma2[c] + eps) * weight[c] + bias[c]

    where mu is the mean of that channel in the group, sigma2 its biased variance in the whole batch. 1 group is batch
    normalization.

    Source: a negative result of Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 3.3.

    Args:
        x: (M, C) or (M, C, ...), floating-point. Half precision is computed in float32.
        groups: G, from 1 to M.
        weight: (C,), scale gamma of each channel; None for 1.
        bias: (C,), shift beta of each channel; None for 0.
        layout: Groups of samples: ``"contiguous"`` or ``"interleaved"``, as for `ghost_norm`.
        eps: Added to the variance.

    Returns:
        Output, with shape and dtype of ``x``; mean and unbiased variance of the whole batch, each (1, C).

    Raises:
        LandscapeError: A constraint of `ghost_norm` is violated.

    Examples:
        >>> import torch
        >>> y, mean, var = ghost_mean_norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]]), groups=2)
        >>> y.flatten(), mean, var
        (tensor([-0.0872,  0.0872, -0.8720,  0.8720]), tensor([[11.]]), tensor([[175.3333]]))
    """
    _smallest_slice(x, groups, layout)
    _check_parameters(x, weight, bias)
    y, mean, var = ghost_norm_with_statistics(at_least_float32(x), 1, None, None, "contiguous", eps)
    # The means of groups may be subtracted last, because the mean of the batch, subtracted first, cancels.
    (y,) = split_uneven_groups(_center, [y], groups, layout == "interleaved")
    return _scale_channels(y, weight, bias).to(x.dtype), mean, var


def batch_group_norm(
    x: Tensor,
    groups: int,
    channel_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> NormOutput:
    """Normalize each group of channels within each group of samples.

    For a value of channel c, in group k of C / G_C channels and group g of M / G_M samples::

        y = (x - mu[g, k]) / sqrt(sigma2[g, k] + eps) * weight[c] + bias[c]

    With G_C = C this is `ghost_norm`, with G_M = M it is `group_norm`.

    Source: Summers & Dinneen 2020 (arXiv:1906.03548), which generalizes batch and group normalization to small batches.

    Args:
        x: (M, C) or (M, C, ...), floating-point. Half precision is computed in float32.
        groups: G_M, number of groups of samples, from 1 to M.
        channel_groups: G_C, number of groups of channels; divides C.
        weight: (C,), scale gamma of each channel; None for 1.
        bias: (C,), shift beta of each channel; None for 0.
        layout: Groups of samples: ``"contiguous"`` or ``"interleaved"``, as for `ghost_norm`.
        eps: Added to the variance.

    Returns:
        Output, with shape and dtype of ``x``; means and unbiased variances of the slices, each (G_M, C), where the
        statistic of a group of channels is repeated for each of its channels.

    Raises:
        LandscapeError: A constraint of `ghost_norm` is violated, or ``channel_groups`` does not divide C.

    Examples:
        >>> import torch
        >>> y, mean, var = batch_group_norm(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), 2, channel_groups=1)
        >>> y.round(decimals=2), mean
        (tensor([[-1.2200,  0.0000,  1.2200],
                 [-1.2200,  0.0000,  1.2200]]), tensor([[ 2.,  2.,  2.],
                [20., 20., 20.]]))
    """
    check_channel_groups(x.shape[1], channel_groups)
    _check_parameters(x, weight, bias)
    parts = at_least_float32(x).unflatten(1, (channel_groups, -1))
    y, *statistics = ghost_norm_with_statistics(parts, groups, None, None, layout, eps)
    mean, var = (statistic.repeat_interleave(parts.shape[2], 1) for statistic in statistics)
    return _scale_channels(y.flatten(1, 2), weight, bias).to(x.dtype), mean, var


def check_channel_groups(channels: int, channel_groups: int | None) -> int:
    """Return ``channel_groups``; raise a LandscapeError unless it divides ``channels``."""
    if not channel_groups or channel_groups < 1 or channels % channel_groups:
        raise LandscapeError(
            f"channel_groups={channel_groups} on {channels} channels: must divide the number of channels. "
            f"Use a divisor of {channels}."
        )
    return channel_groups


def ghost_norm_with_statistics(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, layout: Layout, eps: float
) -> NormOutput:
    """Return `ghost_norm`, and means and unbiased variances, each (G, C).

    An empty batch has no groups: they are (0, C).
    """
    smallest = _smallest_slice(x, groups, layout)
    _check_parameters(x, weight, bias)
    if smallest == 0:
        nothing = at_least_float32(x).new_empty(0, x.shape[1])
        return _scale_channels(x.clone(), weight, bias).to(x.dtype), nothing, nothing
    if smallest == 2 and not torch.compiler.is_compiling():  # It cannot warn.
        _warn_of_signs(x.shape[0], groups)
    return standardize(x, weight, bias, groups, layout == "interleaved", eps)


def _smallest_slice(x: Tensor, groups: int, layout: str) -> int:
    """Return the smallest size of a slice; 0 if empty."""
    if x.dim() < 2 or not x.is_floating_point():
        raise LandscapeError(
            f"x of dtype {x.dtype} and shape {tuple(x.shape)}: must be floating-point, (M, C) or (M, C, ...)."
        )
    if layout not in get_args(Layout):
        raise LandscapeError(f"layout={layout!r}: must be one of {', '.join(get_args(Layout))}.")
    samples, positions = x.shape[0], prod(x.shape[2:])  # len() and numel() would fix them in torch.export.
    if not samples * positions:
        return 0
    if not 1 <= groups <= samples:
        raise LandscapeError(f"groups={groups} on a batch of {samples} samples: must be 1 to {samples}. {_REMEDY}")
    values = samples // groups * positions
    if values < 2:
        raise LandscapeError(
            f"groups={groups} on a batch of {samples} samples: a group has a single value per channel, whose variance "
            f"is undefined: it needs at least 2. {_REMEDY}"
        )
    return values


def _check_parameters(x: Tensor, *parameters: Tensor | None) -> None:
    for one in parameters:
        if one is not None and (one.shape != x.shape[1:2] or one.device != x.device):
            raise LandscapeError(
                f"weight or bias of shape {tuple(one.shape)} on {one.device}: must be ({x.shape[1]},) on {x.device}. "
                "Create it for the channels of x, and move both to one device."
            )


@functools.cache
def _warn_of_signs(samples: int, groups: int) -> None:
    warnings.warn(
        f"groups={groups} on a batch of {samples} samples: slices of 2 values are normalized to +1 and -1, whatever "
        "the values are. Use fewer groups or a larger batch.",
        UserWarning,
        stacklevel=2,
    )


def _center(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor]:
    slices = slices_of(x, groups, interleaved)
    view = slices.view(x)
    return (slices.unview(view - slices.mean(view), x),)


def _scale_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
