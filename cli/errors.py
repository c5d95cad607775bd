"""One line for each exception that is no bug of this package."""

from collections.abc import Iterator
from types import TracebackType

import click

from landscape.errors import LandscapeError
from landscape.text import one_line, short, without_secrets

_LIBRARIES = {
    "matplotlib": "matplotlib",
    "PIL": "Pillow",
    "pyarrow": "pyarrow",
    "optuna": "Optuna",
    "sqlalchemy": "SQLAlchemy",
    "psycopg": "psycopg",
}
"""Libraries whose refusals are shown in one line, by the names of their packages."""
_CLASSES = {**_LIBRARIES, "torch": "torch"}
"""The same, if they raise a class of their own, such as ``torch.OutOfMemoryError``."""
_OWN = ("landscape", "landscape_cli")


def usage_error(error: Exception) -> click.UsageError | None:
    """Return the last line of a command for an exception.

    Returns:
        The line with exit code 2, or None for a bug.
    """
    if isinstance(error, click.UsageError):
        return click.UsageError(one_line(error.format_message()), error.ctx)
    if isinstance(error, LandscapeError):
        return click.UsageError(one_line(str(error)))
    if isinstance(error, OSError):
        reason = without_secrets(str(error.strerror or error)).rstrip(".")
        return click.UsageError(one_line(f"{error.filename or 'System'}: {reason}."))
    if isinstance(error, MemoryError):
        return click.UsageError("System: not enough memory. Use smaller batches, or read fewer runs at a time.")
    if library := _library(error):
        reason = short(one_line(without_secrets(str(error))), 300).rstrip(".") or type(error).__name__
        return click.UsageError(f"{library}: {reason}. Repeat with --traceback to see where it was raised.")
    return None


def _library(error: Exception) -> str | None:
    """Return the library that raised an exception, or None.

    Its class may be a builtin one: matplotlib raises RuntimeError and ValueError. Then the innermost frame of a library
    or of this package decides.
    """
    for base in type(error).__mro__:
        if name := _CLASSES.get(base.__module__.partition(".")[0]):
            return name
    roots = [root for root in _roots(error.__traceback__) if root in _LIBRARIES or root in _OWN]
    return _LIBRARIES.get(roots[-1]) if roots else None


def _roots(traceback: TracebackType | None) -> Iterator[str]:
    """Yield the package of each frame, the innermost last."""
    while traceback is not None:
        yield str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        traceback = traceback.tb_next
