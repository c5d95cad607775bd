"""A hook on ``torch.autograd.backward``, which every ``loss.backward()`` calls."""

import functools
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
    """

    roots: Sequence[Any]
    factors: Sequence[Tensor | None]
    versions: dict[str, list[Any]] = field(default_factory=dict)
    compositions: dict[str, Composition | None] = field(default_factory=dict)
    terms: dict[str, list[tuple[LossTerm, Tensor]]] = field(default_factory=dict)


class BackwardWatcher(Protocol):
    """An object that is called around each backward pass."""

    def begin(self, backward: BackwardPass) -> None: ...  # noqa: D102

    def end(self, backward: BackwardPass) -> None: ...  # noqa: D102


running: list[BackwardPass] = []
"""Backward passes in progress, several if several threads train."""
_watchers: list[BackwardWatcher] = []
_original: Callable[..., Any] = torch.autograd.backward
"""The function that was ``torch.autograd.backward`` before the first watcher."""


@functools.wraps(torch.autograd.backward)
def _watched_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # A pass within a pass, as of checkpoints, is a part of it.
        return _original(tensors, grad_tensors, *args, **kwargs)
    roots: Any = [tensors] if isinstance(tensors, Tensor | GradientEdge) else list(tensors)
    factors = [grad_tensors] if isinstance(grad_tensors, Tensor) else [*(grad_tensors or [None] * len(roots))]
    backward, watchers = BackwardPass(roots, factors), tuple(_watchers)
    for watcher in watchers:
        watcher.begin(backward)
    running.append(backward)
    try:
        _original(roots, grad_tensors, *args, **kwargs)
    finally:
        running[:] = [other for other in running if other is not backward]
    for watcher in watchers:
        watcher.end(backward)


def watch_backward(watcher: BackwardWatcher) -> None:
    """Call ``begin`` and ``end`` of the watcher around backward passes.

    Hooks on losses do not suffice: in autograd's graph, no path leads from a loss to a tensor computed from it.
    """
    global _original
    unwatch_backward(watcher)
    _watchers.append(watcher)
    if torch.autograd.backward is not _watched_backward:
        _original, torch.autograd.backward = torch.autograd.backward, _watched_backward


def unwatch_backward(watcher: BackwardWatcher) -> None:
    """Undo `watch_backward`; after the last watcher, torch's function is restored."""
    _watchers[:] = [other for other in _watchers if other is not watcher]
    if not _watchers and torch.autograd.backward is _watched_backward:
        torch.autograd.backward = _original
