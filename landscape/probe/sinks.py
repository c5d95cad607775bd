"""Rows for dashboards: handed over by daemon threads, so that no dashboard slows or ends the training."""

import atexit
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from landscape.errors import LandscapeError
from landscape.names import MEASURES

Sink = Callable[[dict[str, Any]], Any]
"""Function of the scalars of a row; its method ``flush``, if it has one, is called after the last row."""

MEASURED = ("range", "lost_share", "sharpness", "predictiveness", "beta")
"""Measures among the scalars, where the rows have what they need."""
_COPIED = ("step", "epoch", "lr", "loss", "loss_min", "loss_max", "grad_norm", "slope", "seconds")
_LOSSES = ("loss", "loss_min", "loss_max", "range")
"""Scalars whose NaN is a finding: the training has diverged."""
MAX_ROWS = 10_000
"""Rows that may wait for a sink; older ones are dropped."""
WAIT_SECONDS = 10.0
"""Longest time that the end of a probe waits for its sinks."""


def check_sinks(sinks: Any) -> tuple[Sink, ...]:
    """Return the sinks, or raise a LandscapeError."""
    if isinstance(sinks, Sequence) and not isinstance(sinks, str) and all(map(callable, sinks)):
        return tuple(sinks)
    raise LandscapeError(
        f"sinks={sinks!r:.100}: must be a list of functions of a row. Give [TensorBoard()] or [print], for example."
    )


def scalars_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the scalars of rows: columns, and `MEASURED`.

    Examples:
        >>> row = {"step": 3, "lr": 0.1, "loss": 2.0, "slope": 4.0, "direction_norm": 2.0,
        ...        "step_sizes": [0.1, 0.2], "losses": [1.7, 1.6]}
        >>> scalars = scalars_of([row])[0]
        >>> list(scalars), round(scalars["range"], 6)
        (['step', 'lr', 'loss', 'loss_min', 'loss_max', 'slope', 'range', 'lost_share', 'sharpness'], 0.1)
    """
    # Command lines read the options of a probe, and should not wait for pandas.
    import pandas as pd

    from landscape.analysis.measures import has_inputs, measured

    frame = measured(pd.DataFrame([dict(row) for row in rows]), "loss")
    names = [name for name in _COPIED if name in frame]
    for measure in MEASURED:
        if MEASURES[measure].along in frame and has_inputs(frame, measure).any():
            frame = measured(frame, measure)
            if measure not in frame:  # It has a value for each point: the largest one.
                frame[measure] = frame[f"{measure}_max"]
            names.append(measure)
    return [_known(dict(zip(names, row, strict=True))) for row in frame[names].itertuples(index=False)]


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Return plain numbers, without NaN where it means unknown."""
    known = {name: float(value) for name, value in row.items() if value == value or name in _LOSSES}
    return known | {"step": int(row["step"])}


class _Chunk:
    """Rows that reached the host together."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    @cached_property
    def scalars(self) -> list[dict[str, Any]]:
        """Scalars of the rows, computed by a sink's thread."""
        return scalars_of(self.rows)


class _Feed:
    """Waiting rows of one sink, and its thread."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.name = sink, getattr(sink, "__name__", type(sink).__name__)
        self.error: BaseException | None = None
        self.dropped = 0
        self._rows = deque[tuple[_Chunk, int]]()
        self._changed = threading.Condition()
        self._has_ended = False
        self._thread: threading.Thread | None = None

    def put(self, chunk: _Chunk) -> None:
        with self._changed:
            if self.error is not None:
                return
            self._rows.extend((chunk, place) for place in range(len(chunk.rows)))
            while len(self._rows) > MAX_ROWS:
                self._rows.popleft()
                self.dropped += 1
            self._has_ended = False
            self._changed.notify()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=f"landscape {self.name}", daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Wait for the thread; drop the remaining rows."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(max(seconds, 0.0))
        with self._changed:
            self.dropped += len(self._rows)
            self._rows.clear()

    def _run(self) -> None:
        try:
            while (row := self._next()) is not None:
                chunk, place = row
                self.sink(chunk.scalars[place])
                if not self._rows:
                    getattr(self.sink, "flush", lambda: None)()
        except BaseException as error:  # The training must not notice, whatever it is.
            with self._changed:
                self.error = error
                self._rows.clear()

    def _next(self) -> tuple[_Chunk, int] | None:
        with self._changed:
            while not self._rows and not self._has_ended:
                self._changed.wait()
            return self._rows.popleft() if self._rows else None


class SinkQueue:
    """Hands rows to sinks, each in its own thread.

    A sink that raises gets no more rows, and one that is slow loses the oldest ones; a warning says so. In a forked
    process nothing is handed over.

    Args:
        sinks: Functions of the scalars of a row.

    Examples:
        >>> steps = []
        >>> queue = SinkQueue([lambda row: steps.append(row["step"])])
        >>> queue.put([{"step": step, "loss": 2.0, "losses": [1.0], "step_sizes": [0.1]} for step in range(3)])
        >>> queue.close()
        >>> steps
        [0, 1, 2]
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.last_step = -1
        """Last step that was handed over, here or before the run was resumed."""
        self._feeds = [_Feed(sink) for sink in sinks]
        self._process = os.getpid()
        self._warned: set[str] = set()
        self._put_at = -math.inf

    def add(self, sink: Sink) -> None:
        """Add a sink, which gets the rows from now on."""
        self._feeds.append(_Feed(sink))

    def open(self) -> None:
        """Register `close` for the end of the process."""
        if self._feeds:
            atexit.register(self.close)

    @property
    def is_due(self) -> bool:
        """True if a sink wants rows before they are written."""
        seconds = min((getattr(feed.sink, "seconds", math.inf) for feed in self._feeds), default=math.inf)
        # Without such a sink nothing is fetched: a difference of infinities would be NaN or true.
        return seconds < math.inf and time.monotonic() - self._put_at >= seconds

    def put(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queue rows that were not queued before."""
        if not self._feeds or os.getpid() != self._process:
            return
        self._put_at = time.monotonic()
        new = [row for row in rows if "losses" in row and row["step"] > self.last_step]
        if new:
            self.last_step = new[-1]["step"]
            chunk = _Chunk(new)
            for feed in self._feeds:
                feed.put(chunk)
        self._warn_of_errors()

    def close(self) -> None:
        """Wait for the sinks, and warn of lost rows."""
        if not self._feeds or os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        end = time.monotonic() + WAIT_SECONDS
        for feed in self._feeds:
            feed.close(end - time.monotonic())
        self._warn_of_errors()
        for feed in self._feeds:
            if feed.dropped:
                message = f"sinks: {feed.name} was too slow and missed {feed.dropped} rows. The trace has them."
                feed.dropped = 0
                warnings.warn(message, stacklevel=2)

    def _warn_of_errors(self) -> None:
        for feed in self._feeds:
            if feed.error is not None and feed.name not in self._warned:
                self._warned.add(feed.name)
                error = f"{type(feed.error).__name__}: {feed.error}"
                warnings.warn(f"sinks: {feed.name} failed ({error}) and gets no more rows.", stacklevel=3)
