"""The progress bar of a training, on terminals and in notebooks."""

import sys
import time
from array import array
from typing import TYPE_CHECKING, Self

import numpy as np

from landscape.plotting.text import sparkline
from landscape.probe.live import in_notebook
from landscape.training.recipe import Recipe

if TYPE_CHECKING:  # The command line prints its help without torch.
    from landscape.probe.landscape_probe import LandscapeProbe

SECONDS = 0.2
"""Least time between two readings of the loss, which synchronize with the device."""
WIDTH = 10
"""Blocks of the range so far."""
LIVE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""Leaves room for them in 80 columns."""


class Progress:
    """Bar with the loss and the range.

    Args:
        recipe: Recipe that is trained.
        shown: True or False; None shows it on a terminal and in a notebook.
        live: True draws the range over the training so far, too.
    """

    def __init__(self, recipe: Recipe, shown: bool | None = None, live: bool = False) -> None:
        from tqdm.auto import tqdm

        shown = (sys.stderr.isatty() or in_notebook()) if shown is None else shown
        self.epochs, self.is_shown = recipe.epochs, shown
        form = LIVE_FORMAT if live else None
        self.bar = tqdm(desc=recipe.run_name, unit=" updates", disable=not shown, bar_format=form)
        self._read_at, self._ranges = 0.0, array("d") if live else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, probe: "LandscapeProbe") -> None:
        """Show the update that the probe has measured."""
        if not self.is_shown:
            return
        if not self.bar.n:  # A resumed run starts behind the updates of earlier processes.
            self.bar.n = self.bar.initial = probe.step - 1
        self.bar.total = self.epochs * (probe.options.steps_per_epoch or 0)
        if time.monotonic() - self._read_at > SECONDS and (row := probe.last()):
            self._read_at = time.monotonic()
            low, high = min(row["losses"]), max(row["losses"])
            span = f"{low:.4f} to {high:.4f}"
            if self._ranges is not None:
                self._ranges.append(high - low)
                span = f"{high - low:.3g} {sparkline(np.array(self._ranges), WIDTH)}"
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, range {span}", refresh=False)
        self.bar.update()
