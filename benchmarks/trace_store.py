"""What it costs to keep a trace of a million rows with eight losses each: ``python -m benchmarks.trace_store``.

Rows are appended, read, summarized and drawn; beside that the bare readers of the same parts, and lines of JSON and of
CSV, as other tools write them. A thousandth of the rows is also a number of runs in one folder, of 200 updates each.
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
    """A row for each task: medians over the rounds of seconds and of memory at its peak; writing is done once."""
    with tempfile.TemporaryDirectory() as folder:
        costs = [(task, _cost(task, folder, rows)) for task in WRITE]
        costs += [(task, _cost(task, folder, rows)) for _ in range(rounds) for task in READ]
    table = pd.DataFrame([{"task": task} | cost for task, cost in costs])
    return table.groupby("task", sort=False).median()


def _cost(task: str, folder: str, rows: int) -> Cost:
    """The cost of a task in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trace_store_tasks", task, folder, str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(1), help="Updates of the trace.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="How often each task is done.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here.")
def main(rows: int, rounds: int, path: Path | None) -> None:
    """Write, read, summarize and draw a long trace, and print what each has cost."""
    table = measure(rows, rounds)
    click.echo(f"{machine()}\n{rows:,} rows, K=8; {max(1, rows // 1000):,} runs; medians of {rounds} rounds")
    click.echo(table.round(3).to_string(na_rep=""))
    write_json(path, table.astype(object).where(table.notna(), None))


if __name__ == "__main__":
    main()
