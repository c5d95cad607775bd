"""What made a run, in values that JSON can hold."""

import math
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from landscape import __version__
from landscape.errors import LandscapeError

PACKAGES = ("torch", "numpy")


def environment() -> dict[str, Any]:
    """Versions, platform and commit (of the repository around the current directory), as far as they can be known."""
    versions = {name: _version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "landscape": __version__}
    commit = _git("rev-parse", "HEAD")
    # Only tracked files count: the traces themselves are often untracked files of the same repository.
    changes = _git("status", "--porcelain", "--untracked-files=no")
    git = None if commit is None else {"commit": commit, "dirty": bool(changes)}
    return {"platform": f"{platform.system()} {platform.machine()}", "versions": versions, "git": git}


def _version(package: str) -> str | None:
    """Read from the installed files, because importing torch to ask it would cost seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def plain(value: Any, name: str = "") -> Any:
    """The value as JSON can hold it: paths and non-finite numbers as text, arrays and tuples as lists.

    Raises:
        LandscapeError: The value, or one inside it, has no such form; the message names it.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Path():
            return str(value)
        case np.generic() | np.ndarray():
            return plain(value.tolist(), name)
        case Mapping():
            return {str(key): plain(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() | range():
            return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise LandscapeError(
        f"The run fact {name} is a {type(value).__name__}, which run.json cannot hold; "
        "give numbers, text, paths, or lists and dicts of these."
    )
