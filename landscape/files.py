"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_name(path: Path) -> Path:
    """Where the contents of ``path`` are gathered: beside it, so that the move stays on one file system."""
    return path.with_name(f".{path.name}.tmp")


def finished_name(name: str) -> str:
    """The name that a temporary file would have got."""
    return name.removeprefix(".").removesuffix(".tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends.

    A reader sees the old file or the new one, never a part of it. A block that fails leaves ``path`` as it was; a
    process that is killed leaves at most a hidden temporary file, which the next write to ``path`` replaces.
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
