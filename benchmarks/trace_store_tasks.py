"""The tasks of ``benchmarks.trace_store``: ``python -m benchmarks.trace_store_tasks TASK FOLDER ROWS`` does one.

Each runs in a process of its own, which does not import torch: so memory at its peak is that of the task.
"""

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from landscape.analysis.summary import summarize
from landscape.names import MEASURES
from landscape.plotting.figure import save_figure
from landscape.plotting.landscape import plot_landscape
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.writer import TraceWriter

STEP_SIZES = [0.1 * k for k in range(1, 9)]
FLUSH_ROWS = 1000
ROWS_OF_MANY = 200
Cost = dict[str, float]


def rows(number: int) -> Iterator[dict[str, Any]]:
    """Updates with eight losses and eight distances of gradients each, by formula."""
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


def _appended(number: int, append: Callable[[dict[str, Any]], object]) -> Cost:
    """What it costs to append rows, which are not made on the same time."""
    total = worst = 0.0
    for row in rows(number):
        started = time.perf_counter()
        append(row)
        spent = time.perf_counter() - started
        total, worst = total + spent, max(worst, spent)
    return {"seconds": total, "us_per_row": 1e6 * total / number, "worst_ms": 1e3 * worst}


def append_landscape(folder: Path, number: int) -> Cost:
    """``TraceWriter``, with its flushes."""
    with TraceWriter(folder / "run", {"norm": "batch", "seed": 0}, flush_rows=FLUSH_ROWS) as trace:
        cost = _appended(number, trace.append)
    return cost | {"megabytes": sum(path.stat().st_size for path in (folder / "run").iterdir()) / 1e6}


def append_json(folder: Path, number: int) -> Cost:
    """A line of JSON for each row, flushed as often."""
    with (folder / "rows.jsonl").open("w") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            if row["step"] % FLUSH_ROWS == FLUSH_ROWS - 1:
                file.flush()

        cost = _appended(number, append)
    return cost | {"megabytes": (folder / "rows.jsonl").stat().st_size / 1e6}


def append_csv(folder: Path, number: int) -> Cost:
    """A line of CSV for each row, flushed as often, with a column for each step size."""
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

        cost = _appended(number, append)
    return cost | {"megabytes": (folder / "rows.csv").stat().st_size / 1e6}


def append_many(folder: Path, number: int) -> Cost:
    """A thousandth of the rows as runs of their own, in one folder."""
    started = time.perf_counter()
    for seed in range(max(1, number // 1000)):
        with TraceWriter(folder / "many" / f"run-{seed:04d}", {"norm": "batch", "seed": seed}) as trace:
            for row in rows(ROWS_OF_MANY):
                trace.append(row)
    return {"seconds": time.perf_counter() - started}


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / "run").glob("updates-*.parquet"))


def _drawn(folder: Path, number: int, measures: list[str]) -> Cost:
    """What drawing costs once the frame is there; its memory counts."""
    frame = read_traces(folder / "run")
    started = time.perf_counter()
    save_figure(plot_landscape(frame, measure=measures), folder / "landscape.png")
    return {"seconds": time.perf_counter() - started}


def _summarized(folder: Path, number: int) -> Cost:
    frame = read_traces(folder / "run")
    started = time.perf_counter()
    summarize(frame, by=("band", "epoch"))
    return {"seconds": time.perf_counter() - started}


def _timed(task: Callable[[Path], object]) -> Callable[[Path, int], Cost]:
    def run(folder: Path, number: int) -> Cost:
        started = time.perf_counter()
        held = task(folder)
        spent = time.perf_counter() - started
        del held  # until here, so that its memory counts
        return {"seconds": spent}

    return run


WRITE: dict[str, Callable[[Path, int], Cost]] = {
    "append: TraceWriter": append_landscape,
    "append: JSON lines": append_json,
    "append: CSV": append_csv,
    "append: as many runs": append_many,
}
READ: dict[str, Callable[[Path, int], Cost]] = {
    "nothing: imports alone": _timed(lambda folder: None),
    "read: read_traces": _timed(lambda folder: read_traces(folder / "run")),
    "read: pyarrow, the same parts": _timed(lambda folder: pa.concat_tables(map(pq.read_table, _parts(folder)))),
    "read: pyarrow, JSON lines": _timed(lambda folder: pyarrow.json.read_json(folder / "rows.jsonl")),
    "read: pyarrow, CSV": _timed(lambda folder: pyarrow.csv.read_csv(folder / "rows.csv")),
    "summarize: by epoch": _summarized,
    "plot: loss": lambda folder, number: _drawn(folder, number, ["loss"]),
    "plot: five measures": lambda folder, number: _drawn(folder, number, list(MEASURES)),
    "many runs: read_traces": _timed(lambda folder: read_traces(folder / "many")),
    "many runs: list_runs": _timed(lambda folder: list_runs(folder / "many")),
}
"""Tasks by name; those of ``READ`` need what those of ``WRITE`` have written."""


def peak() -> float:
    """Most memory that this process has held, in MB; NaN where the system is not Linux.

    Not by ``getrusage``, which begins with the memory of the parent process.
    """
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3 if status.exists() else math.nan


if __name__ == "__main__":
    name, place, amount = sys.argv[1:]
    found = (WRITE | READ)[name](Path(place), int(amount))
    print(json.dumps(found | {"peak_mb": peak()}))
