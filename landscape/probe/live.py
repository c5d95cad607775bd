"""The live figure: a small picture in a notebook that follows the training."""

import sys
from typing import Any

import numpy as np

from landscape.errors import LandscapeError

SECONDS = 1.0
"""Least time between two pictures."""
POINTS = 400
"""Most points of the figure; neighbours are joined, the band keeps their extremes."""


class LiveFigure:
    """Sink that draws losses in a notebook.

    Raises:
        LandscapeError: This is no notebook.
    """

    seconds = SECONDS

    def __init__(self) -> None:
        if not in_notebook():
            raise LandscapeError(
                "live: requires a notebook with a kernel of IPython. In a terminal, use `landscape watch` on the trace."
            )
        from IPython.display import display

        self._steps: list[float] = []
        self._losses: list[tuple[float, float, float]] = []
        self._handle: Any = display(_picture([], []), display_id=True)

    def __call__(self, row: dict[str, Any]) -> None:
        """Keep the losses of a row."""
        self._steps.append(row["step"])
        self._losses.append((row["loss_min"], row["loss"], row["loss_max"]))
        if len(self._steps) > 2 * POINTS:
            self._steps, self._losses = joined(self._steps, self._losses)

    def flush(self) -> None:
        """Redraw the picture."""
        self._handle.update(_picture(self._steps, self._losses))


def joined(
    steps: list[float], losses: list[tuple[float, float, float]]
) -> tuple[list[float], list[tuple[float, float, float]]]:
    """Return every two points as one.

    Examples:
        >>> joined([0, 1, 2], [(1.0, 2.0, 3.0), (0.5, 1.0, 4.0), (1.0, 1.0, 1.0)])
        ([0, 2], [(0.5, 1.5, 4.0), (1.0, 1.0, 1.0)])
    """
    pairs = [losses[place : place + 2] for place in range(0, len(losses), 2)]
    return steps[::2], [
        (min(low), sum(line) / len(line), max(high)) for low, line, high in (zip(*pair, strict=True) for pair in pairs)
    ]


def in_notebook() -> bool:
    """Return True in a kernel of IPython."""
    shell = sys.modules.get("IPython")  # A kernel has imported it.
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def _picture(steps: list[float], losses: list[tuple[float, float, float]]) -> Any:
    """Return the figure, as an image that IPython shows."""
    # matplotlib is slow to import, and only a notebook draws here.
    from io import BytesIO

    from IPython.display import Image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.4), layout="constrained")
    axes = figure.subplots()
    low, line, high = np.array(losses, float).reshape(-1, 3).T
    axes.fill_between(steps, low, high, alpha=0.4, linewidth=0.5)
    axes.plot(steps, line, linewidth=1)
    axes.set(xlabel="update", ylabel="loss")
    if len(low) and min(np.nanmin(low), np.nanmin(line)) > 0:
        axes.set_yscale("log")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image(data=file.getvalue(), format="png")
