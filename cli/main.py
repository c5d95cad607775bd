"""The ``landscape`` command: parses, calls one function of the library, prints."""

import importlib
import io
import sys
import warnings
from typing import Any

import click

from landscape import __version__
from landscape.errors import LandscapeError
from landscape.text import one_line

COMMANDS = {
    "figure": "landscape_cli.figure",
    "list": "landscape_cli.list",
    "plot": "landscape_cli.plot",
    "probe": "landscape_cli.probe",
    "table": "landscape_cli.table",
    "tune": "landscape_cli.tune",
}


class UsageMistake(click.ClickException):
    """A mistake of the user's: one line, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """Commands that are imported when they are asked for, and mistakes that are told in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they are used."""
        return ["probe", "list", "plot", "figure", "tune", "table"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command in the module of its name, or None."""
        return importlib.import_module(COMMANDS[cmd_name]).command if cmd_name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run; warnings are lines on stderr, and a mistake of the user's is one, with exit code 2."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _say
                return super().invoke(ctx)
        except click.UsageError as error:
            raise click.UsageError(one_line(error.format_message()), error.ctx) from error
        except LandscapeError as error:
            raise UsageMistake(one_line(str(error))) from error
        except OSError as error:
            raise UsageMistake(one_line(f"{error.filename or 'The system'}: {error.strerror or error}")) from error


def _say(message: Warning | str, *details: Any, **options: Any) -> None:
    """A warning without the line of code that it comes from."""
    click.echo(f"Warning: {one_line(str(message))}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="landscape-probe")
def main() -> None:
    """Measure how smooth the loss landscape of a PyTorch training run is.

    \b
    landscape probe           train on handwritten digits with three norms, probing every update
    landscape list traces/    say what is recorded there
    landscape plot traces/    draw it
    """  # noqa: D301 (click looks for the character \\b)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the names of files may hold what its encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
