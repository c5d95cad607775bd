"""The probe against K bare forward passes and what people do today: ``python -m benchmarks.rays``.

SimpleNet (784-512-300-10) at batch 512 with K = 8 step sizes, on random data of MNIST's shape. Each figure is relative
to eight bare forward passes without gradients in the same round. Needs the extra ``bench`` (``loss-landscapes``).
"""

import copy
from collections.abc import Callable
from pathlib import Path

import click
import loss_landscapes
import pandas as pd
import torch
from loss_landscapes.metrics import Loss
from torch import Tensor, nn

from benchmarks.timing import against, interleaved, machine, write_json
from landscape import LandscapeProbe, make_norm, ray_losses
from landscape.models import SimpleNet

BATCH, STEP_SIZES = 512, [0.1 * k for k in range(1, 9)]
NORMS = {"none": {}, "batch": {}, "ghost": {"groups": 16}}


class Workload:
    """A model with a batch, its gradient, and every way to measure the ray."""

    def __init__(self, norm: str) -> None:
        torch.manual_seed(0)
        self.model = SimpleNet(784, 10, make_norm(norm, **NORMS[norm]))
        self.inputs, self.targets = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)  # so that every round sees the same point
        self.probed = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(self.probed.parameters(), lr=0.0)
        self.probe = LandscapeProbe(self.probed, optimizer, self.criterion, step_sizes=STEP_SIZES).attach()
        self.update(self.model, self.optimizer)
        self.gradient = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def candidates(self) -> dict[str, Callable[[], object]]:
        """Everything that is timed, by the name of its row."""
        return {
            "bare forward passes": self.bare,
            "landscape, affine": lambda: self.ray("affine"),
            "landscape, loop": lambda: self.ray("loop"),
            "in-place loop": self.in_place,
            "deepcopy per point": self.deepcopy,
            "loss-landscapes": self.loss_landscapes,
            "update": lambda: self.update(self.model, self.optimizer),
            "update with the probe": lambda: self.update(self.probed, self.probe.optimizer),
        }

    def loss(self, model: nn.Module) -> Tensor:
        return self.criterion(model(self.inputs), self.targets)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.loss(model).backward()
        optimizer.step()

    @torch.no_grad()
    def bare(self) -> None:
        for _ in STEP_SIZES:
            self.loss(self.model)

    def ray(self, engine: str) -> Tensor:
        return ray_losses(self.model, self.loss, self.gradient, STEP_SIZES, engine=engine)

    @torch.no_grad()
    def in_place(self) -> list[Tensor]:
        """Move, evaluate, move back: leaves rounding in the weights and K updates in the running statistics."""
        losses = []
        for eta in STEP_SIZES:
            for name, parameter in self.model.named_parameters():
                parameter.sub_(self.gradient[name], alpha=eta)
            losses.append(self.loss(self.model))
            for name, parameter in self.model.named_parameters():
                parameter.add_(self.gradient[name], alpha=eta)
        return losses

    @torch.no_grad()
    def deepcopy(self) -> list[Tensor]:
        losses = []
        for eta in STEP_SIZES:
            model = copy.deepcopy(self.model)
            for name, parameter in model.named_parameters():
                parameter.sub_(self.gradient[name], alpha=eta)
            losses.append(self.loss(model))
        return losses

    def loss_landscapes(self) -> object:
        end = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in end.named_parameters():
                parameter.sub_(self.gradient[name], alpha=STEP_SIZES[-1])
        metric = Loss(self.criterion, self.inputs, self.targets)
        return loss_landscapes.linear_interpolation(self.model, end, metric, len(STEP_SIZES), deepcopy_model=True)


def measure(norm: str, rounds: int) -> pd.DataFrame:
    """The table of one norm; the probe is what an update costs more with it than without."""
    seconds = interleaved(Workload(norm).candidates(), rounds)
    seconds["landscape, whole probe"] = seconds.pop("update with the probe") - seconds.pop("update")
    return against(seconds, "bare forward passes").assign(norm=norm).rename_axis("way").set_index("norm", append=True)


@click.command()
@click.option("--rounds", default=40, show_default=True, help="Rounds in which every way takes its turn.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the table here too.")
def main(rounds: int, path: Path | None) -> None:
    """Print the time of each way to measure a ray over that of the bare forward passes."""
    table = pd.concat([measure(norm, rounds) for norm in NORMS])
    click.echo(f"SimpleNet, batch {BATCH}, K={len(STEP_SIZES)}; ratios to the bare forward passes; {machine()}")
    ratios = pd.DataFrame({norm: table["ratio"].xs(norm, level="norm") for norm in NORMS})
    click.echo(ratios.round(2).to_string())
    write_json(path, table)


if __name__ == "__main__":
    main()
