"""Norms and measures by the names they are asked for: what they are called in print, and what tells them apart."""

from dataclasses import dataclass, field

from landscape.errors import UserError


@dataclass(frozen=True)
class NormName:
    """How a norm is written in figures and tables, and the paper's symbol of each option that makes a variant of it."""

    title: str
    symbols: dict[str, str] = field(default_factory=dict)


NORMS = {
    "none": NormName("No normalization"),
    "batch": NormName("BatchNorm"),
    "ghost": NormName("GhostNorm", {"groups": "G"}),
    "seq": NormName("SeqNorm", {"channel_groups": "G_C", "groups": "G_M"}),
    "group": NormName("GroupNorm", {"channel_groups": "G_C"}),
    "layer": NormName("LayerNorm"),
    "instance": NormName("InstanceNorm"),
    "seq-reversed": NormName("SeqNorm reversed", {"groups": "G_M", "channel_groups": "G_C"}),
    "ghost-ws": NormName("GhostNorm + WS", {"groups": "G"}),
    "seq-ws": NormName("SeqNorm + WS", {"channel_groups": "G_C", "groups": "G_M"}),
    "ghost-mean": NormName("GhostNorm, batch variance", {"groups": "G"}),
    "batch-group": NormName("Batch/GroupNorm", {"channel_groups": "G_C", "groups": "G_M"}),
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
    """Raise a UserError unless there is a norm of that name."""
    if not isinstance(name, str) or name not in NORMS:
        raise UserError(f"Unknown norm {name!r}; choose one of {', '.join(NORMS)}.")


def options_of(norm: str) -> tuple[str, ...]:
    """The options that make variants of a norm; a UserError if there is no such norm."""
    check_norm(norm)
    return tuple(NORMS[norm].symbols)


@dataclass(frozen=True)
class MeasureName:
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
    "loss": MeasureName(
        "loss", "losses", "smallest to largest loss", "the loss before the step, at step size 0", has_origin=False
    ),
    "predictiveness": MeasureName(
        "gradient predictiveness",
        "gradient_distances",
        band="smallest to largest l2 distance from the gradient before the step to the gradient there",
        needs=("gradient_distances",),
    ),
    "beta": MeasureName(
        "effective β-smoothness",
        "gradient_distances",
        line="largest ratio of the change of the gradient to the distance moved (l2 norms)",
        needs=("gradient_distances", "direction_norm"),
        at_zero=False,
    ),
    "gap": MeasureName(
        "gap to the linear prediction",
        "losses",
        band="smallest to largest difference between the loss and its linear prediction by the gradient",
        needs=("slope",),
    ),
    "curvature": MeasureName(
        "curvature along the ray",
        "losses",
        band="smallest to largest mean curvature of the loss on the way there",
        needs=("slope", "direction_norm"),
        at_zero=False,
    ),
}
"""Every measure of smoothness that figures and tables know."""


def check_measure(name: str) -> None:
    """Raise a UserError unless there is a measure of that name."""
    if not isinstance(name, str) or name not in MEASURES:
        raise UserError(f"Unknown measure {name!r}; choose one of {', '.join(MEASURES)}.")
