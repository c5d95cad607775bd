"""SIGTERM and Ctrl-C while a run is trained: the update that is under way is finished, and a checkpoint is written."""

import signal
from typing import Any

from landscape.errors import TrainingInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalGuard:
    """From the first update on, a signal waits until an update is done. A second one does what it always does."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The one that came."""
        self.step = 0
        """Updates so far."""
        self._before: dict[signal.Signals, Any] = {}

    def between_updates(self, step: int) -> None:
        """Raise what ends the training, if a signal has come."""
        self.step = step
        if not self._before and not self.signal:
            # What is ignored, as by a shell for its background jobs, stays ignored.
            listened = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in listened}
        if self.signal:
            raise TrainingInterrupted(self.signal.name)

    def __enter__(self) -> "SignalGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self._put_back()

    def _note(self, number: int, frame: Any) -> None:
        if self.signal:
            self._put_back()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)

    def _put_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
