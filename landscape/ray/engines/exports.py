"""A watch on methods by which values leave torch without the dispatcher."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

_EXPORTS = ("numpy", "tolist")
"""Methods by which values leave torch without the dispatcher."""


class ExportWatcher(Protocol):
    """An object that is told of values that leave torch."""

    def note_export(self, tensor: Tensor) -> None: ...  # noqa: D102


_watching: list[ExportWatcher] = []


def watch_exports(recorder: ExportWatcher) -> None:
    """Call ``note_export`` of the recorder before values leave torch."""
    if not _watching:
        for name in _EXPORTS:
            setattr(Tensor, name, _watched_export(name))
    if not any(other is recorder for other in _watching):
        _watching.append(recorder)


def unwatch_exports(recorder: ExportWatcher) -> None:
    """Undo `watch_exports`; after the last recorder, torch's methods are restored."""
    was_watching, _watching[:] = bool(_watching), [other for other in _watching if other is not recorder]
    if was_watching and not _watching:
        for name in _EXPORTS:
            delattr(Tensor, name)


def _watched_export(name: str) -> Callable[..., Any]:
    original = getattr(torch._C.TensorBase, name)

    @wraps(original)
    def export(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        for recorder in tuple(_watching):
            recorder.note_export(tensor)
        return original(tensor, *args, **kwargs)

    return export
