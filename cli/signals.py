"""SIGINT and SIGTERM during training: finish the update, write a checkpoint, stop."""

import signal
from typing import Any

from landscape.errors import TrainingInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalGuard:
    """Defers the first signal to the end of the update.

    The handlers are installed after the first update. A second signal has its usual effect at once::

        update 7 | SIGTERM, recorded | end of update 7: TrainingInterrupted
        update 7 | SIGTERM, recorded | SIGTERM: previous handler
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal received."""
        self.step = 0
        """Number of updates so far."""
        self._previous: dict[signal.Signals, Any] = {}

    def between_updates(self, step: int) -> None:
        """Raise TrainingInterrupted if a signal was received."""
        self.step = step
        if not self._previous and not self.signal:
            # A signal that is ignored, such as SIGINT in a background job of a shell, stays ignored.
            handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in handled}
        if self.signal:
            raise TrainingInterrupted(self.signal.name)

    def __enter__(self) -> "SignalGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal:
            self._restore()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
