"""Hooks on ``torch.autograd.backward``, which every ``loss.backward()`` calls, and ``torch.autograd.grad``."""

import functools
import threading
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
_layers: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
"""Functions that stand for torch's, with those that they stand for.

Others may put their own functions on top, and the next watcher comes on top of those.
"""


class _Inside(threading.local):
    """True in a function that stands for torch's."""

    value = False


_inside = _Inside()


def _backward_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.autograd.backward`` with watchers."""

    @functools.wraps(original)
    def watched(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        # A pass within a pass, as of checkpoints, is a part of it.
        if _inside.value or torch._C._current_graph_task_id() != -1:
            return original(tensors, grad_tensors, *args, **kwargs)
        backward, watchers = _backward_pass(tensors, grad_tensors), _alive()
        for watcher in watchers:
            watcher.begin(backward)
        running.append(backward)
        _inside.value = True
        try:
            original(backward.roots, grad_tensors, *args, **kwargs)
        finally:
            _inside.value = False
            running[:] = [other for other in running if other is not backward]
        for watcher in watchers:
            watcher.end(backward)

    return watched


def _grad_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.autograd.grad`` with watchers."""

    @functools.wraps(original)
    def watched(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _inside.value or torch._C._current_graph_task_id() != -1:
            return original(outputs, inputs, grad_outputs, *args, **kwargs)
        _inside.value = True
        try:
            gradients = original(outputs, inputs, grad_outputs, *args, **kwargs)
        finally:
            _inside.value = False
        if isinstance(gradients, tuple):
            backward = _backward_pass(outputs, grad_outputs)
            tensors = [inputs] if isinstance(inputs, Tensor | GradientEdge) else list(inputs)
            for watcher in _alive():
                watcher.note_gradients(backward, tensors, gradients)
        return gradients

    return watched


_WATCHED = {"backward": _backward_over, "grad": _grad_over}
"""Names of torch's functions, and what makes a function that stands for one."""


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
    unwatch_backward(watcher)
    _watchers.append(weakref.ref(watcher))
    for name, over in _WATCHED.items():
        present = getattr(torch.autograd, name)
        if all(present is not layer for layer, _ in _layers):
            _layers.append((over(present), present))
            setattr(torch.autograd, name, _layers[-1][0])


def unwatch_backward(watcher: BackwardWatcher) -> None:
    """Undo `watch_backward`; after the last watcher, torch's functions are restored."""
    _watchers[:] = [weakref.ref(other) for other in _alive() if other is not watcher]
    if _watchers:
        return
    for name in _WATCHED:
        for layer, original in reversed(tuple(_layers)):
            if getattr(torch.autograd, name) is layer:
                setattr(torch.autograd, name, original)
                _layers.remove((layer, original))  # Those below functions of others stay, and pass on their calls.
