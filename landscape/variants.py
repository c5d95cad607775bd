"""Relatives of ghost normalization as pure functions of a batch: the paper's negative results and their neighbours."""

import torch
from torch import Tensor

from landscape.ghost import (
    Layout,
    Normalized,
    by_even_groups,
    check_batch,
    check_channel_groups,
    ghost_norm_with_statistics,
)
from landscape.standardize import slices


def ghost_mean_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> Normalized:
    """Subtract the mean of each group, but divide by the standard deviation of the whole batch.

    A negative result of Dimitriou & Arandjelovic (arXiv:2007.08554, section 3.3): GhostNorm of which only the means are
    those of groups. One group is batch normalization.

    Args:
        x: As in `landscape.ghost.ghost_norm`, and so are the others.
        groups: Likewise.
        weight: Likewise.
        bias: Likewise.
        layout: Likewise.
        eps: Likewise.

    Returns:
        Shape and dtype of ``x``; mean and unbiased variance of the whole batch, each (1, C). Half precision is computed
        in float32.

    Raises:
        UserError: As `landscape.ghost.ghost_norm`.
    """
    check_batch(x, groups, layout)
    normal, mean, var = ghost_norm_with_statistics(_full(x), 1, None, None, "contiguous", eps)
    # Groups are centered last: the mean of the batch, which is subtracted first, cancels.
    (centered,) = by_even_groups(_centered, normal, groups, layout)
    return _scaled(centered, weight, bias).to(x.dtype), mean, var


def batch_group_norm(
    x: Tensor,
    groups: int,
    channel_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> Normalized:
    """Normalize each group of channels within each group of samples, in one step.

    Summers & Dinneen (arXiv:1906.03548), who generalize batch and group normalization for small batches: a slice is
    C / G_C channels of M / G_M samples. With one channel in a group it is `landscape.ghost.ghost_norm`, with one sample
    in a group `landscape.ghost.group_norm`.

    Args:
        x: (M, C) or (M, C, ...), as in `landscape.ghost.ghost_norm`, and so are the others.
        groups: G_M, from 1 to M.
        channel_groups: G_C, a divisor of C.
        weight: (C,), scale per channel; 1 if None.
        bias: (C,), shift per channel; 0 if None.
        layout: Of the groups of samples.
        eps: Added to the variance.

    Returns:
        Shape and dtype of ``x``; means and unbiased variances of the slices, each (G_M, C): those of a group of
        channels stand at each of its channels. Half precision is computed in float32.

    Raises:
        UserError: As `landscape.ghost.ghost_norm`, or ``channel_groups`` does not divide C.
    """
    check_channel_groups(x.shape[1], channel_groups)
    parts = _full(x).unflatten(1, (channel_groups, -1))
    normal, *statistics = ghost_norm_with_statistics(parts, groups, None, None, layout, eps)
    mean, var = (statistic.repeat_interleave(parts.shape[2], 1) for statistic in statistics)
    return _scaled(normal.flatten(1, 2), weight, bias).to(x.dtype), mean, var


def _centered(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor]:
    view = slices(x, groups, interleaved)
    part = view.of(x)
    return (view.back(part - view.mean(part), x),)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """With the scale and the shift of each channel, where there are some."""
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
