"""The ``landscape`` command: parses, calls one function of the library, prints."""

import importlib
import io
import sys
import traceback
import warnings
from typing import Any

import click

from landscape import __version__
from landscape.text import one_line, without_secrets

from .errors import usage_error
from .output import TRACEBACK, echo, raise_unwritten
from .params import RENAMED

_NAMES = (
    "init",
    "probe",
    "list",
    "watch",
    "summarize",
    "plot",
    "compare",
    "figure",
    "tune",
    "table",
    "claims",
    "recipes",
    "norms",
)
COMMANDS = {name: f"landscape_cli.{name}" for name in _NAMES}
"""Modules of the commands, in the order of the help."""


class Commands(click.Group):
    """Commands that are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or return None."""
        return importlib.import_module(COMMANDS[cmd_name]).command if cmd_name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; write warnings and errors in one line."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _show_warning
                result = super().invoke(ctx)
            raise_unwritten(ctx)
            return result
        except Exception as error:
            line = usage_error(error)
            if line is None:
                raise
            if ctx.meta.get(TRACEBACK):
                echo("\n".join(map(without_secrets, traceback.format_exc().splitlines())), err=True)
            raise line from error


def _show_warning(message: Warning | str, *details: Any, **options: Any) -> None:
    """Write a warning without its line of code."""
    echo(f"Warning: {one_line(str(message))}", err=True)


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Write the versions that a report of a fault needs."""
    if not value or ctx.resilient_parsing:
        return
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    python = ".".join(map(str, sys.version_info[:3]))
    echo(f"landscape {__version__}, Python {python}, torch {torch.__version__}, device {device}")
    ctx.exit()


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: RENAMED.get(name, name),
    },
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the versions of landscape, Python and torch, and the device, and exit.",
)
def main() -> None:
    """Measure the smoothness of a PyTorch training run's loss landscape.

    \b
    landscape probe           train on digits with 3 norms, probe every update
    landscape init            write a file for a model of your own
    landscape list traces/    list the recorded runs
    landscape plot traces/    draw their loss landscapes
    landscape compare traces/ is one norm smoother than another?
    """  # noqa: D301 (click reads the character \\b)
    if isinstance(sys.stdout, io.TextIOWrapper):  # File names may hold characters that its encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
