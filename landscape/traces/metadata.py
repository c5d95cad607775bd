"""Metadata of a run: what made it, as values that JSON can hold."""

import json
import math
import platform
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from landscape import __version__
from landscape.errors import LandscapeError
from landscape.traces.schema import VERSION

PACKAGES = ("torch", "numpy")


def new_metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a run that starts now.

    Raises:
        LandscapeError: JSON cannot hold a fact; the message names it.
    """
    own = {"version": VERSION, "id": uuid.uuid4().hex, "started": now(), "environment": environment()}
    return own | plain(facts)


def resumed_metadata(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a run that is resumed now.

    Identity and start are those of the earlier process; of other facts that both have, the new ones are kept.
    """
    earlier = dict(earlier)
    resumed = [*earlier.pop("resumed", []), new["started"]]
    # Without metadata the identity of the run is unknown, and a new one would contradict its parts.
    kept = {name: earlier.get(name) for name in ("id", "started")} if earlier else {"id": None}
    merged = earlier | new | kept | {"resumed": resumed}
    return {name: fact for name, fact in merged.items() if name not in ("ended", "rows")}


def to_json(facts: Mapping[str, Any]) -> bytes:
    """Return facts as the content of ``run.json``."""
    return json.dumps(facts, indent=2, allow_nan=False).encode()


def now() -> str:
    """Return the time in UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Return platform, versions and git commit, None where unknown.

    The commit is that of the repository around the current directory.
    """
    versions = {name: _version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "landscape": __version__}
    commit = _git("rev-parse", "HEAD")
    # Only tracked files count: the traces themselves are often untracked files of the same repository.
    changes = _git("status", "--porcelain", "--untracked-files=no")
    git = None if commit is None else {"commit": commit, "dirty": bool(changes)}
    return {"platform": f"{platform.system()} {platform.machine()}", "versions": versions, "git": git}


def _version(package: str) -> str | None:
    # Read from the package's installed files, because importing torch takes seconds.
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
    """Return a value as JSON can hold it.

    Paths and non-finite numbers become text; arrays, tuples and sets become lists.

    Args:
        value: Number, text, path, array, or nested collection of these.
        name: Name of the value, for the message.

    Raises:
        LandscapeError: The value, or one inside it, has no such form; the message names it.

    Examples:
        >>> plain({"layers": (512, 300), "lr": float("inf"), "data": Path("digits.npz")})
        {'layers': [512, 300], 'lr': 'inf', 'data': 'digits.npz'}
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
        f"{name}: must be a value for run.json, got {type(value).__name__}. Use numbers, text, paths, or lists and "
        "dicts of these."
    )
