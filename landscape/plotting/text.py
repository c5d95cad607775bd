"""Runs as lines of text, for terminals."""

import numpy as np
import pandas as pd

from landscape.analysis.measures import has_inputs, measured

BLOCKS = "▁▂▃▄▅▆▇█"
FIXED = 46
"""Columns of a line beside its name and its sparkline."""


def sparkline(values: np.ndarray, width: int) -> str:
    """Return the values as blocks, logarithmic, largest per column.

    A value that is not finite is ``!``; a block of the lowest height is the smallest value.

    Examples:
        >>> sparkline(np.array([1.0, 10.0, 100.0, np.nan]), 4)
        '▁▅█!'
    """
    parts = np.array_split(np.asarray(values, float), max(min(width, len(values)), 1))
    columns = np.array([part.max() if part.size else np.nan for part in parts])
    with np.errstate(all="ignore"):
        heights = np.log(np.maximum(columns, np.finfo(float).tiny))
    finite = np.isfinite(columns) & (columns > 0)
    low, high = (heights[finite].min(), heights[finite].max()) if finite.any() else (0.0, 0.0)
    level = np.zeros(len(columns), int)
    if high > low:
        level[finite] = np.rint((heights[finite] - low) / (high - low) * (len(BLOCKS) - 1))
    return "".join(BLOCKS[at] if np.isfinite(column) else "!" for at, column in zip(level, columns, strict=True))


def text_lines(frame: pd.DataFrame, width: int = 80) -> list[str]:
    """Return a line of text per run.

    Args:
        frame: Rows of ``read_traces``.
        width: Number of columns of the terminal.

    Returns:
        The lines. The sparkline is the range of the losses over the run, on a logarithmic scale.

    Examples:
        >>> frame = pd.DataFrame({"run": "a", "step": [0, 1], "loss": [2.0, 1.0], "losses": [[2.0, 1.0], [1.0, 0.9]],
        ...                       "step_sizes": [[0.1, 0.2]] * 2})
        >>> text_lines(frame, 60)
        ['a  step 1  loss 1  range 0.1  █▁']
    """
    frame = measured(frame, "range")
    if has_inputs(frame, "lost_share").any():
        frame = measured(frame, "lost_share")
    names = [str(name) for name in frame["run"].unique()]
    length = min(max(map(len, names), default=0), max(width // 3, 8))
    groups = frame.groupby("run", observed=True, sort=False)
    return [_line(str(name)[-length:].ljust(length), rows, width) for name, rows in groups]


def _line(name: str, rows: pd.DataFrame, width: int) -> str:
    last = rows.iloc[-1]
    share = f"  lost {last['lost_share']:.2g}" if "lost_share" in rows and np.isfinite(last["lost_share"]) else ""
    text = f"{name}  step {last['step']}  loss {last['loss']:.3g}  range {last['range']:.2g}{share}  "
    return text + sparkline(rows["range"].to_numpy(float), max(width - max(len(text), len(name) + FIXED), 8))
