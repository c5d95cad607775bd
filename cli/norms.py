"""``landscape norms``: the norms by name."""

import click

from landscape.names import NORMS

from .output import aligned, echo
from .params import Command

SLICES = {
    "none": "-",
    "batch": "each channel over the batch",
    "ghost": "each channel over each of G groups of the batch",
    "seq": "GroupNorm, then GhostNorm",
    "group": "G_C groups of channels of each sample",
    "layer": "all channels of each sample",
    "instance": "each channel of each sample",
    "seq-reversed": "GhostNorm, then GroupNorm",
    "ghost-ws": "as ghost, with standardized weights before it",
    "seq-ws": "as seq, with standardized weights before it",
    "ghost-mean": "means as ghost, variances as batch",
    "batch-group": "groups of channels over groups of the batch",
}
"""Values that share a mean and a variance, by norm."""


@click.command("norms", cls=Command)
def command() -> None:
    """List the norms of --norm, with options and slices."""
    lines = []
    for name, norm in NORMS.items():
        options = " ".join(f"--{option.replace('_', '-')}" for option in norm.options) or "-"
        lines.append([name, norm.title, options, SLICES.get(name, "-")])
    echo(aligned(["norm", "title", "options", "values normalized together"], lines))
