"""Lines on the two streams: tables, reports and warnings."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from landscape.text import markdown_table

QUIET, VERBOSE, TRACEBACK = "landscape.quiet", "landscape.verbose", "landscape.traceback"
"""Options of every command, as keys of ``click.Context.meta``."""
LIVE = "landscape.live"
"""The same for an option of ``landscape probe``."""
_UNWRITTEN = "landscape.unwritten"


def is_set(option: str) -> bool:
    """Return True if a remembered flag was given."""
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


FORMATS = ("table", "csv", "md", "json")
"""Formats of a table of records."""


def formatted(records: Sequence[dict[str, Any]], style: str) -> str:
    """Return records as a table in one of `FORMATS`.

    Numbers have 4 digits in ``table`` and ``md``, and all digits in ``csv`` and ``json``.

    Examples:
        >>> print(formatted([{"run": "a", "range": 0.123456}], "md"))
        | run | range |
        | --- | --- |
        | a | 0.1235 |
    """
    records = [{name: finite_or_none(value) for name, value in record.items()} for record in records]
    if style == "json":
        return json.dumps(records, indent=1)
    if style == "csv":
        return csv_text(records)
    headings = list(records[0]) if records else []
    lines = [[_cell(value) for value in record.values()] for record in records]
    return markdown_table(headings, lines) if style == "md" else aligned(headings, lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def finite_or_none(value: Any) -> Any:
    """Return None for NaN, infinity and missing values."""
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if type(value).__name__ == "NAType":
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV, with a line of headings."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().rstrip("\n")


def aligned(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [headings, *lines]
    )
