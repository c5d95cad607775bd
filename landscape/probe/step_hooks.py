"""Hooks around the steps of an update's optimizers: once per update, after all other hooks."""

import gc
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.utils.hooks import RemovableHandle

from landscape.distributed.devices import stacked

Closure = Callable[[], Any]


class StepHooks:
    """Calls functions around updates: a step of each optimizer.

    A step may call another one (``super().step()`` in a subclass), which is the same update, and may fail, so that its
    end is never seen::

        muon.step()                         before(closure)
            super().step()                  nothing
        parameters are written              nothing
        adamw.step()                        between(adamw)
        parameters are written              after([])

    If an optimizer makes no step, the update ends with the next forward pass, or the next step of another one.

    Args:
        optimizers: The optimizers that make the updates, in any order.
        before: Called at the first step. Takes the closure that the step was given, or None, and returns one that
            replaces it, or None.
        between: Called at the other steps, with their optimizer.
        after: Called once the steps are made, with the optimizers that made none.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callable[[Closure | None], Closure | None],
        between: Callable[[torch.optim.Optimizer], None],
        after: Callable[[Sequence[torch.optim.Optimizer]], None],
    ) -> None:
        self._optimizers, self._before, self._between, self._after = optimizers, before, between, after
        self._stepped: list[torch.optim.Optimizer] = []
        """Optimizers that have made their step of the update."""
        self._skips: list[Tensor] = []
        """Numbers that are not 0 if one of them skips its step, on its device."""
        self._depth = 0
        """Number of steps within each other."""
        self._frame: FrameType | None = None
        """Frame of the outermost step."""
        self._handles: list[RemovableHandle] = []
        self._handles_before: list[RemovableHandle] = []
        """Handles of the hooks before steps, in the order of the optimizers."""

    def attach(self) -> None:
        """Register the hooks."""
        after: Any = torch.compiler.disable(self._after_step)
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in self._optimizers]
        self._handles_before = [self._register_before(optimizer) for optimizer in self._optimizers]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in (*self._handles, *self._handles_before):
            handle.remove()
        self._handles, self._handles_before = [], []

    @property
    def attached(self) -> bool:
        """True between `attach` and `detach`."""
        return bool(self._handles)

    def skipped(self) -> Tensor | None:
        """Return a tensor, not 0 if the update was skipped.

        It is on a device; None if the host knows that the update was made.
        """
        return stacked(self._skips).sum() if self._skips else None

    def end_unfinished(self) -> None:
        """End an update in which an optimizer made no step."""
        if self._stepped and not self._is_within_step():
            self._depth = 0
            self._end()

    def _is_within_step(self) -> bool:
        """Return True within a step, not after a failed one."""
        return self._depth > 0 and any(frame is self._frame for frame in _callers())

    def move_last(self) -> None:
        """Register again, behind hooks that may change the gradient."""
        for place, optimizer in enumerate(self._optimizers if self.attached else ()):
            if self._is_followed(optimizer):
                self._handles_before[place].remove()
                self._handles_before[place] = self._register_before(optimizer)

    def are_followed(self) -> bool:
        """Return True if hooks of others run later."""
        return any(map(self._is_followed, self._optimizers))

    def _is_followed(self, optimizer: torch.optim.Optimizer) -> bool:
        owners = _owners(optimizer)
        return self in owners and not all(
            isinstance(one, StepHooks | EntryReminder) for one in owners[owners.index(self) :]
        )

    def _register_before(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        before: Any = torch.compiler.disable(self._before_step)
        return optimizer.register_step_pre_hook(before)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._is_within_step():
            self._depth = 0  # the previous step may have failed
        self._depth += 1
        if self._depth > 1:
            return None
        self._frame = next(_callers())
        # GradScaler passes it to a fused optimizer, which then decides on the device.
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        skips = [] if found is None else [found]
        if any(optimizer is other for other in self._stepped):
            self._end()
        if self._stepped:
            self._skips += skips
            return self._between(optimizer)
        self._skips = skips
        replaced = self._before(args[1] if len(args) > 1 else kwargs.get("closure"))
        if replaced is None:
            return None
        return (args[0], replaced), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._depth, self._frame = 0, None
            self._stepped.append(optimizer)
            if len(self._stepped) == len(self._optimizers):
                self._end()

    def _end(self) -> None:
        """End the update."""
        missing = [one for one in self._optimizers if all(one is not other for other in self._stepped)]
        self._stepped = []
        self._after(missing)


class EntryReminder:
    """Warns once if optimizers step before their probe is attached.

    It does not keep the probe alive, and says nothing about one that is gone, or beside another one that is attached.

    Args:
        probe: The probe, not attached yet.
        optimizers: Its optimizers.
    """

    def __init__(self, probe: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._probe: weakref.ref[Any] | None = weakref.ref(probe)
        """The probe, or None once nothing is left to say."""
        remind: Any = torch.compiler.disable(self._remind)
        self._handles = [optimizer.register_step_pre_hook(remind) for optimizer in optimizers]

    def remove(self) -> None:
        """Remove the hooks, before or after a step.

        During a step torch iterates over them.
        """
        self._probe = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _remind(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        probe, self._probe = self._probe, None
        if probe is None or any(isinstance(owner, StepHooks) for owner in _owners(optimizer)):
            return
        gc.collect()  # A probe that nobody holds may still be in cycles.
        if probe() is not None:
            warnings.warn(
                "The optimizer steps, but its LandscapeProbe is not attached: the update is not recorded. Write `with "
                "probe:` around the loop, or call probe.attach().",
                stacklevel=_level_of_user(),
            )


def _owners(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the owners of the hooks before a step.

    It is None for a function.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()  # torch has no public way to ask
    return [getattr(inspect.unwrap(hook), "__self__", None) for hook in hooks]


def find_grad_scaler() -> Any:
    """Return the loss scaler that has called the optimizer."""
    for frame in _callers():
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
    return None


def gradient_scale(optimizer: torch.optim.Optimizer, scaler: Any) -> Tensor | None:
    """Return the factor of gradients, or None for 1.

    Args:
        optimizer: An optimizer of the update.
        scaler: The ``GradScaler`` that makes the first step, if there is one.
    """
    # A fused optimizer divides gradients by the loss scale in its kernel; GradScaler passes the scale this way.
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:
        return scale
    # GradScaler divides the gradients of each optimizer just before its step.
    states = getattr(scaler, "_per_optimizer_states", None)
    is_scaled = states is not None and (id(optimizer) not in states or states[id(optimizer)]["stage"] is OptState.READY)
    return scaler._scale if is_scaled else None


def call_after_first(closure: Closure, then: Callable[[], None]) -> Closure:
    """Return the closure with ``then`` called after its first call."""
    pending = [then]

    def followed() -> Any:
        result = closure()
        while pending:
            pending.pop()()
        return result

    return followed


def _level_of_user() -> int:
    """Return the ``stacklevel`` at which a warning names the loop."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "landscape.")):
        frame, level = frame.f_back, level + 1
    return level


def _callers() -> Iterator[FrameType]:
    """Yield the frames around a hook, the optimizer's step first."""
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
            yield frame
        frame = frame.f_back
