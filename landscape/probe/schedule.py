"""Which updates are probed: each n-th, or as many as a share of the training time pays for."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class OverheadBudget:
    """Probes that cost at most ``share`` of the time that training takes.

    The first update is probed in any case; later ones as soon as a probe as dear as the last can be paid for.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.training = 0.0
        """Seconds of training so far, without probes."""
        self.probing = 0.0
        """Seconds of probes so far."""
        self._last = 0.0

    def train(self, seconds: float) -> None:
        """Account for a piece of training."""
        self.training += seconds

    def probe(self, seconds: float) -> None:
        """Account for a probe."""
        self.probing += seconds
        self._last = seconds

    def allows_probe(self) -> bool:
        """Whether another probe can be paid for."""
        return self.probing + self._last <= self.share * self.training

    def state_dict(self) -> dict[str, float]:
        """The accounts."""
        return {"training": self.training, "probing": self.probing, "last": self._last}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the accounts; the share stays as it is asked for now."""
        self.training, self.probing, self._last = state["training"], state["probing"], state["last"]


class DeviceTimer:
    """Times pieces of work in seconds, on a GPU by its own clock and without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = torch.get_device_module(device) if device.type == "cuda" else None
        self._running: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the body."""
        started = self._mark()
        try:
            yield
        finally:
            self._running.append((started, self._mark()))

    def take(self) -> list[float]:
        """The pieces that have come to their end since the last call."""
        seconds = []
        while self._running and (self._gpu is None or self._running[0][1].query()):
            started, ended = self._running.popleft()
            seconds.append(ended - started if self._gpu is None else started.elapsed_time(ended) / 1e3)
        return seconds

    def pending(self) -> bool:
        """Whether a piece is still under way."""
        return bool(self._running)

    def _mark(self) -> Any:
        if self._gpu is None:
            return time.perf_counter()
        event = self._gpu.Event(enable_timing=True)
        event.record()
        return event


class ProbeSchedule:
    """Decides, after each update, whether the next one is probed.

    Args:
        every: Probe each n-th update, the first included.
        share: Share of the training time that probes may cost; None does not look at the time.
        device: Where the model is.
        decide: Takes whether this process would probe an update, where that depends on its clock, and gives whether all
            of those that train the model do.
    """

    def __init__(
        self,
        every: int,
        share: float | None,
        device: torch.device,
        decide: Callable[[bool], bool] = lambda due: due,
    ) -> None:
        self.due = True
        """Whether the current update is probed."""
        self._every = every
        self._decide = decide
        self._budget = None if share is None else OverheadBudget(share)
        self._watch = DeviceTimer(device)
        self._updates = self._probes = 0
        self._ended = time.perf_counter()

    def start(self) -> None:
        """Training goes on from here."""
        self._ended = time.perf_counter()

    @contextmanager
    def probing(self) -> Iterator[None]:
        """The body is a part of a probe."""
        with self._watch.running():
            yield

    def advance(self, extra: float) -> None:
        """An update is done; a probe of it has cost ``extra`` seconds beside what was timed."""
        self._updates += 1
        self._probes += self.due
        if self._budget is None:
            self._watch.take()
            self.due = self._updates % self._every == 0
            return
        now, probes = time.perf_counter(), [*self._watch.take(), *([extra] if extra else [])]
        self._budget.train(now - self._ended - sum(probes))
        if probes:
            self._budget.probe(sum(probes))
        self._ended = now
        self.due = self._updates % self._every == 0 and self._decide(
            not self._watch.pending() and self._budget.allows_probe()
        )

    def state_dict(self) -> dict[str, Any]:
        """What another process needs to go on; a piece that a GPU has not finished yet is not accounted for."""
        budget = None if self._budget is None else self._budget.state_dict()
        return {"due": self.due, "updates": self._updates, "probes": self._probes, "budget": budget}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.due, self._updates, self._probes = state["due"], state["updates"], state["probes"]
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state_dict(state["budget"])
        self.start()

    def facts(self) -> dict[str, Any]:
        """What was asked and what came out, where there is a budget."""
        if self._budget is None:
            return {}
        spent = {"training_seconds": self._budget.training, "probing_seconds": self._budget.probing}
        return {"budget": {"share": self._budget.share, **spent, "probes": self._probes, "updates": self._updates}}
