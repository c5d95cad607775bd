"""Atomic writes of files, and paths as users write them."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

_NAME_BYTES = 255
"""Maximum length of a file name in bytes on common file systems."""


_SCHEMES = {"abfs", "abfss", "file", "gcs", "gs", "hdfs", "http", "https", "s3", "viewfs"}


def is_url(location: str | Path) -> bool:
    """Return True for a URL, False for a path.

    pathlib makes ``s3:/bucket`` of ``s3://bucket``, which is a URL, too.

    Examples:
        >>> is_url("s3://bucket/traces"), is_url(Path("s3://bucket/traces")), is_url("traces")
        (True, True, False)
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)", as_text(location))
    return found is not None and (bool(found[2]) or found[1].lower() in _SCHEMES)


def as_text(location: str | Path) -> str:
    """Return a path or URL with slashes."""
    return location.as_posix() if isinstance(location, PurePath) else os.fspath(location)


def expand_user(path: str | Path) -> Path:
    """Return the path with ``~`` and ``~user`` replaced.

    The name of an unknown user is kept, as in a shell.

    Raises:
        FileNotFoundError: The home folder is not known.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.parts[:1] == ("~",):
        raise FileNotFoundError(
            errno.ENOENT, "the home folder is not known. Set HOME, or use an absolute path", str(path)
        )
    return expanded


def temporary_name(path: Path) -> Path:
    """Return the path of the temporary file for ``path``."""
    # In the same folder, because a rename is atomic only within a file system. Longer names are cut, at a whole letter.
    name = os.fsencode(path.name)[: _NAME_BYTES - len("..tmp")].decode(errors="ignore")
    return path.with_name(f".{name}.tmp")


def finished_name(name: str) -> str:
    """Return the name whose temporary file is ``name``."""
    return name.removeprefix(".").removesuffix(".tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` atomically.

    The file is moved to ``path`` at the end of the block, so that a reader sees the old or the new file, never a part.
    If the block raises, ``path`` is unchanged. A process that is killed leaves at most a hidden temporary file, which
    the next write to ``path`` replaces.

    Examples:
        >>> with whole_file(Path("table.md")) as file:
        ...     _ = file.write(b"| norm |")
        >>> Path("table.md").read_text()
        '| norm |'
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
