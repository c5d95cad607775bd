"""Destination of traces, and the data and device to train with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from landscape.errors import LandscapeError
from landscape.training.recipe import Recipe

if TYPE_CHECKING:  # The module imports pyarrow, which --help does not need.
    from landscape.storage.filesystem import Location


@dataclass(frozen=True)
class TraceTarget:
    """Destination of traces, and treatment of existing ones.

    Attributes:
        out: Folder of traces, or a URL such as ``s3://bucket/traces``.
        data_dir: Folder of data files; None is the user's cache.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; None is the GPU if there is one.
        overwrite: Replace runs of the same name.
        resume: Continue unfinished runs of the same name, and keep finished ones.
        checkpoint_seconds: Minimum time between two checkpoints, in seconds.

    Raises:
        LandscapeError: ``resume`` and ``overwrite`` are both true, or ``checkpoint_seconds`` is negative or NaN.

    Examples:
        >>> from landscape import RECIPES
        >>> print(TraceTarget("traces", resume=True).location(RECIPES["digits"]))
        traces/digits-batch-seed0
    """

    out: "Location" = "traces"
    data_dir: str | Path | None = None
    device: str | None = None
    overwrite: bool = False
    resume: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise LandscapeError(
                "resume=True with overwrite=True: must not be combined. Use resume to continue unfinished runs, or "
                "overwrite to replace them."
            )
        if not self.checkpoint_seconds >= 0:  # true for NaN, too
            raise LandscapeError(
                f"checkpoint_seconds={self.checkpoint_seconds}: must be a number of seconds from 0 on."
            )

    def location(self, recipe: Recipe) -> "Location":
        """Return the folder or URL of the recipe's run."""
        from landscape.storage.address import inside

        return inside(self.out, recipe.run_name)
