"""Normalization layers that share BatchNorm's parameters and buffers, and how to choose one by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from landscape.errors import UserError
from landscape.ghost import (
    Layout,
    check_channel_groups,
    ghost_norm,
    ghost_norm_with_statistics,
    group_norm,
    seq_norm,
)
from landscape.vocabulary import check_norm

__all__ = [
    "BatchNorm",
    "GhostNorm",
    "GroupNorm",
    "SeqNorm",
    "convert_norms",
    "ghost_norm",
    "make_norm",
    "seq_norm",
]


class BatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d`, `2d` and `3d` in one: input (M, C) or (M, C, ...)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise UserError(
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
        UserError: Not exactly one of ``groups`` and ``group_size`` is given, or it is below 1. In use as `ghost_norm`.
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
            raise UserError(
                f"{type(self).__name__} got groups={groups} and group_size={group_size}: it takes exactly one of the "
                "two, at least 1. Give groups for a fixed number of groups, group_size for a fixed size."
            )
        self.groups, self.group_size = groups, group_size
        self.layout: Layout = layout

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...) by the groups of the batch; in evaluation by the running statistics."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        groups = self.groups or max(1, len(input) // (self.group_size or 1))
        y, mean, var = ghost_norm_with_statistics(input, groups, self.weight, self.bias, self.layout, self.eps)
        if self.training and self.track_running_stats:
            self._track(mean, var)
        return y

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


class SeqNorm(GhostNorm):
    """`seq_norm` with learned scale and shift, and running statistics of what GroupNorm leaves, as in `GhostNorm`.

    Args:
        num_features: C.
        groups: G, the number of groups of a batch.
        channel_groups: number of groups of the channels; divides C.
        **options: the keywords of `GhostNorm`.

    Raises:
        UserError: As `GhostNorm`, or ``channel_groups`` does not divide C. In use as `seq_norm`.
    """

    def __init__(self, num_features: int, groups: int | None = None, channel_groups: int = 1, **options: Any) -> None:
        super().__init__(num_features, groups, **options)
        self.channel_groups = check_channel_groups(num_features, channel_groups)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...) by channel groups, then as `GhostNorm`."""
        self._check_input_dim(input)
        return super().forward(group_norm(input, self.channel_groups, eps=self.eps))

    def extra_repr(self) -> str:
        """GhostNorm's settings and the groups of the channels."""
        return f"{super().extra_repr()}, channel_groups={self.channel_groups}"


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, with `group_norm`'s errors.

    Raises:
        UserError: ``num_groups`` does not divide ``num_channels``. In use as `group_norm`.
    """

    def __init__(self, num_groups: int | None, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(check_channel_groups(num_channels, num_groups), num_channels, eps, affine)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (M, C) or (M, C, ...)."""
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)


def _none(num_features: int) -> nn.Identity:
    return nn.Identity()


def _group(num_features: int, channel_groups: int | None = None, **options: Any) -> GroupNorm:
    return GroupNorm(channel_groups, num_features, **options)


def _instance(num_features: int, **options: Any) -> GroupNorm:
    return GroupNorm(num_features, num_features, **options)


_PLAIN = ("eps", "affine")
_RUNNING = (*_PLAIN, "momentum", "track_running_stats")
_GHOST = (*_RUNNING, "groups", "group_size", "layout")
MAKERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "none": (_none, ()),
    "batch": (BatchNorm, _RUNNING),
    "layer": (partial(GroupNorm, 1), _PLAIN),
    "instance": (_instance, _PLAIN),
    "group": (_group, (*_PLAIN, "channel_groups")),
    "ghost": (GhostNorm, _GHOST),
    "seq": (SeqNorm, (*_GHOST, "channel_groups")),
}
"""The norms by name: what makes one from the number of features, and the options it takes."""


def make_norm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """Choose a norm by name; ``make_norm("ghost", groups=16)(64)`` is ``GhostNorm(64, groups=16)``.

    All but ``none`` take (M, C) and (M, C, ...) and learn a scale and a shift per channel: ``layer`` normalizes each
    sample, ``instance`` each channel of each sample, ``group`` each of ``channel_groups`` parts of a sample's channels.

    Args:
        name: one of `landscape.vocabulary.NORMS`.
        **options: keywords of that norm; None leaves the default (also of momentum), so that a command line can hand on
            what it has.

    Returns:
        A factory: number of features to module. It raises UserError where the number of features or a missing option
        forbids the norm.

    Raises:
        UserError: The name is unknown, or the norm does not take an option that is not None.
    """
    check_norm(name)
    make, allowed = MAKERS[name]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(allowed)):
        raise UserError(
            f"The norm {name!r} does not take {', '.join(unknown)}: it takes {', '.join(allowed) or 'no options'}. "
            "Leave out the others."
        )
    return partial(make, **given)


_SETTINGS = ("eps", "momentum", "affine", "track_running_stats")
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_norms(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every BatchNorm of a model, ``nn.BatchNorm*`` or ours, in place, by ``make(num_features)``.

    The new module takes over device, dtype and training flag, and of eps, momentum, parameters and buffers those that
    it has. They are the same objects, so an optimizer and tied weights stay valid.

    Args:
        model: any module; modules used in several places stay shared.
        make: factory, as from `make_norm`.

    Returns:
        ``model``, or the new module where the model itself is a BatchNorm.

    Raises:
        UserError: A lazy BatchNorm does not yet know its number of features.
    """
    places = {path: old for path, old in model.named_modules(remove_duplicate=False) if _is_batch_norm(old)}
    twins = {old: _twin(old, make) for old in places.values()}
    for path, old in places.items():
        parent, _, name = path.rpartition(".")
        if path:
            setattr(model.get_submodule(parent), name, twins[old])
    return twins.get(model, model)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, GhostNorm)


def _twin(old: Any, make: Callable[[int], nn.Module]) -> nn.Module:
    if isinstance(old, LazyModuleMixin):
        raise UserError(f"{old} has not seen its input yet. Run one batch through the model before converting it.")
    new = make(old.num_features)
    if (tensor := old.weight if old.affine else old.running_mean) is not None:
        new.to(tensor)
    for name in _SETTINGS + _TENSORS:
        own = getattr(new, name, None)
        if own is not None and own is not False:
            setattr(new, name, getattr(old, name))
    return new.train(old.training)
