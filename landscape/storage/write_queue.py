"""A write queue that keeps files in memory while the store is unavailable."""

import time
import warnings

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Store, reason
from landscape.storage.lock import Lock

WAITING_BYTES = 256 << 20
"""Memory limit of the queue: 256 MiB, about 1,000,000 updates with 8 losses each."""
BACK_OFF = 20
"""Back-off in units of the failed attempt, which limits retries to 5 % of the time."""


class WriteQueue:
    """Queue of files that are written to a locked store.

    No error is raised if the disk is full, the folder was deleted, permission was withdrawn or the server does not
    respond. The first failure issues a warning, the files stay in memory, and every `flush` retries.

    Args:
        store: Store for the files, locked until `release_lock`.

    Attributes:
        waiting: Contents of the files that are not written yet, by name.
        lost: Names of files dropped because the queue exceeded ``WAITING_BYTES``.
        trouble: Reason of the last failure, empty after a success.

    Raises:
        LandscapeError: Another process writes to the store.
        OSError: The store cannot be written.
    """

    def __init__(self, store: Store) -> None:
        self.waiting: dict[str, bytes] = {}
        self.lost: list[str] = []
        self.trouble = ""
        self._store = store
        self._written: set[str] = set()
        self._has_warned = False
        self._retry_at = 0.0
        self._lock: Lock | None = Lock(store)

    def put(self, name: str, content: bytes) -> None:
        """Queue a file; it replaces a queued namesake."""
        # When the queue is full, the newest file is dropped: the beginning of a run stays complete.
        if self._is_full(content) and not self.flush(in_back_off=False) and self._is_full(content):
            self.lost.append(name)
        else:
            self.waiting[name] = content

    def flush(self, in_back_off: bool = True) -> bool:
        """Write the queued files; return True if none is left.

        Args:
            in_back_off: Retry also during the back-off, which lasts ``BACK_OFF`` times as long as the failed attempt.
        """
        started = time.monotonic()
        if not in_back_off and started < self._retry_at:
            return False
        try:
            if self.waiting:
                self._lock = self._lock or Lock(self._store)  # It was released, and there are new files.
                self._lock.refresh()
            for name in list(self.waiting):
                self._store.write(name, self.waiting[name])
                self._written.add(name)
                del self.waiting[name]  # Only after the write, so that a file that could not be written is kept.
            self.trouble = ""
        except (OSError, LandscapeError) as error:
            self.trouble = reason(error)
            self._retry_at = time.monotonic() + BACK_OFF * (time.monotonic() - started)
            self._warn_once()
        return not self.waiting

    def discard(self, name: str) -> None:
        """Record that a file was removed from the store."""
        self._written.discard(name)

    def close(self) -> dict[str, list[str]]:
        """Flush, and release the lock if all is written.

        Returns:
            Names of the files that are missing in the store, by reason.
        """
        if not self.flush():
            self._recreate()
        if not self.waiting:
            self.release_lock()
        try:
            gone = self._written.difference(self._store.names())
        except OSError:
            gone = set()
        waiting = (
            f"could not be written ({self.trouble}) and stay in memory until this process exits; close the trace again "
            "to retry"
        )
        missing = {
            waiting: list(self.waiting),
            "exceeded the memory limit while nothing could be written": self.lost,
            "were written and have vanished": sorted(gone.difference(self.waiting)),
        }
        return {why: names for why, names in missing.items() if names}

    def release_lock(self) -> None:
        """Release the lock until the next flush."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _is_full(self, content: bytes) -> bool:
        return bool(self.waiting) and sum(map(len, self.waiting.values())) + len(content) > WAITING_BYTES

    def _recreate(self) -> None:
        """Write the queue to a new folder after a deletion."""
        try:
            self._store.create()
        except OSError:
            return
        self.flush()

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._store}: cannot be written to: {self.trouble}. Training continues; rows are kept in memory and "
                "written once it is possible.",
                stacklevel=2,
            )
