"""Atomic writes of files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_name(path: Path) -> Path:
    """Return the path of the temporary file for ``path``."""
    # In the same folder, because a rename is atomic only within a file system.
    return path.with_name(f".{path.name}.tmp")


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
