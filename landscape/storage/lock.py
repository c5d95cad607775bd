"""A lock that gives one process at a time the right to write a run."""

import errno
import json
import math
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Folder, Store

LEASE_SECONDS = 600
"""Age in seconds at which the owner file of a store without locks is stale."""

_LOCK, _OWNER = ".lock", ".owner.json"
_held_tokens: set[str] = set()
"""Tokens of the locks that this process holds."""


class Lock:
    """Exclusive lock of a store.

    It is held until `release` or until the process exits. In a folder it is a lock of the operating system, which a
    dead process does not hold. Object stores, and file systems without locks, use an owner file with a lease instead:
    it names the owner, is rewritten with every write, and is stale after ``LEASE_SECONDS``, or if the owner is dead
    according to this host. A process id alone does not tell that: a restarted container has the ids of its former life.
    Example of two processes A and B that start at the same moment::

        A: no owner file, so A writes it          B: no owner file, so B writes it over that of A
        A: reads it back: owner B, so A raises    B: reads it back: owner B, so B holds the lock

    If A reads before B writes, both start, and the next `refresh` of A raises.

    Args:
        store: Store to lock.

    Raises:
        LandscapeError: Another process holds the lock; the message names its host and process.
        OSError: The store cannot be written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        process = os.getpid()
        self._me = {"host": platform.node(), "process": process, "token": uuid.uuid4().hex, "began": _began(process)}
        self._file = _file_lock(store)
        _held_tokens.add(self._me["token"])  # Before others can read it.
        try:
            if self._file is None:
                self._raise_if_held()
            self._write_owner()
            if self._file is None:
                self._raise_if_held()
        except BaseException:
            _held_tokens.discard(self._me["token"])
            raise

    def refresh(self) -> None:
        """Check that the lock is held; renew its lease.

        Raises:
            OSError: The store cannot be written, or another process has taken the lock.
        """
        owner = _owner(self._store)
        if owner and owner.get("token") != self._me["token"]:
            raise _taken_over(owner)
        if self._file is not None and not owner:
            self._reacquire(self._file)
        if self._file is None or not owner:
            self._write_owner()

    def _reacquire(self, file: FileLock) -> None:
        """Lock the folder again, because its owner file was deleted."""
        # The folder may have been deleted with it, and then the held lock is that of a deleted file.
        file.release()
        if self._store.kind() != "folder":  # Acquiring the lock would create the folder.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            file.acquire()
        except Timeout as error:
            raise _taken_over(_owner(self._store)) from error

    def release(self) -> None:
        """Release the lock, even if the store is unreachable."""
        _held_tokens.discard(self._me["token"])
        try:
            if _owner(self._store).get("token") == self._me["token"]:
                self._store.remove(_OWNER)
        except OSError:
            pass  # The owner file stays, and is stale at the end of its lease.
        if self._file is not None:
            with suppress(OSError):  # A file system that lost its locks.
                self._file.release()

    def _write_owner(self) -> None:
        self._store.write(_OWNER, json.dumps({**self._me, "time": time.time()}).encode())

    def _raise_if_held(self) -> None:
        owner = _owner(self._store)
        if not owner or owner.get("token") == self._me["token"]:
            return
        if _age(owner) < LEASE_SECONDS and not _is_dead(owner):
            raise _held(self._store, owner, leased=True)


def writer_of(store: Store) -> str | None:
    """Return the process that writes to a store, or None.

    A process that was killed on another host is returned, too, because it cannot be checked from here.

    Examples:
        >>> from landscape.storage.filesystem import Memory
        >>> store = Memory({".owner.json": b'{"host": "node17", "process": 4711}'})
        >>> writer_of(store)
        'process 4711 on host node17'
    """
    owner = _owner(store)
    return None if not owner or _is_dead(owner) else _description(owner)


def is_abandoned(store: Store) -> bool:
    """Return True if the last writer died without a `release`.

    Examples:
        >>> from landscape.storage.filesystem import Memory
        >>> is_abandoned(Memory()), is_abandoned(Memory({".owner.json": b'{"host": "node17", "process": 4711}'}))
        (False, False)
    """
    owner = _owner(store)
    return bool(owner) and _is_dead(owner)


def _file_lock(store: Store) -> FileLock | None:
    """Acquire the folder's lock; return None without support."""
    if not isinstance(store, Folder):
        return None
    path = store.path / _LOCK
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise _held(store, _owner(store)) from error
    except NotImplementedError:
        return None
    except OSError:
        # File systems without locks, such as some NFS, have many error codes; but they can write the file.
        if not os.access(path, os.W_OK):
            raise
        return None
    return lock


def _owner(store: Store) -> dict[str, Any]:
    """Return the owner file, empty if missing or damaged."""
    try:
        return dict(json.loads(store.read(_OWNER)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def _held(store: Store, owner: dict[str, Any], leased: bool = False) -> LandscapeError:
    remedy = "Close its writer (probe.detach())" if owner.get("token") in _held_tokens else "Stop it or let it end"
    if leased:
        remedy += f", or try again in {math.ceil(LEASE_SECONDS - _age(owner))} s if it was killed"
    return LandscapeError(f"{store}: is being written by {_description(owner)}. {remedy}, or use another folder.")


def _taken_over(owner: dict[str, Any]) -> OSError:
    return OSError(errno.EBUSY, f"taken over by {_description(owner)}")


def _description(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', '(unknown)')} on host {owner.get('host', '(unknown)')}"


def _age(owner: dict[str, Any]) -> float:
    """Return the seconds since the last refresh; infinity if unknown."""
    try:
        return time.time() - float(owner["time"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return True if the owner exited on this host."""
    if owner.get("host") != platform.node() or os.name != "posix" or owner.get("token") in _held_tokens:
        return False
    try:
        process = int(owner["process"])
    except (KeyError, TypeError, ValueError):
        return True
    if process == os.getpid():
        return True  # This process does not hold the lock, so the owner was an earlier one with the same id.
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # The process is alive and has another user.
    began = _began(process)
    return began is not None and owner.get("began", began) not in (began, None)


def _began(process: int) -> str | None:
    """Return the boot and tick when a process began."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
