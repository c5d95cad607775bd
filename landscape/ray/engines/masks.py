"""Random numbers along a ray, drawn once for all points, because every point draws the same."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FILLS = {torch.ops.aten.bernoulli_.float, torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default}
"""What fills a tensor with numbers that depend on nothing but the stream; dropout is made of the first of them."""

OTHER_NUMBERS = "its random numbers would not be those of the training step"


@dataclass
class _Draw:
    """One fill: what was asked for, what came out, and the states of the stream before and after it."""

    asked: tuple[Any, ...]
    drawn: Tensor
    before: Tensor
    after: Tensor


class SharedDraws(TorchDispatchMode):
    """Replays at later points what an earlier one drew from torch's stream on the CPU.

    Drawing takes a CPU longer than copying: see the transformers with and without dropout in ``benchmarks.rays``.
    A draw is replayed if it asks for the same, from the same state of the stream, and it leaves the same state behind.

    Args:
        laid_out: Whether tensors of images may have another layout than the model gives them by itself. Numbers are
            drawn in the order of memory, so drawing on such a tensor is a RuntimeError.
        devices: Accelerators, which may draw too.
    """

    def __init__(self, laid_out: bool = False, devices: Iterable[torch.device] = ()) -> None:
        super().__init__()
        self.laid_out, self.devices = laid_out, list(devices)
        self.draws: list[_Draw] = []
        self.at = 0
        """Number of draws so far at this point."""
        self.moves: bool | None = None
        """Whether points draw anything at all; None before the first, which finds it out."""
        self.checked = not laid_out
        """Whether a point has been looked at, draw by draw."""

    @contextmanager
    def point(self) -> Iterator[None]:
        """Around the evaluation of a point."""
        before = self._streams() if self.moves is None else None
        self.at = 0
        with self if self.moves else nullcontext():
            yield
        if before is not None:
            self.moves = not all(map(torch.equal, before, self._streams()))
        else:
            self.checked = True

    def conclude(self) -> None:
        """A RuntimeError if points have drawn, and none of them could be looked at."""
        if self.moves and not self.checked:
            raise RuntimeError(OTHER_NUMBERS)

    def _streams(self) -> list[Tensor]:
        accelerators = self.devices if self.laid_out else []
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in accelerators)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        if self.laid_out and any(map(_is_laid_out, args)):
            raise RuntimeError(OTHER_NUMBERS)
        if func not in _FILLS or kwargs.get("generator") is not None or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        return self._filled(func, args, kwargs)

    def _filled(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        asked = (func, args[0].shape, args[0].dtype, args[0].stride(), args[1:], dict(kwargs))
        before, self.at = torch.get_rng_state(), self.at + 1
        known = self.draws[self.at - 1] if self.at <= len(self.draws) else None
        if known is not None and known.asked == asked and torch.equal(known.before, before):
            torch.set_rng_state(known.after)
            return args[0].copy_(known.drawn)
        filled = func(*args, **kwargs)
        if known is None:
            drawn = filled.bool() if func is torch.ops.aten.bernoulli_.float else filled.clone()
            self.draws.append(_Draw(asked, drawn, before, torch.get_rng_state()))
        return filled


def _is_laid_out(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in (4, 5) and not value.is_contiguous()


def draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers: one that is made to, but for attention that drops nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True
