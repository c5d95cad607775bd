"""Norms by name, and in the place of a model's BatchNorms."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from landscape.errors import LandscapeError
from landscape.names import check_norm
from landscape.norms.functional import Layout, ghost_norm, seq_norm
from landscape.norms.layers import (
    BatchGroupNorm,
    BatchNorm,
    GhostMeanNorm,
    GhostNorm,
    GhostNormWS,
    GroupNorm,
    ReversedSeqNorm,
    SeqNorm,
    SeqNormWS,
)
from landscape.norms.weight_standardization import standardize_weights

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


def _none(num_features: int) -> nn.Identity:
    return nn.Identity()


def _group(num_features: int, channel_groups: int | None = None, **options: Any) -> GroupNorm:
    return GroupNorm(channel_groups, num_features, **options)


def _instance(num_features: int, **options: Any) -> GroupNorm:
    return GroupNorm(num_features, num_features, **options)


_WHOLE = "a whole number from 1 on"
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "groups": (_WHOLE, lambda value: _is_whole(value)),
    "group_size": (_WHOLE, lambda value: _is_whole(value)),
    "channel_groups": (_WHOLE, lambda value: _is_whole(value)),
    "eps": ("a number from 0 to 1", lambda value: _is_share(value)),
    "momentum": ("a number from 0 to 1", lambda value: _is_share(value)),
    "affine": ("True or False", lambda value: isinstance(value, bool)),
    "track_running_stats": ("True or False", lambda value: isinstance(value, bool)),
    "layout": (" or ".join(get_args(Layout)), lambda value: value in get_args(Layout)),
}
"""What each option may be."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _made(make: Callable[..., nn.Module], options: dict[str, Any], num_features: int) -> nn.Module:
    if not _is_whole(num_features):
        raise LandscapeError(f"num_features={num_features!r:.100}: give the number of channels, {_WHOLE}.")
    return make(num_features, **options)


_PLAIN = ("eps", "affine")
_RUNNING = (*_PLAIN, "momentum", "track_running_stats")
_GHOST = (*_RUNNING, "groups", "group_size", "layout")
_SEQ = (*_GHOST, "channel_groups")
REGISTRY: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "none": (_none, ()),
    "batch": (BatchNorm, _RUNNING),
    "layer": (partial(GroupNorm, 1), _PLAIN),
    "instance": (_instance, _PLAIN),
    "group": (_group, (*_PLAIN, "channel_groups")),
    "ghost": (GhostNorm, _GHOST),
    "seq": (SeqNorm, _SEQ),
    "seq-reversed": (ReversedSeqNorm, _SEQ),
    "ghost-ws": (GhostNormWS, _GHOST),
    "seq-ws": (SeqNormWS, _SEQ),
    "ghost-mean": (GhostMeanNorm, _GHOST),
    "batch-group": (BatchGroupNorm, _SEQ),
}
"""The norms by name: what makes one from the number of features, and the options it takes."""


def make_norm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """Choose a norm by name; ``make_norm("ghost", groups=16)(64)`` is ``GhostNorm(64, groups=16)``.

    All but ``none`` take (M, C) and (M, C, ...) and learn a scale and a shift per channel: ``layer`` normalizes each
    sample, ``instance`` each channel of each sample, ``group`` each of ``channel_groups`` parts of a sample's channels.
    The names with ``-ws`` stand for the same norm behind layers with standardized weights, which is up to the model:
    those of this package and `convert_norms` see to it, another calls `landscape.norms.standardize_weights`.

    Args:
        name: one of `landscape.names.NORMS`.
        **options: keywords of that norm; None leaves the default (also of momentum), so that a command line can hand on
            what it has.

    Returns:
        A factory: number of features to module. It raises LandscapeError where the number of features or a missing option
        forbids the norm.

    Raises:
        LandscapeError: The name is unknown, or the norm does not take an option that is not None, or not this value of it.
    """
    check_norm(name)
    make, allowed = REGISTRY[name]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(allowed)):
        raise LandscapeError(
            f"The norm {name!r} does not take {', '.join(unknown)}: it takes {', '.join(allowed) or 'no options'}. "
            "Leave out the others."
        )
    for option, value in given.items():
        words, fits = _OPTIONS[option]
        if not fits(value):
            raise LandscapeError(f"{option}={value!r:.100}: give {words}.")
    return partial(_made, make, given)


_SETTINGS = ("eps", "momentum", "affine", "track_running_stats")
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_norms(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every BatchNorm of a model, ``nn.BatchNorm*`` or ours, in place, by ``make(num_features)``.

    The new module takes over device, dtype and training flag, and of eps, momentum, parameters and buffers those that
    it has. They are the same objects, so an optimizer and tied weights stay valid. Where the new norms ask for weight
    standardization, it is done as by `landscape.norms.standardize_weights`, which renames parameters.

    Args:
        model: any module; modules used in several places stay shared.
        make: factory, as from `make_norm`.

    Returns:
        ``model``, or the new module where the model itself is a BatchNorm.

    Raises:
        LandscapeError: A lazy BatchNorm does not yet know its number of features, or a lazy layer that is to be
            standardized its weights.
    """
    places = {path: old for path, old in model.named_modules(remove_duplicate=False) if _is_batch_norm(old)}
    twins = {old: _twin(old, make) for old in places.values()}
    for path, old in places.items():
        parent, _, name = path.rpartition(".")
        if path:
            setattr(model.get_submodule(parent), name, twins[old])
    return standardize_weights(twins.get(model, model))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, GhostNorm)


def _twin(old: Any, make: Callable[[int], nn.Module]) -> nn.Module:
    if isinstance(old, LazyModuleMixin):
        raise LandscapeError(f"{old} has not seen its input yet. Run one batch through the model before converting it.")
    new = make(old.num_features)
    if (tensor := old.weight if old.affine else old.running_mean) is not None:
        new.to(tensor)
    for name in _SETTINGS + _TENSORS:
        own = getattr(new, name, None)
        if own is not None and own is not False:
            setattr(new, name, getattr(old, name))
    return new.train(old.training)
