"""What an experiment is: frozen recipes, by name."""

from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Self, get_args, get_origin

from landscape.errors import LandscapeError
from landscape.names import options_of

SCHEDULES = ("constant", "triangle", "cosine")
"""The learning rate: as it is; up and down, then to the end (Smith & Topin 2017); up, then down along a cosine."""
AUGMENTATIONS = ("crop", "flip", "cutout")
"""What may be done to images before they are trained on."""
PRECISIONS = ("float32", "bfloat16", "float64")
"""In which forward and backward passes are computed; bfloat16 by autocast, with parameters in float32."""
GHOST_BY = ("layer", "accumulation", "ranks")
"""Where GhostNorm's groups come from: the layer; micro-batches through BatchNorm; processes with a BatchNorm each."""


@dataclass(frozen=True)
class Recipe:
    """One training run, completely; equal recipes give equal traces on the same machine.

    The last, incomplete batch of an epoch is left out, so that every update has ``batch_size`` samples and every ghost
    batch its full share of them.
    """

    recipe: str
    dataset: str
    model: str
    batch_size: int
    epochs: int
    lr: float
    """Learning rate of SGD; where it changes, the highest."""
    probe_lrs: tuple[float, ...]
    """Step sizes eta of the probe."""
    relative: bool = False
    """Whether ``probe_lrs`` are multiples of the current learning rate."""
    norm: str = "batch"
    groups: int | None = 16
    """Groups G_M of the batch, for norms that take them."""
    channel_groups: int | None = 4
    """Groups G_C of the channels, for norms that take them."""
    ghost_by: str = "layer"
    """How GhostNorm is implemented, one of ``GHOST_BY``."""
    schedule: str = "constant"
    """One of ``SCHEDULES``."""
    lr_without_norm: float | None = None
    """The highest learning rate where there is no norm, if it is another."""
    lr_start: float = 0.1
    """Learning rate that a schedule starts from."""
    lr_end: float = 0.0
    """Learning rate that a schedule ends at."""
    rise: float = 0.45
    """Share of the updates in which a schedule rises."""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    augment: tuple[str, ...] = ()
    """Of ``AUGMENTATIONS``, in their order."""
    train_samples: int | None = None
    """How much of the training set is used, with the share of each class kept; by default all that is not held out."""
    validation: int = 0
    """How many samples of the training set are held out."""
    precision: str = "float32"
    """One of ``PRECISIONS``."""
    channels_last: bool = False
    """Whether model and images are in channels-last layout."""
    every: int = 1
    """Every how many updates the probe measures."""
    overhead: float | None = None
    """Share of the training time that probes may cost; measured updates then depend on how fast the machine is."""
    gradients: bool = False
    """Whether the gradient is computed at each step size too."""
    engine: str = "affine"
    """How rays are evaluated; ``auto`` is not repeatable: which engine is fastest may differ between runs."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data and of its augmentation."""

    @property
    def run_name(self) -> str:
        """Name of the run, such as ``mnist-ghost16-seed0``."""
        variant = "-".join(str(value) for value in self.norm_options.values())
        by = "" if self.ghost_by == "layer" else f"-{self.ghost_by}"
        return f"{self.recipe}-{self.norm}{variant}{by}-seed{self.seed}"

    @property
    def norm_options(self) -> dict[str, int]:
        """The options that this recipe's norm takes."""
        return {name: getattr(self, name) for name in options_of(self.norm)}

    def resolve(self) -> Self:
        """The recipe as it is trained: without options that its norm does not take, with its own learning rate.

        Raises:
            LandscapeError: A value is of another type than it should be, or out of range.
        """
        _check_types(self)
        _check_name(self.recipe)
        options = options_of(self.norm)
        _check_counts(self, ("batch_size", "epochs", "every", *options))
        _check_choices(self)
        _check_numbers(self)
        if self.ghost_by != "layer" and self.norm != "ghost":
            raise LandscapeError(f"ghost_by={self.ghost_by!r} is a way to get GhostNorm; the norm is {self.norm!r}.")
        if self.ghost_by != "layer" and (self.groups or 1) > self.batch_size:
            raise LandscapeError(f"groups={self.groups} of batches of {self.batch_size} samples: take fewer groups.")
        unused = {name: None for name in ("groups", "channel_groups") if name not in options}
        lr = self.lr_without_norm if self.norm == "none" and self.lr_without_norm is not None else self.lr
        return replace(self, **unused, lr=lr, lr_without_norm=None)


def _check_types(recipe: Recipe) -> None:
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if not _fits(value, field.type):
            kind = getattr(field.type, "__name__", field.type)
            raise LandscapeError(f"{field.name}={value!r:.100} is a {type(value).__name__}; give {kind}.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as fields declare it; whole numbers are numbers, and lists as good as tuples."""
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, get_args(kind)[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, float | int if kind is float else kind)


def _check_name(name: str) -> None:
    """The name becomes that of a folder, and is written under figures."""
    if not 1 <= len(name) <= 100 or not name.isprintable() or name.startswith(".") or "/" in name or "\\" in name:
        raise LandscapeError(
            f"recipe={name!r:.100} cannot be the name of a folder; give 1 to 100 printable characters without slashes "
            "that do not begin with a dot."
        )


def _check_counts(recipe: Recipe, names: tuple[str, ...]) -> None:
    for name in (*names, *(["train_samples"] if recipe.train_samples is not None else [])):
        value = getattr(recipe, name)
        if value is None or not 1 <= value < 2**63:
            raise LandscapeError(f"{name}={value} is out of range; give a whole number from 1 to 2**63 - 1.")
    for name in ("validation", "seed"):
        if not 0 <= getattr(recipe, name) < 2**63:
            raise LandscapeError(
                f"{name}={getattr(recipe, name)} is out of range; give a whole number from 0 to 2**63 - 1."
            )


def _check_choices(recipe: Recipe) -> None:
    choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "ghost_by": GHOST_BY}
    for name, allowed in choices.items():
        if getattr(recipe, name) not in allowed:
            raise LandscapeError(f"Unknown {name} {getattr(recipe, name)!r}; choose one of {', '.join(allowed)}.")
    if unknown := [name for name in recipe.augment if name not in AUGMENTATIONS]:
        raise LandscapeError(f"Unknown augmentation {unknown[0]!r}; choose of {', '.join(AUGMENTATIONS)}.")


def _check_numbers(recipe: Recipe) -> None:
    for name in ("lr", "lr_without_norm", "lr_start"):
        value = getattr(recipe, name)
        if value is not None and not 1e-38 <= value <= 1e38:
            raise LandscapeError(
                f"{name}={value} is out of range; give a learning rate that float32 holds, 1e-38 to 1e38."
            )
    for name in ("lr_end", "momentum", "weight_decay"):
        value = getattr(recipe, name)
        if not 0 <= value <= 1e38:
            raise LandscapeError(f"{name}={value} is out of range; give a number that float32 holds, 0 to 1e38.")
    if recipe.nesterov and not recipe.momentum:
        raise LandscapeError(
            "nesterov=True with momentum=0.0: Nesterov's momentum needs some; give it, or leave nesterov out."
        )
    most = 0.5 if recipe.schedule == "triangle" else 1  # a triangle falls as long as it rises
    if not 0 < recipe.rise < most:
        raise LandscapeError(f"rise={recipe.rise} is out of range; give a share of the updates between 0 and {most}.")
    if recipe.overhead is not None and not 0 < recipe.overhead < 1e38:
        raise LandscapeError(f"overhead={recipe.overhead} is out of range; give a share of the training time above 0.")
