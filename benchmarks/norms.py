"""GhostNorm against ``nn.BatchNorm``, the equations as written, and a loop over chunks: ``python -m benchmarks.norms``.

Forward and backward in training mode, on the layers of SimpleNet at batch 512 and of ResNet-56 at batch 128. Each ratio
is to ``nn.BatchNorm`` in the same round.
"""

from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import against, interleaved, machine, write_json
from landscape import GhostNorm, make_norm

LAYERS = [
    ((512, 512), 16),
    ((512, 300), 16),
    ((512, 512), 128),
    ((512, 300), 128),
    ((128, 16, 32, 32), 8),
    ((128, 32, 16, 16), 8),
    ((128, 64, 8, 8), 8),
]
BASE = "nn.BatchNorm"
PASSES = 5  # per turn, because the first one pays for what the candidate before left of caches and memory
EPS = 1e-5


def equations(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's equations 1-3, one operation after the other, differentiated by autograd."""
    slices = x.reshape(groups, len(x) // groups, x.shape[1], -1)
    mean = slices.mean((1, 3), keepdim=True)
    var = slices.var((1, 3), unbiased=False, keepdim=True)
    return ((slices - mean) / (var + EPS).sqrt() * weight[:, None] + bias[:, None]).reshape(x.shape)


def chunks(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """One native batch normalization per group."""
    parts = (F.batch_norm(chunk, None, None, weight, bias, training=True, eps=EPS) for chunk in x.tensor_split(groups))
    return torch.cat(list(parts))


def candidates(shape: tuple[int, ...], groups: int) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of every norm on one layer, by the name of its row."""
    torch.manual_seed(0)
    channels = shape[1]
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weight, bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
    norms = {
        BASE: nn.BatchNorm1d(channels) if len(shape) == 2 else nn.BatchNorm2d(channels),
        "GhostNorm": GhostNorm(channels, groups),
        "GhostNorm, interleaved": GhostNorm(channels, groups, layout="interleaved"),
        "SeqNorm": make_norm("seq", groups=groups)(channels),
        "equations as written": lambda x: equations(x, groups, weight, bias),
        "loop over chunks": lambda x: chunks(x, groups, weight, bias),
    }
    return {name: lambda norm=norm: passes(norm, x, gradient) for name, norm in norms.items()}


def passes(norm: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    for _ in range(PASSES):
        x.grad = None
        norm(x).backward(gradient)


def measure(rounds: int) -> pd.DataFrame:
    """All norms on all layers: milliseconds and ratios."""
    tables = []
    for shape, groups in LAYERS:
        seconds = interleaved(candidates(shape, groups), rounds) / PASSES
        layer = "x".join(map(str, shape))
        tables.append(against(seconds, BASE).rename_axis("norm").reset_index().assign(shape=layer, groups=groups))
    return pd.concat(tables).set_index(["shape", "groups", "norm"])


@click.command()
@click.option("--rounds", default=30, show_default=True, help="How often each norm is timed on each layer.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here.")
def main(rounds: int, threads: int, path: Path | None) -> None:
    """Time forward and backward passes of the norms."""
    torch.set_num_threads(threads)
    table = measure(rounds)
    print(machine())
    print(table.round({"ms": 3, "ratio": 2, "from": 2, "to": 2}).to_string())
    write_json(path, table)


if __name__ == "__main__":
    main()
