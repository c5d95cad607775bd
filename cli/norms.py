"""``landscape norms``: the norms by name."""

import click

from landscape.names import NORMS

from .output import aligned, echo
from .params import Command


@click.command("norms", cls=Command)
def command() -> None:
    """List the norms of --norm, with options and slices."""
    lines = []
    for name, norm in NORMS.items():
        options = " ".join(f"--{option.replace('_', '-')}" for option in norm.options) or "-"
        lines.append([name, norm.title, options, norm.slices])
    echo(aligned(["norm", "title", "options", "values normalized together"], lines))
