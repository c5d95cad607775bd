"""The norms by the names they are asked for, what they are called in print, and the options that tell them apart."""

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
}
"""Every norm that ``make_norm`` knows, in the order in which figures show them."""


def check_norm(name: str) -> None:
    """Raise a UserError unless there is a norm of that name."""
    if name not in NORMS:
        raise UserError(f"Unknown norm {name!r}; choose one of {', '.join(NORMS)}.")


def options_of(norm: str) -> tuple[str, ...]:
    """The options that make variants of a norm; a UserError if there is no such norm."""
    check_norm(norm)
    return tuple(NORMS[norm].symbols)
