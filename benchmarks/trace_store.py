"""Measure time and memory of a trace of 1,000,000 rows with 8 losses each: ``python -m benchmarks.trace_store``.

Rows are appended, read, summarized and plotted. Alternatives are JSON lines and CSV, and reading the Parquet parts by
pyarrow alone. Another folder has one run of 200 updates per 1,000 rows.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pandas as pd

from benchmarks.timing import machine, write_json
from benchmarks.trace_store_tasks import READ, WRITE, Cost


def measure(rows: int, rounds: int) -> pd.DataFrame:
    """Return the median time and peak memory of each task.

    Writing tasks run once.
    """
    with tempfile.TemporaryDirectory() as folder:
        costs = [(task, _run_task(task, folder, rows)) for task in WRITE]
        costs += [(task, _run_task(task, folder, rows)) for _ in range(rounds) for task in READ]
    table = pd.DataFrame([{"task": task} | cost for task, cost in costs])
    return table.groupby("task", sort=False).median()


def _run_task(task: str, folder: str, rows: int) -> Cost:
    """Run a task in a separate process."""
    command = [sys.executable, "-m", "benchmarks.trace_store_tasks", task, folder, str(rows)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    return json.loads(result.stdout)


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(1), help="Updates of the trace.")
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(1), help="Repetitions of each reading task."
)
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this file.")
def main(rows: int, rounds: int, path: Path | None) -> None:
    """Print the costs of writing, reading and plotting a trace."""
    table = measure(rows, rounds)
    click.echo(f"{machine()}\n{rows:,} rows, K=8; {max(1, rows // 1000):,} runs; medians of {rounds} rounds")
    click.echo(table.round(3).to_string(na_rep=""))
    write_json(path, table.astype(object).where(table.notna(), None))


if __name__ == "__main__":
    main()
