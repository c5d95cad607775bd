"""Ghost and sequential normalization as pure functions of a batch."""

import functools
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from landscape.errors import LandscapeError
from landscape.norms.standardize import slices, standardize

Layout = Literal["contiguous", "interleaved"]
NormOutput = tuple[Tensor, Tensor, Tensor]
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
        LandscapeError: ``groups`` is not in 1..M, or leaves a group with a single value per channel.
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
        LandscapeError: As `ghost_norm` and `group_norm`.
    """
    return ghost_norm(group_norm(x, channel_groups, eps=eps), groups, weight, bias, layout=layout, eps=eps)


def group_norm(
    x: Tensor, channel_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`, which refuses slices of a single value.

    Raises:
        LandscapeError: ``channel_groups`` does not divide C, or each slice holds one value.
    """
    check_channel_groups(x.shape[1], channel_groups)
    if x.shape[1:].numel() == channel_groups:
        raise LandscapeError(
            f"{channel_groups} channel groups on an input of shape {tuple(x.shape)} leave a single value to normalize, "
            "so its variance is undefined (instance norm on a fully-connected layer is). Use fewer channel groups or "
            "another norm."
        )
    return F.group_norm(x, channel_groups, weight, bias, eps)


def check_channel_groups(channels: int, channel_groups: int | None) -> int:
    """``channel_groups``; LandscapeError unless it divides ``channels``."""
    if not channel_groups or channel_groups < 1 or channels % channel_groups:
        raise LandscapeError(
            f"channel_groups={channel_groups} on {channels} channels: it has to divide the number of channels. "
            f"Choose a divisor of {channels}."
        )
    return channel_groups


def ghost_norm_with_statistics(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, layout: Layout, eps: float
) -> NormOutput:
    """`ghost_norm`, together with the statistics that it computed on the way."""
    if has_torch_function((x, weight, bias)):
        # One call for who looks on, as torch's own functions are; some thirty calls would take longer than the norm.
        arguments = (x, groups, weight, bias, layout, eps)
        return handle_torch_function(ghost_norm_with_statistics, (x, weight, bias), *arguments)
    if check_batch(x, groups, layout) == 2:
        _warn_of_signs(len(x), groups)

    def of_even_groups(x: Tensor, groups: int, interleaved: bool) -> NormOutput:
        y, mean, var = standardize(x, weight, bias, slices(x, groups, interleaved), eps)
        return y, mean.view(groups, -1), var.view(groups, -1)

    y, mean, var = split_uneven_groups(of_even_groups, x, groups, layout)
    return y, mean, var


def split_uneven_groups(
    function: Callable[[Tensor, int, bool], tuple[Tensor, ...]], x: Tensor, groups: int, layout: Layout
) -> tuple[Tensor, ...]:
    """What ``function(x, groups, interleaved)``, which takes groups of one size, gives for any number of groups.

    Its first output has a row for each sample, the others have one for each group.
    """
    if len(x) % groups == 0:
        return function(x, groups, layout == "interleaved")
    if layout == "interleaved":
        order = torch.arange(len(x), device=x.device).remainder(groups).argsort(stable=True)
        y, *statistics = split_uneven_groups(function, x[order], groups, "contiguous")
        return y[order.argsort()], *statistics
    # The larger groups, which come first, and the smaller ones: two batches that are even.
    size, larger = divmod(len(x), groups)
    head, tail = x.split([larger * (size + 1), (groups - larger) * size])
    parts = function(head, larger, False), function(tail, groups - larger, False)
    return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))


def check_batch(x: Tensor, groups: int, layout: Layout) -> int:
    """The least number of values of a channel in a group; LandscapeError where there is nothing to normalize."""
    if x.dim() < 2 or not x.is_floating_point():
        raise LandscapeError(
            f"Got {x.dtype} of shape {tuple(x.shape)}: the input is (M, C) or (M, C, ...), floating-point."
        )
    if layout not in get_args(Layout):
        raise LandscapeError(f"Unknown layout {layout!r}: choose one of {', '.join(get_args(Layout))}.")
    samples, positions = len(x), x.shape[2:].numel()
    if not 1 <= groups <= samples:
        raise LandscapeError(
            f"groups={groups} on a batch of {samples} samples: allowed are 1 to {samples}. "
            "Use fewer groups or a larger batch."
        )
    values = samples // groups * positions
    if values < 2:
        raise LandscapeError(
            f"{samples} samples in {groups} groups leave a group with a single value per channel, so its variance is "
            "undefined. Use fewer groups or a larger batch, so that each group has two samples or more."
        )
    return values


@functools.cache
def _warn_of_signs(samples: int, groups: int) -> None:
    warnings.warn(
        f"{samples} samples in {groups} groups leave two values in a slice, which normalization turns into +1 and -1 "
        "whatever they were. Use fewer groups or a larger batch.",
        UserWarning,
        stacklevel=2,
    )


def ghost_mean_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: Layout = "contiguous",
    eps: float = 1e-5,
) -> NormOutput:
    """Subtract the mean of each group, but divide by the standard deviation of the whole batch.

    A negative result of Dimitriou & Arandjelovic (arXiv:2007.08554, section 3.3): GhostNorm of which only the means are
    those of groups. One group is batch normalization.

    Args:
        x: As in `landscape.ghost_norm`, and so are the others.
        groups: Likewise.
        weight: Likewise.
        bias: Likewise.
        layout: Likewise.
        eps: Likewise.

    Returns:
        Shape and dtype of ``x``; mean and unbiased variance of the whole batch, each (1, C). Half precision is computed
        in float32.

    Raises:
        LandscapeError: As `landscape.ghost_norm`.
    """
    check_batch(x, groups, layout)
    normal, mean, var = ghost_norm_with_statistics(_full(x), 1, None, None, "contiguous", eps)
    # Groups are centered last: the mean of the batch, which is subtracted first, cancels.
    (centered,) = split_uneven_groups(_centered, normal, groups, layout)
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
) -> NormOutput:
    """Normalize each group of channels within each group of samples, in one step.

    Summers & Dinneen (arXiv:1906.03548), who generalize batch and group normalization for small batches: a slice is
    C / G_C channels of M / G_M samples. With one channel in a group it is `landscape.ghost_norm`, with one sample
    in a group `group_norm`.

    Args:
        x: (M, C) or (M, C, ...), as in `landscape.ghost_norm`, and so are the others.
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
        LandscapeError: As `landscape.ghost_norm`, or ``channel_groups`` does not divide C.
    """
    check_channel_groups(x.shape[1], channel_groups)
    parts = _full(x).unflatten(1, (channel_groups, -1))
    normal, *statistics = ghost_norm_with_statistics(parts, groups, None, None, layout, eps)
    mean, var = (statistic.repeat_interleave(parts.shape[2], 1) for statistic in statistics)
    return _scaled(normal.flatten(1, 2), weight, bias).to(x.dtype), mean, var


def _centered(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor]:
    view = slices(x, groups, interleaved)
    part = view.view(x)
    return (view.unview(part - view.mean(part), x),)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """With the scale and the shift of each channel, where there are some."""
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
