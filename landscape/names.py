"""Names of norms, measures, models and data sets, and how figures and tables write them."""

from collections.abc import Collection
from dataclasses import dataclass

from landscape.errors import LandscapeError


@dataclass(frozen=True)
class NormInfo:
    """Title of a norm, and options of its variants.

    Attributes:
        title: Name of the norm in figures and tables.
        options: ``"groups"`` and ``"channel_groups"``, if the norm has them, in the order in which it applies them.
        slices: The values that share a mean and a variance.

    Examples:
        >>> NORMS["seq"].title, NORMS["seq"].options, NORMS["seq"].symbols
        ('SeqNorm', ('channel_groups', 'groups'), {'channel_groups': 'G_C', 'groups': 'G_M'})
        >>> NORMS["ghost"].symbols
        {'groups': 'G'}
    """

    title: str
    options: tuple[str, ...] = ()
    slices: str = "-"

    @property
    def symbols(self) -> dict[str, str]:
        """Return the paper's symbol of each option."""
        groups = "G_M" if "channel_groups" in self.options else "G"
        return {option: "G_C" if option == "channel_groups" else groups for option in self.options}


NORMS = {
    "none": NormInfo("No normalization", slices="-"),
    "batch": NormInfo("BatchNorm", slices="each channel over the batch"),
    "ghost": NormInfo("GhostNorm", ("groups",), slices="each channel over each of G groups of the batch"),
    "seq": NormInfo("SeqNorm", ("channel_groups", "groups"), slices="GroupNorm, then GhostNorm"),
    "group": NormInfo("GroupNorm", ("channel_groups",), slices="G_C groups of channels of each sample"),
    "layer": NormInfo("LayerNorm", slices="all channels of each sample"),
    "instance": NormInfo("InstanceNorm", slices="each channel of each sample"),
    "seq-reversed": NormInfo("SeqNorm reversed", ("groups", "channel_groups"), slices="GhostNorm, then GroupNorm"),
    "ghost-ws": NormInfo("GhostNorm + WS", ("groups",), slices="as ghost, with standardized weights before it"),
    "seq-ws": NormInfo(
        "SeqNorm + WS", ("channel_groups", "groups"), slices="as seq, with standardized weights before it"
    ),
    "ghost-mean": NormInfo("GhostNorm, batch variance", ("groups",), slices="means as ghost, variances as batch"),
    "batch-group": NormInfo(
        "Batch/GroupNorm", ("channel_groups", "groups"), slices="groups of channels over groups of the batch"
    ),
}
"""Norms by the name that ``make_norm`` takes, in the order of figures."""

TITLES = {
    "simplenet": "SimpleNet",
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "wrn-28-10": "WideResNet-28-10",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar10-half": "CIFAR-10 (16 x 16 pixels)",
    "cifar100": "CIFAR-100",
}
"""Titles of models and data sets in figures and tables."""


def check_norm(name: str) -> None:
    """Raise a LandscapeError unless the norm exists."""
    check_choice("norm", name, NORMS)


def options_of(norm: str) -> tuple[str, ...]:
    """Return the options that make variants of a norm.

    Raises:
        LandscapeError: The norm does not exist.
    """
    check_norm(norm)
    return NORMS[norm].options


@dataclass(frozen=True)
class MeasureInfo:
    """Texts and requirements of a measure of smoothness.

    Attributes:
        title: Name of the measure at an axis.
        along: Column of lists that it is computed from, one value per step size.
        band: Description of its band; empty if it has none.
        line: Description of its line; empty if it has none.
        needs: Columns that it requires and a trace may lack, or `NEGATIVE`.
        at_zero: True if it is defined at step size 0.
        has_origin: True if its 0 is meaningful. That of a loss is not, because a constant can be added to a loss.
        smoother: ``"lower"`` or ``"higher"``: values of a smoother landscape.
        edge: Value of a reference line, or None.
    """

    title: str
    along: str
    band: str = ""
    line: str = ""
    needs: tuple[str, ...] = ()
    at_zero: bool = True
    has_origin: bool = True
    smoother: str = "lower"
    edge: float | None = None


NEGATIVE = "negative step sizes"
"""What a measure needs that reads the loss uphill; it is no column."""

MEASURES = {
    "loss": MeasureInfo(
        "loss", "losses", "smallest to largest loss", "the loss before the step, at step size 0", has_origin=False
    ),
    "predictiveness": MeasureInfo(
        "gradient predictiveness",
        "gradient_distances",
        band="smallest to largest l2 distance between the gradients before and after the step",
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
        band="smallest to largest mean curvature of the loss along the step",
        needs=("slope", "direction_norm"),
        at_zero=False,
    ),
    "range": MeasureInfo("range of the loss", "losses", line="largest minus smallest loss along the step"),
    "relative_range": MeasureInfo(
        "range over linear prediction",
        "losses",
        line="range of the loss, divided by the range that the slope predicts",
        needs=("slope",),
    ),
    "lost_share": MeasureInfo(
        "lost share of the decrease",
        "losses",
        line="share of the decrease promised by the slope that is lost at the learning rate; at 1 the loss stays",
        needs=("slope", "lr"),
        edge=1.0,
    ),
    "sharpness": MeasureInfo(
        "sharpness at the learning rate",
        "losses",
        line="curvature of the loss from the parameters to the step of the learning rate",
        needs=("slope", "direction_norm", "lr"),
    ),
    "batch_sharpness": MeasureInfo(
        "batch sharpness",
        "losses",
        line="curvature of the batch's loss along the direction, in the limit of small steps",
        needs=("slope", "direction_norm"),
    ),
    "optimal_step": MeasureInfo(
        "optimal step size",
        "losses",
        line="step size of the smallest loss, at most the largest one that was probed",
        needs=("slope",),
        smoother="higher",
    ),
    "critical_step": MeasureInfo(
        "critical step size",
        "losses",
        line="smallest step size at which the loss is back, at most the largest one that was probed",
        needs=("slope",),
        smoother="higher",
    ),
    "critical_sharpness": MeasureInfo(
        "critical sharpness",
        "losses",
        line="2 over the critical step size",
        needs=("slope",),
    ),
    "lipschitz": MeasureInfo(
        "Lipschitz constant along the ray",
        "losses",
        line="largest ratio of the change of the loss to the distance between neighbouring points",
        needs=("direction_norm",),
    ),
    "misfit": MeasureInfo(
        "misfit to a parabola",
        "losses",
        line="root mean square distance to the best parabola with the same loss and slope, relative to the range",
        needs=("slope",),
    ),
    "sam_sharpness": MeasureInfo(
        "one-step SAM sharpness",
        "losses",
        line="rise of the loss at the largest probed step against the direction",
        needs=(NEGATIVE,),
    ),
    "cosine": MeasureInfo(
        "cosine of the gradients",
        "gradient_cosines",
        band="smallest to largest cosine between the gradients before and after the step",
        needs=("gradient_cosines",),
        smoother="higher",
    ),
}
"""Measures of smoothness by name, in the order of help texts."""


def check_measure(name: str) -> None:
    """Raise a LandscapeError unless the measure exists."""
    check_choice("measure", name, MEASURES)


def check_choice(kind: str, name: str, known: Collection[str]) -> None:
    """Raise a LandscapeError unless the name is a known one."""
    if not isinstance(name, str) or name not in known:
        *others, last = known
        raise LandscapeError(f"{kind}={name!r}: unknown {kind}. Use {', '.join(others)} or {last}.")
