"""Hooks around an optimizer's step: once per update, after all other hooks."""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Closure = Callable[[], Any]


class StepHooks:
    """Calls ``before`` and ``after`` around each update of an optimizer.

    A step may call another one (``super().step()`` in a subclass), which is the same update, and may fail, so that its
    end is never seen::

        step()                              before(closure)
            super().step()                  nothing
        the parameters are written          after()

    Args:
        optimizer: The optimizer that makes the updates.
        before: Takes the closure that the step was given, or None, and returns one that replaces it, or None.
        after: Called once the step is made.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[Closure | None], Closure | None],
        after: Callable[[], None],
    ) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._depth = 0
        """Number of steps within each other."""
        self._frame: FrameType | None = None
        """Frame of the outermost step."""
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks."""
        after: Any = torch.compiler.disable(self._after_step)
        self._handles = [self._optimizer.register_step_post_hook(after), self._register_before()]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def attached(self) -> bool:
        """True between `attach` and `detach`."""
        return bool(self._handles)

    def move_last(self) -> None:
        """Register again, behind hooks that may change the gradient."""
        if self.attached and self.are_followed():
            self._handles.pop().remove()
            self._handles.append(self._register_before())

    def are_followed(self) -> bool:
        """Return True if hooks of others run later."""
        hooks = list(self._optimizer._optimizer_step_pre_hooks.values())  # torch has no public way to ask
        owners = [getattr(inspect.unwrap(hook), "__self__", None) for hook in hooks]
        return self in owners and not all(isinstance(one, StepHooks) for one in owners[owners.index(self) :])

    def _register_before(self) -> RemovableHandle:
        before: Any = torch.compiler.disable(self._before_step)
        return self._optimizer.register_step_pre_hook(before)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._depth and all(frame is not self._frame for frame in _callers()):
            self._depth = 0  # the previous step has failed
        self._depth += 1
        if self._depth > 1:
            return None
        self._frame = next(_callers())
        replaced = self._before(args[1] if len(args) > 1 else kwargs.get("closure"))
        if replaced is None:
            return None
        return (args[0], replaced), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth, self._frame = 0, None
            self._after()


def find_grad_scaler() -> Any:
    """Return the loss scaler that has called the optimizer."""
    for frame in _callers():
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
    return None


def call_after_first(closure: Closure, then: Callable[[], None]) -> Closure:
    """Return the closure with ``then`` called after its first call."""
    pending = [then]

    def followed() -> Any:
        result = closure()
        while pending:
            pending.pop()()
        return result

    return followed


def _callers() -> Iterator[FrameType]:
    """Yield the frames around a hook, the optimizer's step first."""
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
            yield frame
        frame = frame.f_back
