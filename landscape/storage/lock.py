"""A lock that gives one process at a time the right to write a run."""

import errno
import json
import math
import os
import platform
import time
import uuid
from typing import Any

from filelock import FileLock, Timeout

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Folder, Store

LEASE_SECONDS = 600
"""Age in seconds at which the owner file of a store without locks is stale."""

_LOCK, _OWNER = ".lock", ".owner.json"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class Lock:
    """Exclusive lock of a store.

    It is held until `release` or until the process exits. In a folder it is a lock of the operating system, which a
    dead process does not hold. Object stores, and file systems without locks, use an owner file with a lease instead:
    it names the owner, is rewritten with every write, and is stale after ``LEASE_SECONDS``. Example of two processes A
    and B that start at the same moment::

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
        self._me = {"host": platform.node(), "process": os.getpid(), "token": uuid.uuid4().hex}
        self._file = _file_lock(store)
        if self._file is None:
            self._raise_if_held()
        self._write_owner()
        if self._file is None:
            self._raise_if_held()

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
        try:
            if _owner(self._store).get("token") == self._me["token"]:
                self._store.remove(_OWNER)
        except OSError:
            pass  # The owner file stays, and is stale at the end of its lease.
        if self._file is not None:
            self._file.release()

    def _write_owner(self) -> None:
        self._store.write(_OWNER, json.dumps({**self._me, "time": time.time()}).encode())

    def _raise_if_held(self) -> None:
        owner = _owner(self._store)
        if not owner or owner.get("token") == self._me["token"]:
            return
        if _age(owner) < LEASE_SECONDS and not _is_dead(owner):
            raise _held(self._store, owner)


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


def _file_lock(store: Store) -> FileLock | None:
    """Acquire the folder's lock; return None without support."""
    if not isinstance(store, Folder):
        return None
    lock = FileLock(store.path / _LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise _held(store, _owner(store)) from error
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return lock


def _owner(store: Store) -> dict[str, Any]:
    """Return the owner file, empty if missing or damaged."""
    try:
        return dict(json.loads(store.read(_OWNER)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def _held(store: Store, owner: dict[str, Any]) -> LandscapeError:
    is_this_process = owner.get("host") == platform.node() and owner.get("process") == os.getpid()
    remedy = "Close its writer (probe.detach())" if is_this_process else "Stop it or let it end"
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
    if owner.get("host") != platform.node() or os.name != "posix":
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
        return True
    except PermissionError:
        pass  # The process is alive and has another user.
    return False
