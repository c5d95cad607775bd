"""Functions of a user, by names such as ``my_model:build``, and their exceptions in one line."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from landscape.errors import LandscapeError
from landscape.text import one_line, short

_NOT_OURS = ("site-packages", "dist-packages", f"{os.sep}landscape{os.sep}", "<frozen", f"{os.sep}importlib{os.sep}")


def is_callable_name(name: str) -> bool:
    """Return True for ``package.module:attribute``, not a file.

    Examples:
        >>> is_callable_name("my_model:build"), is_callable_name("digits"), is_callable_name("c:/my.npz")
        (True, False, False)
    """
    return ":" in name and not name.endswith(".npz")


def import_callable(name: str, option: str) -> Callable[..., Any]:
    """Import a function by name, also from the current folder.

    Args:
        name: Name such as ``"package.module:attribute"``.
        option: Name of the option, for messages.

    Raises:
        LandscapeError: The name is none, or the module or the function does not exist or fails on import.

    Examples:
        >>> import_callable("math:sqrt", "model")(4)
        2.0
        >>> import_callable("math:sqroot", "model")
        Traceback (most recent call last):
        landscape.errors.LandscapeError: model='math:sqroot': the module math has no 'sqroot'. Did you mean sqrt?
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise LandscapeError(f"{option}={name!r:.100}: must be package.module:function, such as my_model:build.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = call_own(f"{option}={name!r}", _import, module_name, f"{option}={name!r}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LandscapeError(f"{option}={name!r}: the module {module_name} has no {part!r}.{_similar(part, found)}")
        found = getattr(found, part)
    if not callable(found) or (hasattr(found, "named_parameters") and not isinstance(found, type)):
        raise LandscapeError(
            f"{option}={name!r}: must be a function or a class, got {type(found).__name__}. Write a function that "
            "returns it, as each run needs a new one."
        )
    return found


def _import(module_name: str, given: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module exists, and one that it imports does not.
        raise LandscapeError(
            f"{given}: there is no module {error.name}. Run the command in the folder that has it, or install it."
        ) from error


def _similar(name: str, module: Any) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [each for each in vars(module) if not each.startswith("_")], 1)
    return f" Did you mean {near[0]}?" if near else ""


def call_own(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function; state its exception in one line.

    Args:
        what: Beginning of the message, such as ``"model='my_model:build'"``.
        function: The function.
        *arguments: Its arguments.

    Raises:
        LandscapeError: The function raised an exception; its type, message and line are stated.

    Examples:
        >>> call_own("model='my_model:build'", lambda: 1 / 0)
        Traceback (most recent call last):
        landscape.errors.LandscapeError: model='my_model:build': raised ZeroDivisionError: division by zero (..., line
        1). Correct it, or repeat with --traceback to see the calls.
    """
    try:
        return function(*arguments)
    except LandscapeError:
        raise
    except (Exception, SystemExit) as error:
        text = error.msg if isinstance(error, SyntaxError) else str(error)  # Its text has the place, too.
        message = short(one_line(text), 300).rstrip(".")
        raise LandscapeError(
            f"{what}: raised {type(error).__name__}{f': {message}' if message else ''}{_place(error)}. Correct it, or "
            "repeat with --traceback to see the calls."
        ) from error


def _place(error: BaseException) -> str:
    """Return file and line of the user's innermost frame."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not any(x in frame.filename for x in _NOT_OURS)
    ]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
