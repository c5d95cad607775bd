"""What ``LandscapeProbe(overhead=...)`` really costs, seen from outside: ``python -m benchmarks.overhead``.

SimpleNet with BatchNorm at batch 512, on random data of MNIST's shape, is trained with and without the probe in turns;
each turn starts from the same weights. Comparing and timing the engines on the first probes is part of the cost.
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
    """Trains the same model on the same batches again and again, and keeps what each turn came to."""

    def __init__(self, steps: int, device: str) -> None:
        torch.manual_seed(0)
        self.steps, self.device = steps, device
        self.inputs = torch.randn(BATCHES, BATCH, 784, device=device)
        self.targets = torch.randint(10, (BATCHES, BATCH), device=device)
        self.budgets: dict[float, list[dict[str, Any]]] = {}
        self.ends: list[list[Tensor]] = []

    def turn(self, share: float | None) -> None:
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
                facts = json.loads((trace / "run.json").read_text())
            self.budgets.setdefault(share, []).append(facts["budget"] | {"engine": facts.get("engine", "undecided")})
        self.ends.append([tensor.detach().clone() for tensor in model.state_dict().values()])

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> None:
        for step in range(self.steps):
            optimizer.zero_grad()
            criterion(model(self.inputs[step % BATCHES]), self.targets[step % BATCHES]).backward()
            optimizer.step()

    def unmoved(self) -> bool:
        """Whether all turns have ended in the same bits."""
        return all(all(map(torch.equal, self.ends[0], end)) for end in self.ends)


def measure(shares: tuple[float, ...], steps: int, rounds: int, device: str = "cpu") -> tuple[pd.DataFrame, bool]:
    """A row for each share, and whether every turn has ended in the same weights and buffers."""
    training = Training(steps, device)
    candidates = {WITHOUT: partial(training.turn, None)} | {f"{s:g}": partial(training.turn, s) for s in shares}
    seconds = interleaved(candidates, rounds, torch.cuda.synchronize if device.startswith("cuda") else None)
    rows = []
    for share in shares:
        cost = seconds[f"{share:g}"] / seconds[WITHOUT] - 1
        budgets = pd.DataFrame(training.budgets[share][1:])  # the first round is not counted, as in the seconds
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
    return pd.DataFrame(rows).set_index("share"), training.unmoved()


@click.command()
@click.option("--share", "shares", type=float, multiple=True, default=(0.05, 0.1, 0.3), show_default=True)
@click.option("--steps", default=500, show_default=True, help="Updates of each training run.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Runs with each share.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here.")
def main(shares: tuple[float, ...], steps: int, rounds: int, threads: int, device: str, path: Path | None) -> None:
    """Train with and without the probe, and print what a share of the training time has really cost."""
    torch.set_num_threads(threads)
    keep_memory()
    table, unmoved = measure(shares, steps, rounds, device)
    click.echo(
        f"{machine()}\nSimpleNet, BatchNorm, batch {BATCH}, K={len(STEP_SIZES)}, {steps} updates, {rounds} rounds"
    )
    click.echo(
        "real: time with the probe / time without - 1, median and quartiles; recorded: what the probe says of it"
    )
    click.echo(table.round(3).to_string())
    click.echo(f"All runs ended in the same weights and buffers: {'yes' if unmoved else 'NO'}")
    if path is not None:
        rows = table.reset_index().to_dict("records")
        path.write_text(json.dumps({"machine": machine(), "unmoved": unmoved, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
