"""Files on their way to a store, which wait in memory while it does not take them."""

import time
import warnings

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Store, reason
from landscape.storage.lock import Lock

WAITING_BYTES = 256 << 20
"""Most bytes of files that wait: as Parquet over a million updates with eight losses each."""
REST = 20
"""A server that does not answer costs training a twentieth of its time at most."""


class WriteQueue:
    """Writes files to a store that this process alone may write to, in the order in which they were put.

    Nothing is raised where a disk is full, a folder has vanished, permission was withdrawn or a server does not answer:
    a warning says so, once, and the files wait until the store takes them, which every :meth:`send` tries.

    Args:
        store: Where the files go; it is held from now on.

    Attributes:
        waiting: Contents of the files that are to be written, by name.
        lost: Names of those that were more than memory may hold, ``WAITING_BYTES``.
        trouble: Why the store did not take the last file that it was given; empty if it did.

    Raises:
        LandscapeError: Another process writes there.
        OSError: The store cannot be written to at all.
    """

    def __init__(self, store: Store) -> None:
        self.waiting: dict[str, bytes] = {}
        self.lost: list[str] = []
        self.trouble = ""
        self._store = store
        self._sent: set[str] = set()
        self._told = False
        self._resting_until = 0.0
        self._lock: Lock | None = Lock(store)

    def put(self, name: str, content: bytes) -> None:
        """Have a file written with the next :meth:`send`, in the place of any other of that name."""
        # Whatever there is too much of is what comes last: the beginning of a run stays whole.
        if self._is_full(content) and not self.flush(again=False) and self._is_full(content):
            self.lost.append(name)
        else:
            self.waiting[name] = content

    def flush(self, again: bool = True) -> bool:
        """Write what waits, as far as the store takes it; whether nothing waits any more.

        Args:
            again: Whether also to ask a store that took long to refuse: ``REST`` times as long it is let alone.
        """
        started = time.monotonic()
        if not again and started < self._resting_until:
            return False
        try:
            self._lock = self._lock or Lock(self._store)  # it was let go, and there is more to come
            if self.waiting:
                self._lock.refresh()
            for name in list(self.waiting):
                self._store.write(name, self.waiting[name])
                self._sent.add(name)
                del self.waiting[name]  # only now: what could not be written is still here
            self.trouble = ""
        except (OSError, LandscapeError) as error:
            self.trouble = reason(error)
            self._resting_until = time.monotonic() + REST * (time.monotonic() - started)
            self._tell()
        return not self.waiting

    def discard(self, name: str) -> None:
        """Do not expect a file in the store any more, as it was removed."""
        self._sent.discard(name)

    def close(self) -> dict[str, list[str]]:
        """Try once more and tell which files are not in the store, by the reason; if none waits, let others write."""
        if not self.flush():
            self._make_anew()
        if not self.waiting:
            self.release_lock()
        try:
            gone = self._sent.difference(self._store.names())
        except OSError:
            gone = set()
        waiting = (
            f"could not be written ({self.trouble}); they are in memory as long as this process runs, and closing the "
            "trace once more tries again"
        )
        missing = {
            waiting: list(self.waiting),
            "were more than memory may hold while nothing could be written": self.lost,
            "were written and have vanished": sorted(gone.difference(self.waiting)),
        }
        return {why: names for why, names in missing.items() if names}

    def release_lock(self) -> None:
        """Let others write to the store."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _is_full(self, content: bytes) -> bool:
        return bool(self.waiting) and sum(map(len, self.waiting.values())) + len(content) > WAITING_BYTES

    def _make_anew(self) -> None:
        """A folder that has not come back by the end will not, so what is left of the run gets a new one."""
        try:
            self._store.create()
        except OSError:
            return
        self.flush()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self._store} cannot be written to: {self.trouble}. What is recorded is kept in memory and written "
                "as soon as it can be; training goes on.",
                stacklevel=2,
            )
