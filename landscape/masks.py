"""Random numbers along a ray, drawn once for all points, because every point draws the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FILLS = {torch.ops.aten.bernoulli_.float, torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default}
"""What fills a tensor with numbers that depend on nothing but the stream; dropout is made of the first of them."""


@dataclass
class _Draw:
    """One fill: what was asked for, what came out, and the state of the stream after it."""

    asked: tuple[Any, ...]
    drawn: Tensor
    after: Tensor


class SharedDraws(TorchDispatchMode):
    """Replays at later points what an earlier one drew from torch's stream on the CPU.

    Drawing takes a CPU ten times as long as copying: without this, dropout is a third of a transformer's forward pass.
    Each point is to enter the same state of the stream. As soon as a point asks for something else than that one
    did, the stream is put where it would be, and the rest of that point draws by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[_Draw] = []
        self.moves: bool | None = None
        """Whether the first point has drawn anything at all; None before it."""
        self.recording = True
        self.at: int | None = 0
        """Number of draws so far at this point; None once it draws by itself."""

    @contextmanager
    def point(self) -> Iterator[None]:
        """Around the evaluation of a point; the first one only finds out whether there is anything to share."""
        before = torch.get_rng_state() if self.moves is None else None
        self.recording, self.at = not self.draws, 0
        with self if self.moves else nullcontext():
            yield
        if before is not None:
            self.moves = not torch.equal(before, torch.get_rng_state())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or self.at is None:
            return func(*args, **kwargs)
        if func not in _FILLS or kwargs.get("generator") is not None or args[0].device.type != "cpu":
            self._leave()
            return func(*args, **kwargs)
        asked = (func, args[0].shape, args[0].dtype, args[0].stride(), args[1:], dict(kwargs))
        if self.recording:
            filled = func(*args, **kwargs)
            drawn = filled.bool() if func is torch.ops.aten.bernoulli_.float else filled.clone()
            self.draws.append(_Draw(asked, drawn, torch.get_rng_state()))
            return filled
        if self.at < len(self.draws) and self.draws[self.at].asked == asked:
            self.at += 1
            return args[0].copy_(self.draws[self.at - 1].drawn)
        self._leave()
        return func(*args, **kwargs)

    def _leave(self) -> None:
        """From here on this point draws by itself, from where the stream would be."""
        if not self.recording and self.at:
            torch.set_rng_state(self.draws[self.at - 1].after)
        self.recording, self.at = False, None
