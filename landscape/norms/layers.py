"""Normalization layers; those that normalize over samples share BatchNorm's parameters and buffers."""

import warnings
from collections.abc import Callable
from functools import wraps
from numbers import Integral
from typing import Any, NoReturn, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

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
from landscape.norms.operators import update_running_stats

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])


def _recorded_by_fx(forward: _Forward) -> _Forward:
    """Return a forward method that ``torch.fx`` records as one call.

    So are torch's own layers there. Of other layers it records the operations, and stops at a branch on a shape.
    """

    @wraps(forward)
    def recorded(self: nn.Module, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        return forward(self, input)

    return cast("_Forward", recorded)


class _Layer(nn.Module):
    def __prepare_scriptable__(self) -> NoReturn:
        raise LandscapeError(
            f"torch.jit.script on {type(self).__name__}: it is not written in TorchScript. Use torch.export.export, or "
            "torch.jit.trace of the model in evaluation mode."
        )


class BatchNorm(_Layer, _BatchNorm):
    """Batch normalization of inputs (M, C) and (M, C, ...).

    `torch.nn.BatchNorm1d`, `2d` and `3d` in one class, for any number of dimensions. For a value of channel c::

        y = (x - mu[c]) / sqrt(sigma2[c] + eps) * weight[c] + bias[c]

    In training mu and sigma2 are the mean and biased variance of the channel in the batch; in evaluation they are the
    running statistics.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3; Dimitriou & Arandjelovic 2020 (arXiv:2007.08554),
    section 2.

    Args:
        num_features: C, number of channels.
        eps: Added to the variance.
        momentum: Weight of the batch's statistics in the running statistics; None for their cumulative average.
        affine: If True, learn a scale ``weight`` and a shift ``bias`` per channel, each (C,).
        track_running_stats: If False, evaluation too uses the statistics of the batch.

    Raises:
        LandscapeError: On a forward pass: the input is not (M, C) or (M, C, ...).

    Examples:
        >>> import torch
        >>> BatchNorm(1)(torch.tensor([[1.0], [3.0]])).detach()
        tensor([[-1.0000],
                [ 1.0000]])
    """

    @_recorded_by_fx
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, with its shape and dtype."""
        return super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise LandscapeError(
                f"input of shape {tuple(input.shape)}: {type(self).__name__}({self.num_features}) takes (M, "
                f"{self.num_features}) or (M, {self.num_features}, ...). Set num_features to its number of channels."
            )


class GhostNorm(BatchNorm):
    """Ghost normalization with learned scale, shift and running statistics.

    In training `ghost_norm`: for a value of channel c in group g of M / G samples::

        y = (x - mu[g, c]) / sqrt(sigma2[g, c] + eps) * weight[c] + bias[c]

    In evaluation batch normalization by the running statistics. A training step updates them once, with the mean over
    the groups of mu and of the unbiased variances; an empty batch leaves them. The ``state_dict`` has the keys and
    shapes of BatchNorm's, so either loads the other's.

    With several processes the groups are of the samples of each process. ``nn.SyncBatchNorm.convert_sync_batchnorm``
    leaves the layers of a model as they are, with a warning.

    Source: Hoffer et al. 2017 (arXiv:1705.08741); Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.

    Args:
        num_features: C, number of channels.
        groups: G, number of groups of samples in a batch.
        group_size: Alternative to ``groups``: M samples make max(1, M // group_size) groups, so that a smaller last
            batch has fewer groups instead of smaller ones.
        eps: Added to the variance.
        momentum: Weight of the batch's statistics in the running statistics; None for their cumulative average.
        affine: If True, learn a scale ``weight`` and a shift ``bias`` per channel, each (C,).
        track_running_stats: If False, evaluation too normalizes by the groups of the batch.
        layout: ``"contiguous"``: a group is a run of consecutive samples. ``"interleaved"``: sample i is in group
            i mod G.

    Raises:
        LandscapeError: Not exactly one of ``groups`` and ``group_size`` is given, or it is below 1. On a forward pass:
            the input is not (M, C) or (M, C, ...), or in training a constraint of `ghost_norm` is violated.

    Examples:
        >>> import torch
        >>> norm = GhostNorm(64, groups=4)
        >>> norm(torch.randn(32, 64, 8, 8)).shape
        torch.Size([32, 64, 8, 8])
        >>> norm.running_mean.shape, norm.eval()(torch.randn(1, 64)).shape
        (torch.Size([64]), torch.Size([1, 64]))
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
        if len(given) != 1 or not isinstance(given[0], Integral) or given[0] < 1:
            raise LandscapeError(
                f"groups={groups}, group_size={group_size}: {type(self).__name__} takes exactly one of the two, an "
                "integer of at least 1. Set groups for a fixed number of groups, or group_size for a fixed size."
            )
        self.groups, self.group_size = groups, group_size
        self.layout: Layout = layout

    @_recorded_by_fx
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, with its shape and dtype."""
        return self._normalize(input, self.weight, self.bias)

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        groups = self.groups or max(1, input.shape[0] // (self.group_size or 1))
        y, mean, var = self._normalize_batch(input, groups, weight, bias)
        if self.training and self.track_running_stats:
            self._update_running_stats(mean, var)
        return y

    def _normalize_batch(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return ghost_norm_with_statistics(input, groups, weight, bias, self.layout, self.eps)

    def _update_running_stats(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards the mean over the groups."""
        count, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if count is not None:
            count.add_(1)
        if running_mean is None or running_var is None or not mean.shape[0]:  # An empty batch counts, as in BatchNorm.
            return
        if self.momentum is not None:
            update_running_stats(running_mean, running_var, mean, var, self.momentum)
            return
        if count is None:
            return
        for running, groups in ((running_mean, mean), (running_var, var)):  # The count stays on its device.
            running.add_((groups.mean(0) - running) / count)

    def extra_repr(self) -> str:
        """Return the groups, and options other than the defaults."""
        groups = f"groups={self.groups}" if self.groups else f"group_size={self.group_size}"
        changed = [f"{name}={value}" for name, usual in _DEFAULTS.items() if (value := getattr(self, name)) != usual]
        return ", ".join([str(self.num_features), groups, *changed])


_DEFAULTS = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True, "layout": "contiguous"}


class _WithChannelGroups(GhostNorm):
    """A `GhostNorm` with groups of channels."""

    def __init__(self, num_features: int, groups: int | None = None, channel_groups: int = 1, **options: Any) -> None:
        super().__init__(num_features, groups, **options)
        self.channel_groups = check_channel_groups(num_features, channel_groups)

    def extra_repr(self) -> str:
        """Return GhostNorm's options and the groups of channels."""
        return f"{super().extra_repr()}, channel_groups={self.channel_groups}"


class SeqNorm(_WithChannelGroups):
    """Sequential normalization with learned scale, shift and running statistics.

    In training `seq_norm`: y = ghost_norm(group_norm(x, G_C), G_M, weight, bias). In evaluation group normalization,
    then batch normalization by the running statistics, which are those of group normalization's output.

    Source: Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.

    Args:
        num_features: C, number of channels.
        groups: G_M, number of groups of samples in a batch.
        channel_groups: G_C, number of groups of channels; divides C.
        **options: ``group_size``, ``eps``, ``momentum``, ``affine``, ``track_running_stats`` and ``layout`` of
            `GhostNorm`; eps is added to the variances of both steps.

    Raises:
        LandscapeError: Not exactly one of ``groups`` and ``group_size`` is given, or it is below 1, or
            ``channel_groups`` does not divide C. On a forward pass: the input is not (M, C) or (M, C, ...), or a
            constraint of `seq_norm` is violated.

    Examples:
        >>> import torch
        >>> SeqNorm(64, groups=4, channel_groups=8)(torch.randn(32, 64, 8, 8)).shape
        torch.Size([32, 64, 8, 8])
    """

    @_recorded_by_fx
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, with its shape and dtype."""
        self._check_input_dim(input)
        return self._normalize(group_norm(input, self.channel_groups, eps=self.eps), self.weight, self.bias)


class ReversedSeqNorm(_WithChannelGroups):
    """Ghost normalization, then group normalization: `SeqNorm` reversed.

    y = group_norm(ghost_norm(x, G_M), G_C, weight, bias). The running statistics are those of the input; evaluation
    normalizes by them before group normalization. Arguments and errors as for `SeqNorm`.

    Source: a negative result of Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 3.3.
    """

    @_recorded_by_fx
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, with its shape and dtype."""
        return group_norm(self._normalize(input, None, None), self.channel_groups, self.weight, self.bias, eps=self.eps)


class GhostMeanNorm(GhostNorm):
    """`ghost_mean_norm` as a layer.

    Means are of groups, variances of the batch. Running statistics and evaluation are BatchNorm's. Arguments and errors
    as for `GhostNorm`.
    """

    def _normalize_batch(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return ghost_mean_norm(input, groups, weight, bias, layout=self.layout, eps=self.eps)


class BatchGroupNorm(_WithChannelGroups):
    """`batch_group_norm` as a layer.

    Running statistics of a group of channels are repeated for each of its channels, so that evaluation is BatchNorm's.
    Arguments and errors as for `SeqNorm`.
    """

    def _normalize_batch(self, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> NormOutput:
        return batch_group_norm(input, groups, self.channel_groups, weight, bias, layout=self.layout, eps=self.eps)


class GhostNormWS(GhostNorm):
    """`GhostNorm` that requests weight standardization of the preceding layers."""

    standardizes_weights = True


class SeqNormWS(SeqNorm):
    """`SeqNorm` that requests weight standardization of the preceding layers."""

    standardizes_weights = True


class GroupNorm(_Layer, nn.GroupNorm):
    """`torch.nn.GroupNorm` with the checks of `group_norm`.

    Raises:
        LandscapeError: ``num_groups`` does not divide ``num_channels``. On a forward pass: each slice has a single
            value.
    """

    def __init__(self, num_groups: int | None, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(check_channel_groups(num_channels, num_groups), num_channels, eps, affine)

    @_recorded_by_fx
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, with its shape and dtype."""
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)


_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _kept_unsynchronized(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """Return the norm that a conversion would replace by SyncBatchNorm.

    ``convert_sync_batchnorm``, of torch and of timm, makes a SyncBatchNorm of every subclass of BatchNorm, with its
    parameters and buffers, and registers it in the place of the old one.
    """
    old: Any = parent._modules.get(name) if isinstance(new, nn.SyncBatchNorm) else None
    if not isinstance(old, GhostNorm):
        return None
    if any(getattr(new, state) is not getattr(old, state) for state in _STATE):
        return None  # made by somebody, and not by a conversion
    warnings.warn(
        f"{name}: {type(old).__name__} stays as it is, as SyncBatchNorm has no groups. Its statistics are of the "
        "samples of each process. For a SyncBatchNorm there, assign a new one.",
        UserWarning,
        stacklevel=2,
    )
    return old


# The norms stay subclasses of BatchNorm, because `torch.optim.swa_utils.update_bn` and others find them by that. Only
# this conversion must not.
register_module_module_registration_hook(_kept_unsynchronized)  # pyright: ignore[reportArgumentType]
