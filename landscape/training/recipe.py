"""Recipe of a training run: a frozen dataclass that checks itself."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from types import UnionType
from typing import Any, Self, get_args, get_origin

from landscape.callables import is_callable_name
from landscape.errors import LandscapeError
from landscape.names import check_choice, options_of
from landscape.probe.options import DIRECTIONS

SCHEDULES = ("constant", "triangle", "cosine")
"""Learning rate schedules.

``triangle`` rises, falls, then falls to the end (Smith & Topin 2017, arXiv:1708.07120); ``cosine`` rises, then falls
along half a cosine.
"""
AUGMENTATIONS = ("crop", "flip", "cutout")
"""Augmentations of training images."""
PRECISIONS = ("float32", "bfloat16", "float64")
"""Precisions of forward and backward passes; bfloat16 by autocast, with parameters in float32."""
GHOST_BY = ("layer", "accumulation", "ranks")
"""Implementations of GhostNorm: a layer; BatchNorm on micro-batches; BatchNorm in each of several processes."""
LOSSES = ("cross-entropy", "mse", "l1", "huber", "bce")
"""Losses of outputs and targets; ``bce`` is that of logits, and all are means."""
OPTIMIZERS = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad")
"""Optimizers, classes of ``torch.optim``."""
UNCHANGED = "unchanged"
"""Norm of a model of your own that is trained as it is."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run.

    Equal recipes give equal traces on the same machine. The last, incomplete batch of an epoch is left out, so every
    update has ``batch_size`` samples. The probe measures the loss at the parameters ``theta - eta * g`` for each step
    size ``eta``, with the gradient ``g`` of the update.

    Examples:
        >>> from dataclasses import replace
        >>> from landscape import RECIPES
        >>> ghost = replace(RECIPES["digits"], norm="ghost", groups=8)
        >>> ghost.run_name, ghost.norm_options
        ('digits-ghost8-seed0', {'groups': 8})
        >>> ghost.resolve().channel_groups is None  # GhostNorm has no such option
        True
        >>> replace(ghost, epochs=0).resolve()
        Traceback (most recent call last):
        landscape.errors.LandscapeError: epochs=0: must be an integer from 1 to 2**63 - 1.
    """

    name: str
    """Name of the recipe, with which the names of its runs begin."""
    dataset: str
    """Data set, one of those of `landscape.data.load_dataset`; or your own, ``"module:load"`` or ``"file.npz"``."""
    model: str
    """Model: ``"simplenet"``, ``"resnet20"``, ``"resnet56"`` or ``"wrn-28-10"``; or your own, ``"module:build"``."""
    batch_size: int
    """Samples per update."""
    epochs: int
    """Passes over the training set."""
    lr: float
    """Learning rate of the optimizer; the highest one if ``schedule`` changes it."""
    step_sizes: tuple[float, ...]
    """Step sizes eta of the probe, in units of the gradient."""
    relative: bool = False
    """True if ``step_sizes`` are multiples of the current learning rate."""
    norm: str = "batch"
    """Name of the norm, as for `landscape.make_norm`; `UNCHANGED` for a model of your own as it is."""
    loss: str = "cross-entropy"
    """Loss, one of `LOSSES`."""
    optimizer: str = "SGD"
    """Optimizer, one of `OPTIMIZERS`."""
    direction: str = "gradient"
    """Direction of the ray: the ``"gradient"``, or the ``"update"`` that the optimizer makes."""
    groups: int | None = 16
    """Groups G_M of the batch, for norms with that option."""
    channel_groups: int | None = 4
    """Groups G_C of the channels, for norms with that option."""
    devices: int = 1
    """Devices of the training that is reproduced on one.

    Each of them normalizes its own part of a batch, as without synchronization: G_M groups on 8 devices are 8 G_M
    groups of the batch, and BatchNorm is a normalization of 8 groups.
    """
    ghost_by: str = "layer"
    """Implementation of GhostNorm, one of `GHOST_BY`."""
    schedule: str = "constant"
    """Schedule of the learning rate, one of `SCHEDULES`."""
    lr_without_norm: float | None = None
    """Learning rate with ``norm="none"``; None is ``lr``."""
    lr_start: float = 0.1
    """Learning rate at the start of a schedule."""
    lr_end: float = 0.0
    """Learning rate at the end of a schedule."""
    rise: float = 0.45
    """Share of the updates in which a schedule rises, 0 to 1."""
    momentum: float = 0.0
    """Momentum of SGD."""
    nesterov: bool = False
    """True for Nesterov momentum."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer; an L2 penalty, but for AdamW."""
    clip_norm: float | None = None
    """Largest norm of the gradient; a longer one is scaled to it. None does not clip."""
    augment: tuple[str, ...] = ()
    """Names from `AUGMENTATIONS`, applied in the order of that tuple."""
    train_samples: int | None = None
    """Training samples, a stratified subset; None is all but those held out."""
    validation: int = 0
    """Training samples that are held out for validation."""
    precision: str = "float32"
    """Precision of forward and backward passes, one of `PRECISIONS`."""
    channels_last: bool = False
    """True for the channels-last memory layout of model and images."""
    every: int = 1
    """Interval of probed updates: 2 probes every second one."""
    overhead: float | None = None
    """Share of the training time that probes may cost, such as 0.1.

    The probed updates then depend on the speed of the machine.
    """
    gradients: bool = False
    """True to measure the gradient at each step size, too."""
    critical: bool = False
    """True to search for the critical step of each update."""
    engine: str = "auto"
    """Engine that evaluates the rays, as for `landscape.ray_losses`."""
    seed: int = 0
    """Seed of initial weights, data order and augmentation."""

    def __repr__(self) -> str:
        """Return the settings that have no default, or another value."""
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        shown = [
            f"{field.name}={value!r}" for field, value in values if field.default is MISSING or value != field.default
        ]
        return f"Recipe({', '.join(shown)})"

    @property
    def run_name(self) -> str:
        """Name of the run, such as ``mnist-ghost16-seed0``."""
        variant = "-".join(str(value) for value in self.norm_options.values())
        by = "" if self.ghost_by == "layer" else f"-{self.ghost_by}"
        return f"{self.name}-{self.norm}{variant}{by}-seed{self.seed}"

    @property
    def has_own_model(self) -> bool:
        """True if the model is a function of yours, ``"module:build"``."""
        return is_callable_name(self.model)

    @property
    def has_own_data(self) -> bool:
        """True if the data are yours, ``"module:load"`` or ``"file.npz"``."""
        return is_callable_name(self.dataset) or self.dataset.endswith(".npz")

    @property
    def norm_options(self) -> dict[str, int]:
        """Options of the norm, by name."""
        return {name: getattr(self, name) for name in norm_settings(self.norm)}

    @property
    def layer(self) -> tuple[str, dict[str, int]]:
        """Name and options of the layers, for `make_norm`.

        Examples:
            >>> from dataclasses import replace
            >>> from landscape import RECIPES
            >>> recipe = replace(RECIPES["mnist"], devices=8)
            >>> recipe.layer, replace(recipe, norm="seq", channel_groups=2, groups=4).layer
            (('ghost', {'groups': 8}), ('seq', {'channel_groups': 2, 'groups': 32}))
        """
        options = self.norm_options
        if self.norm == "batch" and self.devices > 1:
            return "ghost", {"groups": self.devices}
        return self.norm, options | {name: options[name] * self.devices for name in ("groups",) if name in options}

    def metadata(self) -> dict[str, Any]:
        """Return the settings for ``run.json``; ``name`` is ``recipe``."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        return {"recipe": self.name} | settings

    def resolve(self) -> Self:
        """Check the values; return the recipe as it is trained.

        Options that the norm does not have become None, and ``lr`` becomes ``lr_without_norm`` with ``norm="none"``.

        Raises:
            LandscapeError: A value has the wrong type, or is out of range.
        """
        _check_types(self)
        _check_name(self.name)
        options = norm_settings(self.norm)
        _check_counts(self, options)
        _check_choices(self)
        _check_numbers(self)
        if self.ghost_by != "layer" and self.norm != "ghost":
            raise LandscapeError(f"ghost_by={self.ghost_by!r}: requires norm='ghost', got norm={self.norm!r}. Omit it.")
        if self.devices > 1 and (self.ghost_by != "layer" or self.norm == "ghost-mean"):
            # The variance of "ghost-mean" is over all samples of a device.
            given = f"ghost_by={self.ghost_by!r}" if self.ghost_by != "layer" else f"norm={self.norm!r}"
            raise LandscapeError(f"devices={self.devices}: must be 1 with {given}. Omit one of them.")
        if self.ghost_by != "layer" and (self.groups or 1) > self.batch_size:
            raise LandscapeError(f"groups={self.groups}: must be at most batch_size={self.batch_size}.")
        unused = {name: None for name in ("groups", "channel_groups") if name not in options}
        lr = self.lr_without_norm if self.norm == "none" and self.lr_without_norm is not None else self.lr
        return replace(self, **unused, lr=lr, lr_without_norm=None)


def norm_settings(norm: str) -> tuple[str, ...]:
    """Return the options of a norm, none for `UNCHANGED`."""
    return () if norm == UNCHANGED else options_of(norm)


def _check_types(recipe: Recipe) -> None:
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if not _has_type(value, field.type):
            kind = getattr(field.type, "__name__", field.type)
            shown = "recipe" if field.name == "name" else field.name
            raise LandscapeError(f"{shown}={value!r:.100}: must be {kind}, got {type(value).__name__}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Return True if a value fits a field's type."""
    if isinstance(kind, UnionType):
        return any(_has_type(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_has_type(each, get_args(kind)[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, float | int if kind is float else kind)  # 1 is a float here, as in type hints.


def _check_name(name: str) -> None:
    """Raise a LandscapeError unless the name fits a folder."""
    if not 1 <= len(name) <= 100 or not name.isprintable() or name.startswith(".") or "/" in name or "\\" in name:
        raise LandscapeError(
            f"recipe={name!r:.100}: must be the name of a folder. Use 1 to 100 printable characters without slashes, "
            "not beginning with a dot."
        )


def _check_counts(recipe: Recipe, options: Sequence[str]) -> None:
    lowest = dict.fromkeys(("batch_size", "epochs", "every", "devices", *options), 1) | {"validation": 0, "seed": 0}
    if recipe.train_samples is not None:
        lowest["train_samples"] = 1
    for name, least in lowest.items():
        value = getattr(recipe, name)
        if value is None or not least <= value < 2**63:
            raise LandscapeError(f"{name}={value}: must be an integer from {least} to 2**63 - 1.")


_CHOICES = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "ghost_by": GHOST_BY,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "direction": DIRECTIONS,
}


def _check_choices(recipe: Recipe) -> None:
    for name, known in _CHOICES.items():
        check_choice(name, getattr(recipe, name), known)
    if recipe.norm == UNCHANGED and not recipe.has_own_model:
        raise LandscapeError(
            f"norm={UNCHANGED!r}: requires a model of your own, got model={recipe.model!r:.100}. Use another norm."
        )
    for name in recipe.augment:
        check_choice("augment", name, AUGMENTATIONS)


def _check_numbers(recipe: Recipe) -> None:
    for name in ("lr", "lr_without_norm", "lr_start", "clip_norm"):
        value = getattr(recipe, name)
        if value is not None and not 1e-38 <= value <= 1e38:
            raise LandscapeError(f"{name}={value}: must be from 1e-38 to 1e38, the range of float32.")
    for name in ("lr_end", "momentum", "weight_decay"):
        value = getattr(recipe, name)
        if not 0 <= value <= 1e38:
            raise LandscapeError(f"{name}={value}: must be from 0 to 1e38, the range of float32.")
    if recipe.momentum and recipe.optimizer != "SGD":
        raise LandscapeError(
            f"momentum={recipe.momentum}: requires optimizer='SGD', got {recipe.optimizer!r}. Set momentum=0.0."
        )
    if recipe.nesterov and not recipe.momentum:
        raise LandscapeError("nesterov=True: requires momentum above 0. Set momentum, or nesterov=False.")
    most = 0.5 if recipe.schedule == "triangle" else 1  # A triangle falls for as many updates as it rises.
    if not 0 < recipe.rise < most:
        raise LandscapeError(f"rise={recipe.rise}: must be between 0 and {most}, a share of the updates.")
    if recipe.overhead is not None and not 0 < recipe.overhead < 1e38:
        raise LandscapeError(f"overhead={recipe.overhead}: must be above 0, a share of the training time.")
