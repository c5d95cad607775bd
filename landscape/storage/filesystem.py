"""Files in a folder, on an object store or in memory, through one interface."""

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from landscape.errors import LandscapeError
from landscape.files import whole_file
from landscape.storage.address import Location, inside, no_bucket, normalized
from landscape.storage.aws import s3_endpoint, s3_region
from landscape.text import short

CONNECT_SECONDS, REQUEST_SECONDS = 5, 30
"""Timeouts of an object store in seconds; training is blocked meanwhile."""
RETRY_SECONDS = 10
"""Time limit of retries of Google's client, which is 15 minutes by default."""
SLOWEST_BYTES = 100_000
"""Bytes per second of the slowest upload that is waited for, where the client has no timeouts."""

_Result = TypeVar("_Result")


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
    """A prefix on an object store, whose uploads are atomic.

    Args:
        url: URL of the prefix.
        system: File system of pyarrow.
        path: Path of the prefix in it.
        has_timeouts: True if the file system has timeouts of its own. The clients of Google and Azure have none for a
            server that accepts connections and is silent.
    """

    def __init__(self, url: str, system: fs.FileSystem, path: str, has_timeouts: bool = True) -> None:
        self._url, self._system, self._path, self._has_timeouts = url, system, path.rstrip("/"), has_timeouts

    def inside(self, name: str) -> "ObjectStore":
        """Return the longer prefix."""
        return ObjectStore(str(inside(self._url, name)), self._system, f"{self._path}/{name}", self._has_timeouts)

    def create(self) -> None:
        """Do nothing: a prefix exists once an object has it."""

    def kind(self) -> str | None:
        """Return the kind of the URL."""
        kinds = {fs.FileType.Directory: "folder", fs.FileType.File: "file"}
        return kinds.get(self._request(lambda: self._system.get_file_info(self._path)).type)

    def tree(self, on_error: Callable[[OSError], object]) -> dict[str, list[str]]:
        """Return all objects under the prefix, from one listing."""
        folders: dict[str, list[str]] = {}
        for info in self._infos(recursive=True):
            inner = PurePosixPath(info.path).relative_to(self._path)
            folders.setdefault("" if len(inner.parts) == 1 else inner.parent.as_posix(), []).append(inner.name)
        return {folder: sorted(names) for folder, names in sorted(folders.items())}

    def open(self, name: str) -> pa.NativeFile:
        """Open an object; reads download only their range."""
        path = f"{self._path}/{name}"

        def open_file() -> pa.NativeFile:
            if self._system.type_name == "abfs":
                self._system.get_file_info(path)  # If a login fails, opening would abort the process, but this raises.
            return self._system.open_input_file(path)

        return self._request(open_file)

    def write(self, name: str, content: bytes) -> None:
        """Upload an object, which appears when the upload is complete."""

        def upload() -> None:
            with self._system.open_output_stream(f"{self._path}/{name}") as file:
                file.write(content)

        self._request(upload, len(content))

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        if name in self.names():
            self._request(lambda: self._system.delete_file(f"{self._path}/{name}"))

    def names(self) -> list[str]:
        """Return the sorted names of objects directly under the prefix."""
        return sorted(info.base_name for info in self._infos(recursive=False))

    def _infos(self, recursive: bool) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self._path, recursive=recursive, allow_not_found=True)
        found = self._request(lambda: self._system.get_file_info(selector))
        return [info for info in found if info.type == fs.FileType.File]

    def _request(self, call: Callable[[], _Result], size: int = 0) -> _Result:
        """Return the result of a request that sends ``size`` bytes.

        Raises:
            OSError: The request failed, or took too long.
        """
        try:
            return call() if self._has_timeouts else _within(REQUEST_SECONDS + size / SLOWEST_BYTES, call)
        except pa.ArrowException as error:  # Azure's client raises it for a missing login.
            raise OSError(errno.EIO, reason(error)) from error

    def __str__(self) -> str:
        """Return the URL."""
        return self._url


def _within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """Return the result of a call, or raise a TimeoutError."""
    result: Future[_Result] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    # The process can end while the thread is stuck: it is a daemon, which the threads of an executor are not.
    threading.Thread(target=run, daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {seconds:.0f} s")
    return result.result()


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

    No file is accessed yet. ``~`` is the home folder. URLs with ``s3://`` use the credentials, region and endpoint of
    the AWS tools (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ``~/.aws/config``, ...). Other URLs are those of
    ``pyarrow.fs``.

    Args:
        location: Path, or URL such as ``s3://bucket/traces``.

    Raises:
        LandscapeError: The URL has credentials or no bucket, or this pyarrow does not support it.

    Examples:
        >>> store = store_at("traces")
        >>> store.create()
        >>> store.write("run.json", b"{}")
        >>> store.names(), store.kind()
        (['run.json'], 'folder')
    """
    place = normalized(location)
    if isinstance(place, Path):
        return Folder(place)
    scheme, _, rest = place.partition("://")
    if scheme == "file":
        return Folder(unquote(urlsplit(place).path))
    try:
        system, path = _s3(rest) if scheme == "s3" else _other_system(scheme, rest)
    except (ImportError, TypeError, ValueError, OSError, NotImplementedError, pa.ArrowException) as error:
        raise LandscapeError(
            f"{place}: cannot be used ({reason(error)}). Use a folder or a URL of pyarrow.fs such as "
            "s3://bucket/traces, and a pyarrow built with support for it, such as those on PyPI."
        ) from error
    if not path.strip("/"):
        raise no_bucket(place)
    return ObjectStore(place, system, path, has_timeouts=scheme == "s3")


def _s3(rest: str) -> tuple[fs.FileSystem, str]:
    path, _, query = rest.partition("?")
    options: dict[str, Any] = {"endpoint_override": s3_endpoint()} | dict(parse_qsl(query))
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or options.get("region")
    if region is None and options["endpoint_override"] is None:
        with suppress(OSError):  # AWS knows the region of each bucket, which may not be that of the profile.
            region = fs.resolve_s3_region(path.split("/")[0])
    options["region"] = region or s3_region()
    # Two attempts are enough, because the write queue retries with every flush.
    options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=2)
    return fs.S3FileSystem(connect_timeout=CONNECT_SECONDS, request_timeout=REQUEST_SECONDS, **options), path


def _other_system(scheme: str, rest: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of another URL."""
    path, _, query = rest.partition("?")
    host, _, path = path.partition("/")
    options = dict(parse_qsl(query))
    if scheme in ("gs", "gcs"):
        options = {"retry_limit_seconds": str(RETRY_SECONDS)} | options
    # A path is taken literally, as by the tools of the stores, but pyarrow decodes it.
    return fs.FileSystem.from_uri(f"{scheme}://{host}/{quote(path)}?{urlencode(options)}".rstrip("?"))


def reason(error: BaseException) -> str:
    """Return the system's message of an error, in one line.

    Examples:
        >>> reason(FileNotFoundError(2, "No such file or directory", "run.json"))
        'No such file or directory'
    """
    # The clients of object stores append their internals, after the cause.
    return getattr(error, "strerror", None) or short(" ".join(str(error).split()), 400) or type(error).__name__
