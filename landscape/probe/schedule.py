"""Selection of the updates that are probed, by number or by a share of the training time."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ENOUGH_PROBES = 30
"""Number of probes below which the mean of a run says little, since it depends on which updates they are."""


class OverheadBudget:
    """Limits probes to a share of the training time.

    The first update is always probed. A later update is probed once the budget covers another probe as expensive as the
    last. The first probe is more expensive than the others, because of its checks. At most half of the budget pays for
    that excess, so it is spread over the run. For a share of 0.1 and probes of 1 s, the first of 3 s, these are updates
    after 15 s of training, 50 s, 60 s, ...

    Args:
        share: Most seconds of probes per second of training.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.training = 0.0
        """Seconds of training, without probes."""
        self.probing = 0.0
        """Seconds of probes."""
        self.first = 0.0
        """Seconds of the first probe."""
        self.probes = 0
        """Number of probes."""
        self._last = 0.0

    def add_training(self, seconds: float) -> None:
        """Add seconds of training."""
        self.training += seconds

    def add_probe(self, seconds: float) -> None:
        """Add the seconds of one probe."""
        self.first = self.first if self.probes else seconds
        self.probes += 1
        self.probing += seconds
        self._last = seconds

    def allows_probe(self) -> bool:
        """Return True if the budget covers another probe."""
        if not self.probes:
            return True
        excess, budget = max(0.0, self.first - self._usual()), self.share * self.training
        due = self._last if self.probes > 1 else self._usual()
        return self.probing - excess + due <= budget - min(excess, budget / 2)

    def share_for(self, probes: int) -> float:
        """Return the share that pays for a number of probes."""
        return (self.first + (probes - 1) * self._usual()) / max(self.training, 1e-9)

    def _usual(self) -> float:
        """Return the mean seconds of a probe after the first."""
        # The second one is a guess. If that is too low, it only comes too early.
        return (self.probing - self.first) / (self.probes - 1) if self.probes > 1 else self.first / 8

    def state_dict(self) -> dict[str, float]:
        """Return the seconds for a checkpoint."""
        seconds = {"training": self.training, "probing": self.probing, "last": self._last}
        return seconds | {"first": self.first, "probes": self.probes}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from a checkpoint, with the share of this run."""
        self.training, self.probing, self._last = state["training"], state["probing"], state["last"]
        # Checkpoints of earlier versions lack the last two: their first probe is taken for a usual one.
        self.first, self.probes = state.get("first", self._last), int(state.get("probes", 2))


class DeviceTimer:
    """Timer of blocks of code, in seconds.

    On an accelerator it uses events of the device, and never blocks until the device is done.

    Args:
        device: Device of the code.
    """

    def __init__(self, device: torch.device) -> None:
        module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        has_events = hasattr(module, "Event") and hasattr(module, "current_stream")
        self._device, self._accelerator = device, module if has_events else None
        self._running: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the body."""
        started = self._mark()
        try:
            yield
        finally:
            self._running.append((started, self._mark()))

    def pop(self) -> list[float]:
        """Return seconds of blocks that finished since the last call."""
        seconds = []
        while self._running and (self._accelerator is None or self._running[0][1].query()):
            started, ended = self._running.popleft()
            seconds.append(ended - started if self._accelerator is None else started.elapsed_time(ended) / 1e3)
        return seconds

    def pending(self) -> bool:
        """Return True if a block has not finished."""
        return bool(self._running)

    def _mark(self) -> Any:
        if self._accelerator is None:
            return time.perf_counter()
        event = self._accelerator.Event(enable_timing=True)
        event.record(self._accelerator.current_stream(self._device))  # which need not be that of the current device
        return event


class ProbeSchedule:
    """Decides, after each update, whether the next one is probed.

    Args:
        every: Probe every n-th update, the first included.
        share: Share of the training time that probes may cost; None is without a limit.
        device: Device of the model.
        decide: Maps the decision of this process, which depends on its clock, to a common one of all ranks.
    """

    def __init__(
        self,
        every: int,
        share: float | None,
        device: torch.device,
        decide: Callable[[bool], bool] = lambda due: due,
    ) -> None:
        self.due = True
        """True if the current update is probed."""
        self._every = every
        self._decide = decide
        self._budget = None if share is None else OverheadBudget(share)
        self._timer = DeviceTimer(device)
        self.probes = 0
        """Number of probed updates."""
        self._updates = 0
        self._seconds = 0.0
        """Seconds of blocks of a probe that has not finished."""
        self._ended = time.perf_counter()

    def start(self) -> None:
        """Start the clock of the training time."""
        self._ended = time.perf_counter()

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Time the body as a part of a probe."""
        with self._timer.running():
            yield

    def advance(self, extra: float) -> None:
        """Decide after an update if the next is probed.

        Args:
            extra: Seconds that the probe has taken outside of `probing`.
        """
        self._updates += 1
        self.probes += self.due
        if self._budget is None:
            self._timer.pop()
            self.due = self._updates % self._every == 0
            return
        now, probes = time.perf_counter(), [*self._timer.pop(), *([extra] if extra else [])]
        self._budget.add_training(now - self._ended - sum(probes))
        self._seconds += sum(probes)
        if self._seconds and not self._timer.pending():
            self._budget.add_probe(self._seconds)
            self._seconds = 0.0
        self._ended = now
        self.due = self._updates % self._every == 0 and self._decide(
            not self._timer.pending() and self._budget.allows_probe()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without unfinished blocks."""
        budget = None if self._budget is None else self._budget.state_dict()
        return {"due": self.due, "updates": self._updates, "probes": self.probes, "budget": budget}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.due, self._updates, self.probes = state["due"], state["updates"], state["probes"]
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state_dict(state["budget"])
        self.start()

    def facts(self) -> dict[str, Any]:
        """Return the budget and its use, as facts.

        If the budget paid for too few probes, they hold the number that is enough, and the share that pays for it.
        """
        if self._budget is None:
            return {}
        facts = {"share": self._budget.share, "training_seconds": self._budget.training}
        facts |= {"probing_seconds": self._budget.probing, "probes": self.probes, "updates": self._updates}
        enough = min(ENOUGH_PROBES, math.ceil(self._updates / self._every))
        if self.probes < enough:
            # A tenth more than needed, in steps of 5 %.
            facts |= {"enough_probes": enough, "enough_share": 5 * math.ceil(22 * self._budget.share_for(enough)) / 100}
        return {"budget": facts}
