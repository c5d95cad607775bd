"""Files in a folder, on an object store or in memory, through one interface."""

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
"""Timeouts of an object store in seconds; training is blocked meanwhile."""


class Store(ABC):
    """Files by name at one location, each written atomically.

    Every method raises an OSError if the location is unreachable, full, or not permitted.
    """

    @abstractmethod
    def inside(self, name: str) -> Self:
        """Return the store of a subfolder."""

    @abstractmethod
    def create(self) -> None:
        """Create the location if it does not exist."""

    @abstractmethod
    def kind(self) -> str | None:
        """Return ``"folder"``, ``"file"``, or None if nothing exists."""

    @abstractmethod
    def tree(self, on_error: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Return sorted file names by subfolder, at any depth.

        Args:
            on_error: Called with the error of each folder that cannot be listed; it is left out.

        Returns:
            Names by the relative path of their folder, ``""`` for this one.
        """

    @abstractmethod
    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random reads.

        Raises:
            FileNotFoundError: There is no such file.
        """

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        with self.open(name) as file:
            return file.read()

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file atomically."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the sorted names of files, without subfolders.

        The list is empty if the location does not exist.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL."""


class Folder(Store):
    """A folder of a file system."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def inside(self, name: str) -> "Folder":
        """Return the subfolder."""
        return Folder(self.path / name)

    def create(self) -> None:
        """Create the folder and its parents."""
        self.path.mkdir(parents=True, exist_ok=True)

    def kind(self) -> str | None:
        """Return the kind of the path."""
        return "folder" if self.path.is_dir() else "file" if self.path.exists() else None

    def tree(self, on_error: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Return all files; links to folders are followed."""
        # Each folder is visited once, because links may form a cycle.
        folders, seen = {}, {os.path.realpath(self.path)}
        for root, inner, names in os.walk(self.path, onerror=on_error, followlinks=True):
            folders[Path(root).relative_to(self.path).as_posix()] = sorted(names)
            targets = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(inner)}
            inner[:] = [name for name, target in targets.items() if target not in seen]
            seen.update(targets.values())
        return dict(sorted(("" if name == "." else name, names) for name, names in folders.items()))

    def open(self, name: str) -> pa.NativeFile:
        """Open a regular file."""
        path = self.path / name
        # A pipe or a device could block the reader forever.
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return pa.OSFile(str(path))

    def write(self, name: str, content: bytes) -> None:
        """Write a temporary file and rename it."""
        with whole_file(self.path / name) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the sorted names of everything but folders."""
        if not self.path.is_dir():
            return []
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)


class ObjectStore(Store):
    """A prefix on an object store, whose uploads are atomic."""

    def __init__(self, url: str, system: fs.FileSystem, path: str) -> None:
        self._url, self._system, self._path = url.rstrip("/"), system, path.rstrip("/")

    def inside(self, name: str) -> "ObjectStore":
        """Return the longer prefix."""
        return ObjectStore(f"{self._url}/{name}", self._system, f"{self._path}/{name}")

    def create(self) -> None:
        """Do nothing: a prefix exists once an object has it."""

    def kind(self) -> str | None:
        """Return the kind of the URL."""
        kinds = {fs.FileType.Directory: "folder", fs.FileType.File: "file"}
        return kinds.get(self._system.get_file_info(self._path).type)

    def tree(self, on_error: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Return all objects under the prefix, from one listing."""
        folders: dict[str, list[str]] = {}
        for info in self._infos(recursive=True):
            inner = PurePosixPath(info.path).relative_to(self._path)
            folders.setdefault("" if len(inner.parts) == 1 else inner.parent.as_posix(), []).append(inner.name)
        return {folder: sorted(names) for folder, names in sorted(folders.items())}

    def open(self, name: str) -> pa.NativeFile:
        """Open an object; reads download only their range."""
        return self._system.open_input_file(f"{self._path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Upload an object, which appears when the upload is complete."""
        with self._system.open_output_stream(f"{self._path}/{name}") as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        if name in self.names():
            self._system.delete_file(f"{self._path}/{name}")

    def names(self) -> list[str]:
        """Return the sorted names of objects directly under the prefix."""
        return sorted(info.base_name for info in self._infos(recursive=False))

    def _infos(self, recursive: bool) -> list[fs.FileInfo]:
        found = self._system.get_file_info(fs.FileSelector(self._path, recursive=recursive, allow_not_found=True))
        return [info for info in found if info.type == fs.FileType.File]

    def __str__(self) -> str:
        """Return the URL."""
        return self._url


class Memory(Store):
    """Files in a dict of this process."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._files = {} if files is None else files

    def inside(self, name: str) -> "Memory":
        """Return another, empty store."""
        return Memory()

    def create(self) -> None:
        """Do nothing: memory always exists."""

    def kind(self) -> str | None:
        """Return ``"folder"``."""
        return "folder"

    def tree(self, on_error: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Return all files."""
        return {"": self.names()}

    def open(self, name: str) -> pa.NativeFile:
        """Open a file."""
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return pa.BufferReader(self._files[name])

    def write(self, name: str, content: bytes) -> None:
        """Store the content."""
        self._files[name] = content

    def remove(self, name: str) -> None:
        """Drop the content."""
        self._files.pop(name, None)

    def names(self) -> list[str]:
        """Return the sorted names of all files."""
        return sorted(self._files)

    def __str__(self) -> str:
        """Return ``"memory"``."""
        return "memory"


def store_at(location: Location) -> Store:
    """Return the store of a path or URL.

    No file is accessed yet. URLs with ``s3://`` use the credentials, region and endpoint of the AWS tools
    (``AWS_ENDPOINT_URL``, ``AWS_DEFAULT_REGION``, ``~/.aws/credentials``, ...). Other URLs are those of ``pyarrow.fs``.

    Args:
        location: Path, or URL such as ``s3://bucket/traces``.

    Raises:
        LandscapeError: The URL has no bucket, or this pyarrow does not support it.

    Examples:
        >>> store = store_at("traces")
        >>> store.create()
        >>> store.write("run.json", b"{}")
        >>> store.names(), store.kind()
        (['run.json'], 'folder')
    """
    if not is_url(location):
        return Folder(location)
    url = str(location)
    if url.startswith("file://"):
        return Folder(unquote(urlsplit(url).path))
    try:
        system, path = _s3(url) if url.startswith("s3://") else fs.FileSystem.from_uri(url)
    except (ImportError, ValueError, OSError, NotImplementedError) as error:
        raise LandscapeError(
            f"{url}: cannot be used ({reason(error)}). Use a folder or a URL of pyarrow.fs such as s3://bucket/traces, "
            "and a pyarrow built with support for it, such as those on PyPI."
        ) from error
    if not path.strip("/"):
        raise _no_bucket(url)
    return ObjectStore(url, system, path)


def _s3(url: str) -> tuple[fs.FileSystem, str]:
    path = url.removeprefix("s3://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None and path.strip("/"):
        region = fs.resolve_s3_region(path.split("/")[0])
    # Two attempts are enough, because the write queue retries with every flush.
    options: dict[str, Any] = {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=2)}
    options |= {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS}
    return fs.S3FileSystem(endpoint_override=endpoint, region=region, **options), path


def _no_bucket(url: str) -> LandscapeError:
    return LandscapeError(f"{url}: names no bucket. Use a URL with a bucket and a folder, such as s3://bucket/traces.")


def is_url(location: Location) -> bool:
    """Return True for a URL, False for a path.

    Examples:
        >>> is_url("s3://bucket/traces"), is_url("traces")
        (True, False)
    """
    return isinstance(location, str) and "://" in location


def inside(location: Location, name: str) -> Location:
    """Return the path or URL of ``name`` inside a location.

    Raises:
        LandscapeError: The URL has no bucket.

    Examples:
        >>> inside("s3://bucket/traces/", "run")
        's3://bucket/traces/run'
    """
    if not is_url(location):
        return Path(location) / name
    if not str(location).partition("://")[2].strip("/"):
        raise _no_bucket(str(location))
    return f"{str(location).rstrip('/')}/{name}"


def reason(error: BaseException) -> str:
    """Return the system's message of an error, in one line.

    Examples:
        >>> reason(FileNotFoundError(2, "No such file or directory", "run.json"))
        'No such file or directory'
    """
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
