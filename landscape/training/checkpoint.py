"""Checkpoints of a training, written beside its trace to resume it after a kill."""

import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import torch

from landscape.distributed.group import RankGroup
from landscape.errors import LandscapeError
from landscape.storage.address import Location, inside
from landscape.storage.filesystem import reason
from landscape.traces.folder import TraceFolder
from landscape.traces.metadata import plain
from landscape.traces.writer import TraceWriter
from landscape.training.completed import check_same
from landscape.training.recipe import Recipe

FORMAT_VERSION = 1
MAX_SHARE = 0.03
"""Largest share of the time that checkpoints take; slow checkpoints are written less often."""


class Checkpoints:
    """Newest checkpoint of a run, a file for ``torch.load(weights_only=True)``.

    The file is written atomically, and after the rows of the trace, so it is never ahead of the trace. If it cannot be
    written, the previous checkpoint stays and training continues. With several ranks, each has its own state; the first
    rank writes all states.

    Args:
        location: Folder or URL of the run.
        trace: Trace of the run.
        recipe: Recipe that is trained, resolved.
        ranks: Processes that train it; each of them calls every method.
        seconds: Minimum time between two checkpoints, in seconds.
    """

    def __init__(
        self, location: Location, trace: TraceWriter, recipe: Recipe, ranks: RankGroup, seconds: float
    ) -> None:
        self._path = inside(location, TraceFolder.CHECKPOINT)
        self._trace, self._recipe, self._ranks, self._seconds = trace, recipe, ranks, seconds
        self._ended, self._took = time.monotonic(), 0.0
        self._warned = False

    def due(self) -> bool:
        """Return True if a checkpoint is due on rank 0."""
        return self._ranks.broadcast_bool(time.monotonic() - self._ended >= max(self._seconds, self._took / MAX_SHARE))

    def save(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Replace the checkpoint by the result of ``state``."""
        began = time.monotonic()
        # The rows are written first, because a checkpoint ahead of the trace would leave a gap in it when resumed.
        flushed = self._trace.flush()
        own = state()
        states = [own]
        if self._ranks.size > 1:
            states = [_from_bytes(part) for part in self._ranks.all_gather_bytes(_to_bytes(own))]
        if flushed and self._ranks.is_writer:
            self._write({"version": FORMAT_VERSION, "recipe": plain(self._recipe.metadata()), "ranks": states})
        self._ended = time.monotonic()
        self._took = self._ended - began

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self._trace.write_file(TraceFolder.CHECKPOINT, _to_bytes(content))
        except OSError as error:
            self._warn_once(f"{self._path}: cannot be written ({reason(error)}). Training continues without it.")

    def restore(self, load: Callable[[Mapping[str, Any]], None]) -> bool:
        """Pass this rank's checkpoint to ``load``; return False without one.

        Raises:
            LandscapeError: The file is damaged, or belongs to another run.
        """
        content = self._ranks.all_gather_bytes(self._ranks.run_on_all(self._read))[0]
        if not content:
            return False
        try:
            load(self._own_state(content))
        except LandscapeError:
            raise
        except Exception as error:  # A damaged or foreign file can raise any exception.
            raise LandscapeError(
                f"{self._path}: cannot be loaded ({reason(error)}). Remove it to restart the run."
            ) from error
        return True

    def _read(self) -> bytes:
        content = self._trace.read_file(TraceFolder.CHECKPOINT)
        if content == b"":
            raise LandscapeError(f"{self._path}: is empty. Remove it to restart the run.")
        return content or b""

    def _own_state(self, content: bytes) -> Mapping[str, Any]:
        with zipfile.ZipFile(BytesIO(content)) as file:  # torch.load does not verify the checksums.
            if damaged := file.testzip():
                raise ValueError(f"its entry {damaged} is damaged")
        saved = _from_bytes(content)
        if saved["version"] > FORMAT_VERSION:
            raise LandscapeError(
                f"{self._path}: has format version {saved['version']}, but this landscape reads up to "
                f"{FORMAT_VERSION}. Upgrade landscape-probe."
            )
        check_same(self._recipe, saved["recipe"], self._path)
        return saved["ranks"][self._ranks.rank]

    def discard(self) -> None:
        """Remove the checkpoint of a complete run."""
        try:
            self._trace.delete_file(TraceFolder.CHECKPOINT)
        except OSError as error:
            self._warn_once(
                f"{self._path}: cannot be removed ({reason(error)}). Remove it, or the run counts as unfinished."
            )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, stacklevel=2)
        self._warned = True


def _to_bytes(content: Mapping[str, Any]) -> bytes:
    file = BytesIO()
    torch.save(dict(content), file)
    return file.getvalue()


def _from_bytes(content: bytes) -> dict[str, Any]:
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
