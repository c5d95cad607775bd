"""Hooks on ``torch.autograd.backward``, which every ``loss.backward()`` calls, and ``torch.autograd.grad``."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from landscape.probe.composition import Composition
from landscape.ray.objective import LossTerm


@dataclass(eq=False)
class BackwardPass:
    """A backward pass, with findings by watchers' keys.

    Attributes:
        roots: The differentiated tensors or graph edges.
        factors: The gradient given for each root; None is 1.
        versions: Versions of the gradients before the pass, of watchers whose update is due.
        compositions: Composition of the roots; None if they depend on no captured loss.
        terms: Losses that the pass has gone through, with the gradient that reached them.
        slots: Places of the roots in the recorded calls.
    """

    roots: Sequence[Any]
    factors: Sequence[Tensor | None]
    versions: dict[str, list[Any]] = field(default_factory=dict)
    compositions: dict[str, Composition | None] = field(default_factory=dict)
    terms: dict[str, list[tuple[LossTerm, Tensor]]] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)


class BackwardWatcher(Protocol):
    """An object that is called around each backward pass."""

    def begin(self, backward: BackwardPass) -> None: ...  # noqa: D102

    def end(self, backward: BackwardPass) -> None: ...  # noqa: D102

    def note_gradients(self, backward: BackwardPass, inputs: Sequence[Any], gradients: Sequence[Any]) -> None: ...  # noqa: D102


running: list[BackwardPass] = []
"""Backward passes in progress, several if several threads train."""
_watchers: list[weakref.ref[BackwardWatcher]] = []
"""They are freed with the probe, also if it was never detached."""
_original: Callable[..., Any] = torch.autograd.backward
"""The function that was ``torch.autograd.backward`` before the first watcher."""
_original_grad: Callable[..., Any] = torch.autograd.grad


@functools.wraps(torch.autograd.backward)
def _watched_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # A pass within a pass, as of checkpoints, is a part of it.
        return _original(tensors, grad_tensors, *args, **kwargs)
    backward, watchers = _backward_pass(tensors, grad_tensors), _alive()
    for watcher in watchers:
        watcher.begin(backward)
    running.append(backward)
    try:
        _original(backward.roots, grad_tensors, *args, **kwargs)
    finally:
        running[:] = [other for other in running if other is not backward]
    for watcher in watchers:
        watcher.end(backward)


@functools.wraps(torch.autograd.grad)
def _watched_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    gradients = _original_grad(outputs, inputs, grad_outputs, *args, **kwargs)
    if torch._C._current_graph_task_id() == -1 and isinstance(gradients, tuple):
        backward = _backward_pass(outputs, grad_outputs)
        tensors = [inputs] if isinstance(inputs, Tensor | GradientEdge) else list(inputs)
        for watcher in _alive():
            watcher.note_gradients(backward, tensors, gradients)
    return gradients


def _alive() -> list[BackwardWatcher]:
    return [watcher for reference in _watchers if (watcher := reference()) is not None]


def _backward_pass(tensors: Any, factors: Any) -> BackwardPass:
    roots = [tensors] if isinstance(tensors, Tensor | GradientEdge) else list(tensors)
    return BackwardPass(roots, [factors] if isinstance(factors, Tensor) else [*(factors or [None] * len(roots))])


def watch_backward(watcher: BackwardWatcher) -> None:
    """Call the watcher around backward passes.

    It also gets the gradients that ``torch.autograd.grad`` returns.

    Hooks on losses do not suffice: in autograd's graph, no path leads from a loss to a tensor computed from it.
    """
    global _original, _original_grad
    unwatch_backward(watcher)
    _watchers.append(weakref.ref(watcher))
    if torch.autograd.backward is not _watched_backward:
        _original, torch.autograd.backward = torch.autograd.backward, _watched_backward
    if torch.autograd.grad is not _watched_grad:
        _original_grad, torch.autograd.grad = torch.autograd.grad, _watched_grad


def unwatch_backward(watcher: BackwardWatcher) -> None:
    """Undo `watch_backward`; after the last watcher, torch's functions are restored."""
    _watchers[:] = [weakref.ref(other) for other in _alive() if other is not watcher]
    if not _watchers and torch.autograd.backward is _watched_backward:
        torch.autograd.backward = _original
    if not _watchers and torch.autograd.grad is _watched_grad:
        torch.autograd.grad = _original_grad
