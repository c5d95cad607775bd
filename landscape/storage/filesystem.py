"""Where runs are kept: in a folder, on an object store, or in memory, through one small interface."""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from landscape.errors import LandscapeError
from landscape.files import whole_file

Location = str | Path
"""A path, or a URL such as ``s3://bucket/traces``."""

CONNECT_SECONDS, REQUEST_SECONDS = 5, 30
"""How long an object store may take: training waits meanwhile."""


class Store(ABC):
    """Files by name in one place, each of which is there as a whole or not at all.

    Every method raises an OSError where the place cannot be reached, is full, or does not allow it.
    """

    @abstractmethod
    def inside(self, name: str) -> Self:
        """The place of that name within this one."""

    @abstractmethod
    def create(self) -> None:
        """Make the place, if it is not there."""

    @abstractmethod
    def kind(self) -> str | None:
        """``"folder"``, ``"file"``, or None where there is nothing."""

    @abstractmethod
    def tree(self, refused: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Names of the files, by the folder that they are in, relative to this one; both sorted.

        Folders that cannot be looked into are left out, and ``refused`` is told why.
        """

    @abstractmethod
    def open(self, name: str) -> pa.NativeFile:
        """A file for reading, anywhere in it; a FileNotFoundError if there is none."""

    def read(self, name: str) -> bytes:
        """The contents of a file; a FileNotFoundError if there is none."""
        with self.open(name) as file:
            return file.read()

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Put a file in the place of any other of that name; what fails leaves nothing behind."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the files directly in this place, sorted; nothing if there is no such place."""

    @abstractmethod
    def __str__(self) -> str:
        """What the user would call it."""


class Folder(Store):
    """A folder of a file system."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def inside(self, name: str) -> "Folder":
        """The subfolder."""
        return Folder(self.path / name)

    def create(self) -> None:
        """Make the folder and those above it."""
        self.path.mkdir(parents=True, exist_ok=True)

    def kind(self) -> str | None:
        """What is at the path."""
        return "folder" if self.path.is_dir() else "file" if self.path.exists() else None

    def tree(self, refused: Callable[[OSError], object]) -> dict[str, list[str]]:
        """All files; links to folders are followed, each folder once, as they may lead round in a circle."""
        folders, seen = {}, {os.path.realpath(self.path)}
        for root, inner, names in os.walk(self.path, onerror=refused, followlinks=True):
            folders[Path(root).relative_to(self.path).as_posix()] = sorted(names)
            targets = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(inner)}
            inner[:] = [name for name, target in targets.items() if target not in seen]
            seen.update(targets.values())
        return dict(sorted(("" if name == "." else name, names) for name, names in folders.items()))

    def open(self, name: str) -> pa.NativeFile:
        """A file of the folder; a pipe or a device, which may keep a reader waiting for ever, is refused."""
        path = self.path / name
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return pa.OSFile(str(path))

    def write(self, name: str, content: bytes) -> None:
        """Write beside the place and move into it."""
        with whole_file(self.path / name) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What is in the folder and no folder itself."""
        if not self.path.is_dir():
            return []
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    def __str__(self) -> str:
        """The path."""
        return str(self.path)


class ObjectStore(Store):
    """A prefix on an object store, whose writes are whole by themselves."""

    def __init__(self, url: str, system: fs.FileSystem, path: str) -> None:
        self._url, self._system, self._path = url.rstrip("/"), system, path.rstrip("/")

    def inside(self, name: str) -> "ObjectStore":
        """The longer prefix."""
        return ObjectStore(f"{self._url}/{name}", self._system, f"{self._path}/{name}")

    def create(self) -> None:
        """Nothing: a prefix is there as soon as something is under it."""

    def kind(self) -> str | None:
        """What is at the URL."""
        kinds = {fs.FileType.Directory: "folder", fs.FileType.File: "file"}
        return kinds.get(self._system.get_file_info(self._path).type)

    def tree(self, refused: Callable[[OSError], object]) -> dict[str, list[str]]:
        """All objects under the prefix."""
        folders: dict[str, list[str]] = {}
        for info in self._infos(recursive=True):
            inner = PurePosixPath(info.path).relative_to(self._path)
            folders.setdefault("" if len(inner.parts) == 1 else inner.parent.as_posix(), []).append(inner.name)
        return {folder: sorted(names) for folder, names in sorted(folders.items())}

    def open(self, name: str) -> pa.NativeFile:
        """An object, of which only what is read is fetched."""
        return self._system.open_input_file(f"{self._path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Upload an object, which appears when its upload is complete."""
        with self._system.open_output_stream(f"{self._path}/{name}") as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove an object."""
        if name in self.names():
            self._system.delete_file(f"{self._path}/{name}")

    def names(self) -> list[str]:
        """The objects directly under the prefix."""
        return sorted(info.base_name for info in self._infos(recursive=False))

    def _infos(self, recursive: bool) -> list[fs.FileInfo]:
        found = self._system.get_file_info(fs.FileSelector(self._path, recursive=recursive, allow_not_found=True))
        return [info for info in found if info.type == fs.FileType.File]

    def __str__(self) -> str:
        """The URL."""
        return self._url


class Memory(Store):
    """Files in a dict of this process."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._files = {} if files is None else files

    def inside(self, name: str) -> "Memory":
        """Files whose names begin with this one; they are other files."""
        return Memory()

    def create(self) -> None:
        """Nothing: it is there."""

    def kind(self) -> str | None:
        """It is like a folder."""
        return "folder"

    def tree(self, refused: Callable[[OSError], object]) -> dict[str, list[str]]:
        """All files."""
        return {"": self.names()}

    def open(self, name: str) -> pa.NativeFile:
        """A file, in memory."""
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return pa.BufferReader(self._files[name])

    def write(self, name: str, content: bytes) -> None:
        """Keep the contents."""
        self._files[name] = content

    def remove(self, name: str) -> None:
        """Forget the contents."""
        self._files.pop(name, None)

    def names(self) -> list[str]:
        """The names of all files."""
        return sorted(self._files)

    def __str__(self) -> str:
        """What it is."""
        return "memory"


def store_at(place: Location) -> Store:
    """The store at a path or URL; nothing is made or asked for yet.

    ``s3://`` takes credentials, region and endpoint from where AWS's own tools do (``AWS_ENDPOINT_URL``,
    ``AWS_DEFAULT_REGION``, ``~/.aws/credentials``, ...). Other URLs are those of ``pyarrow.fs``.

    Raises:
        LandscapeError: A URL that pyarrow cannot use here.
    """
    if not is_url(place):
        return Folder(place)
    url = str(place)
    if url.startswith("file://"):
        return Folder(unquote(urlsplit(url).path))
    try:
        system, path = _s3(url) if url.startswith("s3://") else fs.FileSystem.from_uri(url)
    except (ImportError, ValueError, OSError, NotImplementedError) as error:
        raise LandscapeError(
            f"{url} cannot be used ({reason(error)}); give a folder or a URL that pyarrow.fs knows, such as "
            "s3://bucket/traces, with a pyarrow that was built for it (as those of the package index are)."
        ) from error
    if not path.strip("/"):
        raise LandscapeError(f"{url} names no bucket; give one, and a folder in it: s3://bucket/traces.")
    return ObjectStore(url, system, path)


def _s3(url: str) -> tuple[fs.FileSystem, str]:
    path = url.removeprefix("s3://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None and path.strip("/"):
        region = fs.resolve_s3_region(path.split("/")[0])
    # Few attempts: what could not be written is tried again with the rows to come.
    options: dict[str, Any] = {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=2)}
    options |= {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS}
    return fs.S3FileSystem(endpoint_override=endpoint, region=region, **options), path


def is_url(place: Location) -> bool:
    """Whether it is a URL and no path."""
    return isinstance(place, str) and "://" in place


def inside(place: Location, name: str) -> Location:
    """The path or URL of ``name`` within a place; a LandscapeError for a URL that names no bucket."""
    if is_url(place) and not str(place).partition("://")[2].strip("/"):
        raise LandscapeError(f"{place} names no bucket; give one, and a folder in it: s3://bucket/traces.")
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else Path(place) / name


def reason(error: BaseException) -> str:
    """What went wrong, in the words of the system."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
