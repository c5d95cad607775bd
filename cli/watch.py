"""``landscape watch``: running and finished runs as text."""

import shutil
import sys
import time
import warnings
from pathlib import Path

import click

from landscape.errors import LandscapeError

from .output import echo
from .params import Command, LocationType, options_under

SECONDS = 2.0
"""Time between two refreshes."""


@click.command("watch", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=LocationType())
@options_under("Output")("--once", is_flag=True, help="Print it once.")
@options_under("Output")("--text", is_flag=True, expose_value=False, help="As text, which is the only form.")
def command(paths: tuple[str | Path, ...], once: bool) -> None:
    """Draw runs as text while they are recorded.

    PATHS are folders of runs, folders that hold runs at any depth, or URLs such as s3://bucket/traces. A line is a run:
    its last step, loss, range of the losses, lost share of the decrease, and the range over the run, on a logarithmic
    scale. Rows appear when they are written, every 30 seconds or 1,000 rows. It ends when all runs are complete, or by
    Ctrl-C.
    """
    lines = 0
    try:
        while True:
            complete, text = _text(paths)
            if lines and sys.stdout.isatty():
                echo(f"\033[{lines}F\033[J" + text)
            else:
                echo(text)
            lines = text.count("\n") + 1
            if once or complete:
                return
            time.sleep(SECONDS)
    except KeyboardInterrupt:
        return


def _text(paths: tuple[str | Path, ...]) -> tuple[bool, str]:
    """Return True if all runs are complete, and their lines."""
    from landscape.plotting.text import text_lines
    from landscape.traces.reader import list_runs, read_traces

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A run that is being written may lack its last rows.
        runs = list_runs(paths)
        try:
            lines = text_lines(read_traces(paths), shutil.get_terminal_size().columns)
        except LandscapeError:  # No run has written a row yet.
            lines = [f"{len(runs)} runs, no rows yet"]
    return all(ended is not None and ended == ended for ended in runs["ended"].tolist()), "\n".join(lines)
