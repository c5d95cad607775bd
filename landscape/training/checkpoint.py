"""The state of a training, kept beside its trace from time to time, so that it can go on when it was killed."""

import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import BytesIO
from typing import Any

import torch

from landscape.distributed.group import RankGroup
from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, inside, reason
from landscape.traces.folder import CHECKPOINT
from landscape.traces.metadata import plain
from landscape.traces.writer import NullWriter, TraceWriter
from landscape.training.completed import check_same
from landscape.training.recipe import Recipe

VERSION = 1
"""Of the file's format."""
SHARE = 0.03
"""Most of the time that checkpoints may take; where they are dear, they are rarer."""


class Checkpoints:
    """The newest state of one run, as a file that ``torch.load(..., weights_only=True)`` reads.

    The file is there as a whole or not at all, and never ahead of the trace: it is written when the rows are. One that
    cannot be written leaves the one before it, and training goes on. Of several ranks, each has a state of its own; the
    first writes them all.

    Args:
        place: Where the run is recorded.
        trace: The run's trace.
        recipe: What is trained.
        ranks: The processes that train it; all of them call every method.
        seconds: At least so many seconds lie between two checkpoints.
    """

    def __init__(
        self, place: Location, trace: TraceWriter | NullWriter, recipe: Recipe, ranks: RankGroup, seconds: float
    ) -> None:
        self._path = inside(place, CHECKPOINT)
        self._trace, self._recipe, self._ranks, self._seconds = trace, recipe, ranks, seconds
        self._ended, self._took = time.monotonic(), 0.0
        self._told = False

    def due(self) -> bool:
        """Whether it is time for another one, by the clock of the first rank."""
        return self._ranks.broadcast_bool(time.monotonic() - self._ended >= max(self._seconds, self._took / SHARE))

    def keep(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Write what ``state`` gives in the place of the one before it."""
        began = time.monotonic()
        in_place = self._trace.flush()  # before all else: a state that is ahead of the trace would leave a gap in it
        own = state()
        states = (
            [own] if self._ranks.size == 1 else [_loaded(part) for part in self._ranks.all_gather_bytes(_saved(own))]
        )
        if in_place and self._ranks.is_writer:
            self._write({"version": VERSION, "recipe": plain(asdict(self._recipe)), "ranks": states})
        self._ended = time.monotonic()
        self._took = self._ended - began

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self._trace.write_file(CHECKPOINT, _saved(content))
        except OSError as error:
            self._tell(f"{self._path} cannot be written ({reason(error)}); training goes on.")

    def restore(self, load: Callable[[Mapping[str, Any]], None]) -> bool:
        """Hand this rank's newest state to ``load``; False if there is none.

        Raises:
            LandscapeError: The file is damaged, or of another run.
        """
        content = self._ranks.all_gather_bytes(self._ranks.run_on_all(self._newest))[0]
        if not content:
            return False
        try:
            load(self._own_state(content))
        except LandscapeError:
            raise
        except Exception as error:  # whatever a damaged file or another program's leads to
            raise LandscapeError(
                f"{self._path} cannot be gone on from ({reason(error)}); remove it, and the run starts anew."
            ) from error
        return True

    def _newest(self) -> bytes:
        content = self._trace.read_file(CHECKPOINT)
        if content == b"":
            raise LandscapeError(f"{self._path} is empty; remove it, and the run starts anew.")
        return content or b""

    def _own_state(self, content: bytes) -> Mapping[str, Any]:
        with zipfile.ZipFile(BytesIO(content)) as file:
            if damaged := file.testzip():  # torch does not compare check sums
                raise ValueError(f"{damaged} in it is damaged")
        saved = _loaded(content)
        if saved["version"] > VERSION:
            raise LandscapeError(
                f"{self._path} has format {saved['version']}, and {VERSION} is known here: upgrade landscape."
            )
        check_same(self._recipe, saved["recipe"], self._path)
        return saved["ranks"][self._ranks.rank]

    def discard(self) -> None:
        """Remove the one of a run that has ended."""
        try:
            self._trace.delete_file(CHECKPOINT)
        except OSError as error:
            self._tell(f"{self._path} cannot be removed ({reason(error)}); with it the run counts as unfinished.")

    def _tell(self, trouble: str) -> None:
        if not self._told:
            warnings.warn(trouble, stacklevel=2)
        self._told = True


def _saved(content: Mapping[str, Any]) -> bytes:
    file = BytesIO()
    torch.save(dict(content), file)
    return file.getvalue()


def _loaded(content: bytes) -> dict[str, Any]:
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
