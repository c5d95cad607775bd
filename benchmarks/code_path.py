"""Count the functions and files that one probed update runs: ``python -m benchmarks.code_path``.

The numbers measure how much code a reader has to follow, not speed.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch
from torch import nn

import landscape
from landscape import LandscapeProbe

ROOT = Path(landscape.__file__).parent
STEADY = 40
"""Update that is counted; by then the engine is selected and the first checks are complete."""


def run(engine: str) -> Counter[tuple[str, str]]:
    """Count the calls of one probed update by function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    calls: Counter[tuple[str, str]] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Comprehensions count as part of the function around them.
        if event == "call" and code.co_name[0] != "<" and Path(code.co_filename).is_relative_to(ROOT):
            calls[str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname] += 1

    known = criterion if engine == "loop" else None
    with LandscapeProbe(model, optimizer, known, step_sizes=[0.1, 0.2, 0.4, 0.8], engine=engine):
        for step in range(STEADY + 1):
            inputs, targets = torch.randn(64, 20), torch.randint(5, (64,))
            if step == STEADY:
                sys.setprofile(count)
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            sys.setprofile(None)
    return calls


@click.command()
@click.option("--engine", default="auto", show_default=True)
@click.option("--functions", is_flag=True, help="List the functions of each file.")
def main(engine: str, functions: bool) -> None:
    """Print the functions and files of one probed update."""
    calls = run(engine)
    files = sorted({file for file, _ in calls})
    click.echo(f"{len(calls)} functions in {len(files)} files, {calls.total()} calls (engine {engine!r})")
    for file in files:
        names = sorted(name for other, name in calls if other == file)
        click.echo(f"  {file}: {', '.join(names) if functions else len(names)}")


if __name__ == "__main__":
    main()
