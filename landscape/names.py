"""Norms and measures by the names they are asked for: what they are called in print, and what tells them apart."""

from dataclasses import dataclass, field

from landscape.errors import LandscapeError


@dataclass(frozen=True)
class NormInfo:
    """How a norm is written in figures and tables, and the paper's symbol of each option that makes a variant of it."""

    title: str
    symbols: dict[str, str] = field(default_factory=dict)


NORMS = {
    "none": NormInfo("No normalization"),
    "batch": NormInfo("BatchNorm"),
    "ghost": NormInfo("GhostNorm", {"groups": "G"}),
    "seq": NormInfo("SeqNorm", {"channel_groups": "G_C", "groups": "G_M"}),
    "group": NormInfo("GroupNorm", {"channel_groups": "G_C"}),
    "layer": NormInfo("LayerNorm"),
    "instance": NormInfo("InstanceNorm"),
    "seq-reversed": NormInfo("SeqNorm reversed", {"groups": "G_M", "channel_groups": "G_C"}),
    "ghost-ws": NormInfo("GhostNorm + WS", {"groups": "G"}),
    "seq-ws": NormInfo("SeqNorm + WS", {"channel_groups": "G_C", "groups": "G_M"}),
    "ghost-mean": NormInfo("GhostNorm, batch variance", {"groups": "G"}),
    "batch-group": NormInfo("Batch/GroupNorm", {"channel_groups": "G_C", "groups": "G_M"}),
}
"""Every norm that ``make_norm`` knows, in the order in which figures show them."""


TITLES = {
    "simplenet": "SimpleNet",
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "wrn-28-10": "WideResNet-28-10",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
"""Models and data sets as figures and tables write them."""


def check_norm(name: str) -> None:
    """Raise a LandscapeError unless there is a norm of that name."""
    if not isinstance(name, str) or name not in NORMS:
        raise LandscapeError(f"Unknown norm {name!r}; choose one of {', '.join(NORMS)}.")


def options_of(norm: str) -> tuple[str, ...]:
    """The options that make variants of a norm; a LandscapeError if there is no such norm."""
    check_norm(norm)
    return tuple(NORMS[norm].symbols)


@dataclass(frozen=True)
class MeasureInfo:
    """How a measure of smoothness is written under and beside a figure, and what it asks of a trace."""

    title: str
    along: str
    """The column of lists that it is computed from, one value per step size."""
    band: str = ""
    """What its band reaches over; empty if it has none."""
    line: str = ""
    """What its line is; empty if it has none."""
    needs: tuple[str, ...] = ()
    """Columns that a trace may lack."""
    at_zero: bool = True
    """Whether step size 0 says something."""
    has_origin: bool = True
    """Whether its 0 means something; that of a loss does not, since any constant can be added to a loss."""


MEASURES = {
    "loss": MeasureInfo(
        "loss", "losses", "smallest to largest loss", "the loss before the step, at step size 0", has_origin=False
    ),
    "predictiveness": MeasureInfo(
        "gradient predictiveness",
        "gradient_distances",
        band="smallest to largest l2 distance from the gradient before the step to the gradient there",
        needs=("gradient_distances",),
    ),
    "beta": MeasureInfo(
        "effective β-smoothness",
        "gradient_distances",
        line="largest ratio of the change of the gradient to the distance moved (l2 norms)",
        needs=("gradient_distances", "direction_norm"),
        at_zero=False,
    ),
    "gap": MeasureInfo(
        "gap to the linear prediction",
        "losses",
        band="smallest to largest difference between the loss and its linear prediction by the gradient",
        needs=("slope",),
    ),
    "curvature": MeasureInfo(
        "curvature along the ray",
        "losses",
        band="smallest to largest mean curvature of the loss on the way there",
        needs=("slope", "direction_norm"),
        at_zero=False,
    ),
}
"""Every measure of smoothness that figures and tables know."""


def check_measure(name: str) -> None:
    """Raise a LandscapeError unless there is a measure of that name."""
    if not isinstance(name, str) or name not in MEASURES:
        raise LandscapeError(f"Unknown measure {name!r}; choose one of {', '.join(MEASURES)}.")
