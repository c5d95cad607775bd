"""Normalization layers; those that normalize over samples share BatchNorm's parameters and buffers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from landscape.errors import LandscapeError
from landscape.norms.functional import (
    Layout,
    NormOutput,
    batch_group_norm,
    check_channel_groups,
    ghost_mean_norm,
    ghost_norm_with_statistics,
    group_norm,
)


class BatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d`, `2d` and `3d` in one: input (M, C) or (M, C, ...)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise LandscapeError(
                f"{type(self).__name__}({self.num_features}) got an input of shape {tuple(input.shape)}; it takes "
                f"(M, {self.num_features}) or (M, {self.num_features}, ...). Give it the layer's number of channels."
            )


class GhostNorm(BatchNorm):
    """`ghost_norm` with learned scale and shift, and BatchNorm's running statistics for evaluation.

    A training step moves the running statistics once, by the mean over the groups of their means and of their unbiased
    variances. The ``state_dict`` is that of BatchNorm and loads both ways.

    Args:
        num_features: C.
        groups: G, the number of groups of a batch.
        group_size: instead of ``groups``: M samples make max(1, M // group_size) groups, so that a last, smaller batch
            has fewer groups instead of smaller ones.
        eps: added to the variance.
        momentum: weight of the new statistics in the running ones; None for their cumulative average.
        affine: learn scale and shift.
        track_running_stats: if False, evaluation too normalizes by the groups of its batch.
        layout: as in `ghost_norm`.

    Raises:
        LandscapeError: Not exactly one of ``groups`` and ``group_size`` is given, or it is below 1. In use as `ghost_norm`.
    """

    def __init__(
        self,
        num_features: int,
        groups: int | None = None,
        *,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        layout: Layout = "contiguous",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        given = [number for number in (groups, group_size) if number is not None]
        if len(given) != 1 or given[0] < 1:
            raise LandscapeError(
                f"{type(self).__name__} got groups={groups} and group_size={group_size}: it takes exactly one of the "
                "two, at least 1. Give groups for a fixed number of groups, group_size for a fixed size."
            )
        self.groups, self.group_size = groups, group_size
        self.layout: Layout = layout

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...) by the groups of the batch; in evaluation by the running statistics."""
        return self._normalize(input, self.weight, self.bias)

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        groups = self.groups or max(1, len(input) // (self.group_size or 1))
        y, mean, var = self._by_groups(input, groups, weight, bias)
        if self.training and self.track_running_stats:
            self._track(mean, var)
        return y

    def _by_groups(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return ghost_norm_with_statistics(input, groups, weight, bias, self.layout, self.eps)

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards the mean over the groups."""
        count, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if count is None or running_mean is None or running_var is None:
            return
        count.add_(1)
        share = 1 / float(count) if self.momentum is None else self.momentum
        running_mean.mul_(1 - share).add_(mean.sum(0), alpha=share / len(mean))
        running_var.mul_(1 - share).add_(var.sum(0), alpha=share / len(var))

    def extra_repr(self) -> str:
        """BatchNorm's settings and the groups."""
        groups = f"groups={self.groups}" if self.groups else f"group_size={self.group_size}"
        return f"{super().extra_repr()}, {groups}, layout={self.layout}"


class _WithChannelGroups(GhostNorm):
    """A `GhostNorm` that has groups of channels too."""

    def __init__(self, num_features: int, groups: int | None = None, channel_groups: int = 1, **options: Any) -> None:
        super().__init__(num_features, groups, **options)
        self.channel_groups = check_channel_groups(num_features, channel_groups)

    def extra_repr(self) -> str:
        """GhostNorm's settings and the groups of the channels."""
        return f"{super().extra_repr()}, channel_groups={self.channel_groups}"


class SeqNorm(_WithChannelGroups):
    """`seq_norm` with learned scale and shift, and running statistics of what GroupNorm leaves, as in `GhostNorm`.

    Args:
        num_features: C.
        groups: G, the number of groups of a batch.
        channel_groups: number of groups of the channels; divides C.
        **options: the keywords of `GhostNorm`.

    Raises:
        LandscapeError: As `GhostNorm`, or ``channel_groups`` does not divide C. In use as `seq_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...) by channel groups, then as `GhostNorm`."""
        self._check_input_dim(input)
        return super().forward(group_norm(input, self.channel_groups, eps=self.eps))


class ReversedSeqNorm(_WithChannelGroups):
    """`SeqNorm` in reverse order: as `GhostNorm`, without scale and shift, then by channel groups, with them.

    A negative result of Dimitriou & Arandjelovic (arXiv:2007.08554, section 3.3). The running statistics are those of
    the input, which evaluation normalizes by them before the channel groups. Arguments and errors as in `SeqNorm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...)."""
        return group_norm(self._normalize(input, None, None), self.channel_groups, self.weight, self.bias, eps=self.eps)


class GhostMeanNorm(GhostNorm):
    """`ghost_mean_norm` as a layer: the means of groups with the variance of the whole batch.

    The running statistics and the evaluation are BatchNorm's. Arguments and errors as in `GhostNorm`.
    """

    def _by_groups(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return ghost_mean_norm(input, groups, weight, bias, layout=self.layout, eps=self.eps)


class BatchGroupNorm(_WithChannelGroups):
    """`batch_group_norm` as a layer: groups of channels within groups of samples.

    A running statistic of a group of channels stands at each of its channels, so that evaluation is BatchNorm's.
    Arguments and errors as in `SeqNorm`.
    """

    def _by_groups(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return batch_group_norm(input, groups, self.channel_groups, weight, bias, layout=self.layout, eps=self.eps)


class GhostNormWS(GhostNorm):
    """`GhostNorm` that asks for weight standardization of the layers before it (`standardize_weights`)."""

    standardizes_weights = True


class SeqNormWS(SeqNorm):
    """`SeqNorm` that asks for weight standardization of the layers before it (`standardize_weights`)."""

    standardizes_weights = True


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, with `group_norm`'s errors.

    Raises:
        LandscapeError: ``num_groups`` does not divide ``num_channels``. In use as `group_norm`.
    """

    def __init__(self, num_groups: int | None, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(check_channel_groups(num_channels, num_groups), num_channels, eps, affine)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...)."""
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)
