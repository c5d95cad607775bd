"""Tasks of ``benchmarks.trace_store``: ``python -m benchmarks.trace_store_tasks TASK FOLDER ROWS`` runs one.

Each runs in a separate process without torch, so that the peak memory is that of the task.
"""

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from landscape.analysis.summary import summarize
from landscape.plotting.figure import save_figure
from landscape.plotting.landscape import plot_landscape
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.writer import TraceWriter

STEP_SIZES = [0.1 * k for k in range(1, 9)]
FLUSH_ROWS = 1000
ROWS_PER_RUN = 200
Cost = dict[str, float]
"""Measured quantities by name."""


def rows(number: int) -> Iterator[dict[str, Any]]:
    """Yield updates with 8 losses and 8 gradient distances each."""
    for step in range(number):
        loss = 0.1 + 2 * math.exp(-5 * step / number)
        noise = 1.5 + math.sin(step * step)
        yield {
            "step": step,
            "epoch": step / 1000,
            "lr": 0.4,
            "loss": loss,
            "grad_norm": loss,
            "slope": loss * loss,
            "direction_norm": loss,
            "step_sizes": STEP_SIZES,
            "losses": [loss * (1 + eta * noise) for eta in STEP_SIZES],
            "gradient_distances": [loss * eta * noise for eta in STEP_SIZES],
            "seconds": 0.01,
        }


def _time_appends(number: int, append: Callable[[dict[str, Any]], object]) -> Cost:
    """Time appending rows, without the time to generate them."""
    total = worst = 0.0
    for row in rows(number):
        start = time.perf_counter()
        append(row)
        seconds = time.perf_counter() - start
        total, worst = total + seconds, max(worst, seconds)
    return {"seconds": total, "us_per_row": 1e6 * total / number, "worst_ms": 1e3 * worst}


def append_landscape(folder: Path, number: int) -> Cost:
    """Append rows with ``TraceWriter``, including its flushes."""
    with TraceWriter(folder / "run", {"norm": "batch", "seed": 0}, flush_rows=FLUSH_ROWS) as trace:
        cost = _time_appends(number, trace.append)
    return cost | {"megabytes": sum(path.stat().st_size for path in (folder / "run").iterdir()) / 1e6}


def append_json(folder: Path, number: int) -> Cost:
    """Append rows as JSON lines, flushed as often."""
    with (folder / "rows.jsonl").open("w") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            if row["step"] % FLUSH_ROWS == FLUSH_ROWS - 1:
                file.flush()

        cost = _time_appends(number, append)
    return cost | {"megabytes": (folder / "rows.jsonl").stat().st_size / 1e6}


def append_csv(folder: Path, number: int) -> Cost:
    """Append rows as CSV, with a column per step size."""
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        head = next(rows(1))
        lists = [name for name, value in head.items() if isinstance(value, list)]
        writer.writerow([n for n in head if n not in lists] + [f"{n}_{k}" for n in lists for k in range(8)])

        def append(row: dict[str, Any]) -> None:
            scalars = [value for name, value in row.items() if name not in lists]
            writer.writerow(scalars + [value for name in lists for value in row[name]])
            if row["step"] % FLUSH_ROWS == FLUSH_ROWS - 1:
                file.flush()

        cost = _time_appends(number, append)
    return cost | {"megabytes": (folder / "rows.csv").stat().st_size / 1e6}


def append_many(folder: Path, number: int) -> Cost:
    """Write one run per 1,000 rows to one folder."""
    start = time.perf_counter()
    for seed in range(max(1, number // 1000)):
        with TraceWriter(folder / "many" / f"run-{seed:04d}", {"norm": "batch", "seed": seed}) as trace:
            for row in rows(ROWS_PER_RUN):
                trace.append(row)
    return {"seconds": time.perf_counter() - start}


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / "run").glob("updates-*.parquet"))


def _time(task: Callable[[Path], object]) -> Callable[[Path, int], Cost]:
    """Return a task that times a function of the folder."""

    def run(folder: Path, number: int) -> Cost:
        start = time.perf_counter()
        result = task(folder)
        seconds = time.perf_counter() - start
        del result  # It is referenced until here, so that its memory counts.
        return {"seconds": seconds}

    return run


def _time_on_frame(task: Callable[[pd.DataFrame, Path], object]) -> Callable[[Path, int], Cost]:
    """Return a task that times a function of the frame.

    Reading is not timed, but the peak memory includes the frame.
    """

    def run(folder: Path, number: int) -> Cost:
        frame = read_traces(folder / "run")
        return _time(lambda folder: task(frame, folder))(folder, number)

    return run


def _plot(measures: list[str]) -> Callable[[pd.DataFrame, Path], object]:
    return lambda frame, folder: save_figure(plot_landscape(frame, measure=measures), folder / "landscape.png")


WRITE: dict[str, Callable[[Path, int], Cost]] = {
    "append: TraceWriter": append_landscape,
    "append: JSON lines": append_json,
    "append: CSV": append_csv,
    "append: as many runs": append_many,
}
READ: dict[str, Callable[[Path, int], Cost]] = {
    "nothing: imports alone": _time(lambda folder: None),
    "read: read_traces": _time(lambda folder: read_traces(folder / "run")),
    "read: pyarrow, the same parts": _time(lambda folder: pa.concat_tables(map(pq.read_table, _parts(folder)))),
    "read: pyarrow, JSON lines": _time(lambda folder: pyarrow.json.read_json(folder / "rows.jsonl")),
    "read: pyarrow, CSV": _time(lambda folder: pyarrow.csv.read_csv(folder / "rows.csv")),
    "summarize: by epoch": _time_on_frame(lambda frame, folder: summarize(frame, by=("band", "epoch"))),
    "plot: loss": _time_on_frame(_plot(["loss"])),
    "plot: five measures": _time_on_frame(_plot(["loss", "predictiveness", "beta", "gap", "curvature"])),
    "many runs: read_traces": _time(lambda folder: read_traces(folder / "many")),
    "many runs: list_runs": _time(lambda folder: list_runs(folder / "many")),
}
"""Tasks by name; those of ``READ`` read the files of those of ``WRITE``."""


def peak_megabytes() -> float:
    """Return the peak memory of this process in MB.

    NaN except on Linux. ``getrusage`` would include the memory of the parent process.
    """
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3 if status.exists() else math.nan


if __name__ == "__main__":
    task, folder, number = sys.argv[1:]
    cost = (WRITE | READ)[task](Path(folder), int(number))
    print(json.dumps(cost | {"peak_mb": peak_megabytes()}))
