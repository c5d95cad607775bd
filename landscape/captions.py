"""The words under a figure: what was measured, on what, and how it was joined."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

DIRECTIONS = {"gradient": "the gradient", "update": "the optimizer's update"}
MODES = {"training": ", in training mode (batch statistics)", "evaluation": ", in evaluation mode (running statistics)"}


def caption(frame: pd.DataFrame, points: int) -> str:
    """Say what a figure shows: step sizes, batch, statistics, runs and how they are joined, and what is not finite.

    Args:
        frame: The rows that are drawn, with a column ``band``.
        points: Most points that a band is drawn with.
    """
    return " ".join([_probes(frame), _runs(frame), _updates(frame, points), _not_finite(frame)]).strip()


def _probes(frame: pd.DataFrame) -> str:
    batch = _only(frame, "batch_size")
    samples = f" of {batch:,} samples" if isinstance(batch, int | np.integer) else ""
    direction = DIRECTIONS.get(_only(frame, "direction"), "the probed direction")
    return (
        f"Band: smallest to largest loss at {_step_sizes(frame)}, along {direction}, on the batch{samples} of each "
        f"probed update{MODES.get(_only(frame, 'mode'), '')}. Line: the loss before the step, at step size 0."
    )


def _step_sizes(frame: pd.DataFrame) -> str:
    """The step sizes if all updates share them, or the shared multiples of the learning rate, or else the range."""
    lists = pa.Table.from_pandas(pd.DataFrame(frame["step_sizes"])).column(0).combine_chunks()
    sizes, counts = lists.flatten().to_numpy(), lists.value_lengths().to_numpy(zero_copy_only=False)
    if (counts == counts[0]).all():
        rows = sizes.reshape(len(frame), -1)
        if (rows == rows[0]).all():
            return f"step sizes {_enumeration(rows[0])}"
        multiples = rows / frame[["lr"]].to_numpy()
        if np.allclose(multiples, multiples[0]):
            return f"{_enumeration(multiples[0])} times the learning rate"
    return f"step sizes from {sizes.min():.4g} to {sizes.max():.4g}"


def _enumeration(values: Sequence[float] | np.ndarray) -> str:
    words = [f"{value:.4g}" for value in values]
    return ", ".join(words if len(words) <= 4 else [*words[:2], "…", words[-1]])


def _runs(frame: pd.DataFrame) -> str:
    """How many runs a band joins; they are seeds only if no two of them have the same."""
    bands = frame.groupby("band", observed=True)
    runs = list(bands["run"].nunique()) if "run" in frame else [1]
    word = "seed" if "seed" in frame and list(bands["seed"].nunique()) == runs else "run"
    if max(runs) == 1:
        return f"One {word} per band."
    number = f"{max(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    return f"{number} {word}s per band, joined: the band spans all of them and the line is their mean."


def _updates(frame: pd.DataFrame, points: int) -> str:
    steps = frame["step"].unique()
    sizes = frame.groupby([name for name in ("band", "run") if name in frame], observed=True).size().to_numpy()
    least, most = sizes.min(), sizes.max()
    number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    binned = f", drawn at {points:,} points that keep every extreme" if len(steps) > points else ""
    return f"Updates probed in each run: {number}{binned}."


def _not_finite(frame: pd.DataFrame) -> str:
    finite = np.isfinite(frame[["loss", "loss_min", "loss_max"]].to_numpy()).all(axis=1)
    return (
        "" if finite.all() else f"At {(~finite).sum():,} updates a loss was NaN or infinite, and the drawing has a gap."
    )


def _only(frame: pd.DataFrame, fact: str) -> Any:
    """The value of a fact if all rows share it."""
    values = list(frame[fact].unique()) if fact in frame else []
    return values[0] if len(values) == 1 and not pd.isna(values[0]) else None
