"""Norms by name, and conversion of a model's BatchNorms to them."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from landscape.errors import LandscapeError
from landscape.names import check_norm
from landscape.norms.functional import Layout
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


def _none(num_features: int) -> nn.Identity:
    return nn.Identity()


def _group(num_features: int, channel_groups: int | None = None, **options: Any) -> GroupNorm:
    return GroupNorm(channel_groups, num_features, **options)


def _instance(num_features: int, **options: Any) -> GroupNorm:
    return GroupNorm(num_features, num_features, **options)


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
"""Norms by name: function of num_features and options that makes a module, names of those options."""


def make_norm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """Return a factory of norms, by name.

    ``make_norm("ghost", groups=16)(64)`` is ``GhostNorm(64, groups=16)``. Every norm normalizes slices by
    y = (x - mu) / sqrt(sigma2 + eps) * weight + bias and takes inputs (M, C) and (M, C, ...); a slice is

    ================ ===================================================================================
    ``none``         absent: y = x
    ``batch``        a channel, over the batch (`BatchNorm`)
    ``layer``        a sample
    ``instance``     a channel of a sample
    ``group``        C / channel_groups channels of a sample (`group_norm`)
    ``ghost``        a channel, over a group of samples (`GhostNorm`)
    ``seq``          that of ``group``, then that of ``ghost`` (`SeqNorm`)
    ``seq-reversed`` that of ``ghost``, then that of ``group``
    ``ghost-mean``   that of ``ghost`` for mu, that of ``batch`` for sigma2 (`ghost_mean_norm`)
    ``batch-group``  C / channel_groups channels, over a group of samples (`batch_group_norm`)
    ``ghost-ws``     that of ``ghost``; the weights of preceding layers are standardized
    ``seq-ws``       that of ``seq``; the weights of preceding layers are standardized
    ================ ===================================================================================

    Weights are standardized by `standardize_weights`, which `convert_norms` and the models of this package call.

    Args:
        name: Name of the norm.
        **options: Keywords of that norm, such as ``groups``, ``channel_groups``, ``eps``, ``momentum``; None stands for
            the default (of momentum too).

    Returns:
        Function (num_features) -> module. It raises a LandscapeError if num_features is not an integer of at least 1,
        or if an option is missing or incompatible with it.

    Raises:
        LandscapeError: The name is unknown, the norm has no such option, or the value of an option is not allowed.

    Examples:
        >>> make_norm("ghost", groups=16)(64)
        GhostNorm(64, groups=16)
        >>> make_norm("layer", groups=16)
        Traceback (most recent call last):
        landscape.errors.LandscapeError: groups=16: the norm 'layer' takes eps, affine. Omit the others.
    """
    check_norm(name)
    make, allowed = REGISTRY[name]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := ", ".join(f"{option}={given[option]!r:.100}" for option in sorted(given.keys() - set(allowed))):
        raise LandscapeError(
            f"{unknown}: the norm {name!r} takes {', '.join(allowed) or 'no options'}. Omit the others."
        )
    for option, value in given.items():
        constraint, is_valid = _OPTIONS[option]
        if not is_valid(value):
            raise LandscapeError(f"{option}={value!r:.100}: must be {constraint}.")
    return partial(_make, make, given)


def _make(make: Callable[..., nn.Module], options: dict[str, Any], num_features: int) -> nn.Module:
    if not _is_count(num_features):
        raise LandscapeError(f"num_features={num_features!r:.100}: must be {_COUNT[0]}. Pass the number of channels.")
    return make(num_features, **options)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_COUNT = ("an integer of at least 1", _is_count)
_FRACTION = ("a number from 0 to 1", _is_fraction)
_BOOL = ("True or False", _is_bool)
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("groups", "group_size", "channel_groups"), _COUNT),
    **dict.fromkeys(("eps", "momentum"), _FRACTION),
    **dict.fromkeys(("affine", "track_running_stats"), _BOOL),
    "layout": (" or ".join(get_args(Layout)), lambda value: value in get_args(Layout)),
}
"""Constraint of each option, in words and as a function."""


def convert_norms(model: nn.Module, make: str | Callable[[int], nn.Module], **options: Any) -> nn.Module:
    """Replace every BatchNorm of a model, in place.

    Each ``torch.nn.BatchNorm*``, ``torch.nn.SyncBatchNorm`` and ``landscape.norms.BatchNorm`` becomes
    ``make(num_features)``, which is not synchronized between processes. Other norms stay, such as FrozenBatchNorm,
    which normalizes by constants. The new module gets the device, dtype and training flag of the old one, and, of eps,
    momentum, affine, track_running_stats, parameters and buffers, those that it has too. Parameters and buffers are the
    same objects, so that optimizers and tied weights stay valid. If the new norms request weight standardization,
    `standardize_weights` is called, which renames parameters.

    Args:
        model: Any module. A BatchNorm that is used in several places stays shared.
        make: Name of a norm, or a function (num_features) -> module, as from `make_norm`.
        **options: Options of the named norm, as for `make_norm`.

    Returns:
        ``model``, or the new module if the model itself is a BatchNorm.

    Raises:
        LandscapeError: A lazy BatchNorm, or a lazy layer whose weights are to be standardized, has not been
            initialized by a forward pass; or a subclass of BatchNorm does more than normalize, as timm's
            BatchNormAct2d, which would be lost. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.2), nn.ReLU())
        >>> convert_norms(model, "ghost", groups=4)
        Sequential(
          (0): Linear(in_features=6, out_features=8, bias=True)
          (1): GhostNorm(8, groups=4, momentum=0.2)
          (2): ReLU()
        )
    """
    if isinstance(make, str):
        make = make_norm(make, **options)
    elif options or not callable(make):
        raise LandscapeError(
            f"make={make!r:.100}: must be the name of a norm and its options, or a function of num_features alone. "
            'Use "ghost", groups=16, or make_norm("ghost", groups=16).'
        )
    new_norms = {old: _converted(path, old, make) for path, old in batch_norms(model).items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new_norms:
                setattr(parent, name, new_norms[child])
    return standardize_weights(new_norms.get(model, model))


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorms that `convert_norms` replaces, by path.

    Examples:
        >>> list(batch_norms(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))))
        ['1']
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, GhostNorm)
    }


_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)
_ATTRIBUTES = (*_RUNNING, "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _check_only_normalizes(path: str, old: nn.Module) -> None:
    """Raise a LandscapeError if a layer does more than normalize."""
    more = [name for name in (*old._modules, *old._parameters, *old._buffers) if name not in _ATTRIBUTES]
    if "forward" in vars(old) or type(old).forward not in _FORWARDS:
        more.append("a forward method of its own")
    if any((old._forward_hooks, old._forward_pre_hooks, old._backward_hooks, old._backward_pre_hooks)):
        more.append("hooks")
    if more:
        raise LandscapeError(
            f"{path or 'model'}: {type(old).__name__} has {', '.join(more)}, which would be lost. Put an nn.BatchNorm* "
            "and separate layers for the rest in its place, and remove hooks, before converting the model."
        )


def _converted(path: str, old: Any, make: Callable[[int], nn.Module]) -> nn.Module:
    if isinstance(old, LazyModuleMixin):
        raise LandscapeError(
            f"{old}: has no number of features yet. Run one batch through the model before converting it."
        )
    _check_only_normalizes(path, old)
    new = make(old.num_features)
    if (tensor := old.weight if old.affine else old.running_mean) is not None:
        new.to(tensor)
    for name in _ATTRIBUTES:
        # None and False are left as they are: such a norm has no parameters or no running statistics.
        current = getattr(new, name, None)
        if current is not None and current is not False:
            setattr(new, name, getattr(old, name))
    return new.train(old.training)
