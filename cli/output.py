"""Lines on the two streams: tables, reports and warnings."""

import os
import sys
from contextlib import suppress

import click

QUIET, VERBOSE, TRACEBACK = "landscape.quiet", "landscape.verbose", "landscape.traceback"
"""Options of every command, as keys of ``click.Context.meta``."""
_UNWRITTEN = "landscape.unwritten"


def is_set(option: str) -> bool:
    """Return True if an option of every command was given."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(option))


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line.

    A reader that has closed its pipe, such as ``head``, or a full disk does not end a training: later lines are
    dropped. Other failures than a closed pipe are raised by `raise_unwritten` at the end of the command.
    """
    try:
        click.echo(text, err=err)
    except OSError as error:
        _discard(sys.stderr if err else sys.stdout)
        context = click.get_current_context(silent=True)
        if context and not isinstance(error, BrokenPipeError):
            context.meta[_UNWRITTEN] = error


def report(text: str, *, err: bool = False) -> None:
    """Print a line, unless ``--quiet`` was given."""
    if not is_set(QUIET):
        echo(text, err=err)


def raise_unwritten(context: click.Context) -> None:
    """Raise the OSError that lost a line."""
    if error := context.meta.get(_UNWRITTEN):
        raise OSError(error.errno, error.strerror, "Output")


def _discard(stream: object) -> None:
    """Drop what is written to a stream from now on."""
    with suppress(AttributeError, OSError, ValueError):  # streams of tests have no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # pyright: ignore[reportAttributeAccessIssue]
        os.close(null)
