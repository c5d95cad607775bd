"""Measure the true cost of ``LandscapeProbe(overhead=...)``: ``python -m benchmarks.overhead``.

SimpleNet with BatchNorm at batch 512, on random data of MNIST's shape, is trained in turns with and without the probe,
each time from the same weights. The cost includes the selection of the engine during the first probes.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, keep_memory, machine
from landscape import LandscapeProbe, make_norm
from landscape.training.models import SimpleNet

WITHOUT = "without the probe"
BATCH, BATCHES, STEP_SIZES = 512, 20, [0.1 * k for k in range(1, 9)]


class Training:
    """Repeated training of one model on the same batches."""

    def __init__(self, steps: int, device: str) -> None:
        torch.manual_seed(0)
        self.steps, self.device = steps, device
        self.inputs = torch.randn(BATCHES, BATCH, 784, device=device)
        self.targets = torch.randint(10, (BATCHES, BATCH), device=device)
        self.budgets: dict[float, list[dict[str, Any]]] = {}
        self.ends: list[list[Tensor]] = []

    def run(self, share: float | None) -> None:
        torch.manual_seed(1)
        model = SimpleNet(784, 10, make_norm("batch")).to(self.device)
        optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
        if share is None:
            self._train(model, optimizer, criterion)
        else:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "run"
                with LandscapeProbe(
                    model, optimizer, criterion, step_sizes=STEP_SIZES, overhead=share, trace=trace, overwrite=True
                ):
                    self._train(model, optimizer, criterion)
                metadata = json.loads((trace / "run.json").read_text())
            budget = metadata["budget"] | {"engine": metadata.get("engine", "undecided")}
            self.budgets.setdefault(share, []).append(budget)
        self.ends.append([tensor.detach().clone() for tensor in model.state_dict().values()])

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> None:
        for step in range(self.steps):
            optimizer.zero_grad()
            criterion(model(self.inputs[step % BATCHES]), self.targets[step % BATCHES]).backward()
            optimizer.step()

    def same_ends(self) -> bool:
        """Return True if all runs ended in the same bits."""
        return all(all(map(torch.equal, self.ends[0], end)) for end in self.ends)


def measure(shares: tuple[float, ...], steps: int, rounds: int, device: str = "cpu") -> tuple[pd.DataFrame, bool]:
    """Measure the cost of each share.

    Returns:
        A row for each share, and True if all runs ended in the same weights and buffers.
    """
    training = Training(steps, device)
    candidates = {WITHOUT: partial(training.run, None)} | {f"{s:g}": partial(training.run, s) for s in shares}
    seconds = interleaved(candidates, rounds, torch.cuda.synchronize if device.startswith("cuda") else None)
    rows = []
    for share in shares:
        cost = seconds[f"{share:g}"] / seconds[WITHOUT] - 1
        budgets = pd.DataFrame(training.budgets[share][1:])  # The first round is not counted.
        recorded = budgets["probing_seconds"] / budgets["training_seconds"]
        rows.append(
            {
                "share": share,
                "real": cost.median(),
                "from": cost.quantile(0.25),
                "to": cost.quantile(0.75),
                "recorded": recorded.median(),
                "probes": budgets["probes"].median(),
                "updates": steps,
                "engines": ", ".join(sorted(set(budgets["engine"]))),
            }
        )
    return pd.DataFrame(rows).set_index("share"), training.same_ends()


@click.command()
@click.option("--share", "shares", type=float, multiple=True, default=(0.05, 0.1, 0.3), show_default=True)
@click.option("--steps", default=500, show_default=True, help="Updates of each training run.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Runs with each share.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this file.")
def main(shares: tuple[float, ...], steps: int, rounds: int, threads: int, device: str, path: Path | None) -> None:
    """Print the true costs of shares of the training time."""
    torch.set_num_threads(threads)
    keep_memory()
    table, same = measure(shares, steps, rounds, device)
    click.echo(
        f"{machine()}\nSimpleNet, BatchNorm, batch {BATCH}, K={len(STEP_SIZES)}, {steps} updates, {rounds} rounds"
    )
    click.echo(
        "real: time with the probe / time without - 1, median and quartiles; recorded: the same, timed by the probe"
    )
    click.echo(table.round(3).to_string())
    click.echo(f"All runs ended in the same weights and buffers: {'yes' if same else 'NO'}")
    if path is not None:
        rows = table.reset_index().to_dict("records")
        path.write_text(json.dumps({"machine": machine(), "unmoved": same, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
