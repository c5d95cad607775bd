"""The right to write to a run, which one process has at a time."""

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
"""Where the place has no locks, a process that has not written for so long is taken for dead."""

_LOCK, _OWNER = ".lock", ".owner.json"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class Lock:
    """Held from its making to its :meth:`release`, or until the process is dead.

    In a folder it is a lock of the operating system, which a dead process does not hold any more. An object store (and
    a file system without locks) has none: there a note says who writes, is renewed with all that is written, and counts
    for ``LEASE_SECONDS``; two processes that begin within the same moment are told apart when the note is renewed.

    Raises:
        LandscapeError: Another process holds it; the message says on which host, and which process.
        OSError: The place cannot be written to.
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
        """Say that this process still writes.

        Raises:
            OSError: The place cannot be written to, or another process has taken over.
        """
        owner = _owner(self._store)
        if owner and owner.get("token") != self._me["token"]:
            raise OSError(errno.EBUSY, f"taken over by {_named(owner)}")
        if self._file is not None and not owner:
            self._reacquire(self._file)
        if self._file is None or not owner:
            self._write_owner()

    def _reacquire(self, file: FileLock) -> None:
        """The note is gone, and so may be the folder in which the lock was: what is there now is not held yet."""
        file.release()
        if self._store.kind() != "folder":  # which the lock would make
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            file.acquire()
        except Timeout as error:
            raise OSError(errno.EBUSY, f"taken over by {_named(_owner(self._store))}") from error

    def release(self) -> None:
        """Let others write; a place that is gone by now is let go, too."""
        try:
            if _owner(self._store).get("token") == self._me["token"]:
                self._store.remove(_OWNER)
        except OSError:
            pass  # the note is stale from now on: nobody waits for it longer than for its time
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
    """Who writes, or was killed when it did, on a host that cannot be asked; None if nobody does."""
    owner = _owner(store)
    return None if not owner or _is_dead(owner) else _named(owner)


def _file_lock(store: Store) -> FileLock | None:
    """The folder's lock, now held; None if the place has no locks."""
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
    """Who writes, as the note says; nothing if there is none that can be read."""
    try:
        return dict(json.loads(store.read(_OWNER)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def _held(store: Store, owner: dict[str, Any]) -> LandscapeError:
    itself = owner.get("host") == platform.node() and owner.get("process") == os.getpid()
    remedy = "Close its writer (probe.detach())" if itself else "Wait until it has ended, or stop it"
    return LandscapeError(f"{store} is being written by {_named(owner)}. {remedy}; or give another folder.")


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', '(unknown)')} on host {owner.get('host', '(unknown)')}"


def _age(owner: dict[str, Any]) -> float:
    """Seconds since the note was renewed; infinitely many if it does not say when."""
    try:
        return time.time() - float(owner["time"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether it is a process of this host that is no more; of other hosts and systems that is not known."""
    if owner.get("host") != platform.node() or os.name != "posix":
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
        return True
    except PermissionError:
        pass  # it is another user's, and alive
    return False
