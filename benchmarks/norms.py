"""GhostNorm and SeqNorm against ``nn.BatchNorm`` and what others publish: ``python -m benchmarks.norms``.

Training mode, on the layers of SimpleNet at batch 512 and of ResNet-56 at batch 128, contiguous and channels_last:
forward without gradients, as along a ray, and forward and backward. Each ratio is to the base in the same round. The
loop, the view and the equations are bare functions; the layers also track running statistics, for about 15 us.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.charts import chart
from benchmarks.timing import against, interleaved, keep_memory, machine, write_json
from landscape import GhostNorm, SeqNorm

BATCH_NORM, SEQUENCE = "nn.BatchNorm", "nn.GroupNorm, nn.BatchNorm"
BASES = {SEQUENCE: SEQUENCE, "SeqNorm": SEQUENCE}  # of the others: nn.BatchNorm
REPEATS = 5  # per turn, because the first one pays for what the candidate before left of caches and memory
EPS = 1e-5
Norm = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """An input of a norm, and its groups."""

    shape: tuple[int, ...]
    groups: int
    memory: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        last = " channels_last" if self.memory == torch.channels_last else ""
        return f"{'x'.join(map(str, self.shape))}{last}, G={self.groups}"


CONVOLUTIONS = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
LAYERS = [
    *(Layer((512, channels), groups) for groups in (16, 128) for channels in (512, 300)),
    *(Layer(shape, 8, memory) for memory in (torch.contiguous_format, torch.channels_last) for shape in CONVOLUTIONS),
]


def equations(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's equations 1-3, one operation after the other, differentiated by autograd."""
    slices = x.reshape(groups, len(x) // groups, x.shape[1], -1)
    mean = slices.mean((1, 3), keepdim=True)
    var = slices.var((1, 3), unbiased=False, keepdim=True)
    return ((slices - mean) / (var + EPS).sqrt() * weight[:, None] + bias[:, None]).reshape(x.shape)


def chunks(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """One native batch normalization per group, as in TabNet and Composer."""
    parts = (F.batch_norm(chunk, None, None, weight, bias, training=True, eps=EPS) for chunk in x.tensor_split(groups))
    return torch.cat(list(parts))


def view(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The groups as channels of a native batch normalization, as in cifar10-fast; the groups are interleaved."""
    channels = x.view(-1, groups * x.shape[1], *x.shape[2:])
    weights = weight.repeat(groups), bias.repeat(groups)
    return F.batch_norm(channels, None, None, *weights, training=True, eps=EPS).view(x.shape)


def norms(layer: Layer, device: str) -> dict[str, Norm]:
    """Everything that is timed, by the name of its row."""
    channels, groups = layer.shape[1], layer.groups
    batch_norm = nn.BatchNorm1d if len(layer.shape) == 2 else nn.BatchNorm2d
    modules = {
        BATCH_NORM: batch_norm(channels),
        "GhostNorm": GhostNorm(channels, groups),
        "GhostNorm, interleaved": GhostNorm(channels, groups, layout="interleaved"),
        SEQUENCE: nn.Sequential(nn.GroupNorm(1, channels, affine=False), batch_norm(channels)),
        "SeqNorm": SeqNorm(channels, groups),
    }
    functions = {"equations as written": equations, "loop over chunks": chunks}
    if layer.memory == torch.contiguous_format:  # there is no such view of a channels_last batch
        functions["view as in cifar10-fast"] = view
    weight, bias = (nn.Parameter(fill(channels, device=device)) for fill in (torch.ones, torch.zeros))
    bound = {name: partial(norm, groups=groups, weight=weight, bias=bias) for name, norm in functions.items()}
    return {name: module.to(device) for name, module in modules.items()} | bound


def candidates(layer: Layer, device: str, backward: bool) -> dict[str, Callable[[], None]]:
    """The passes of every norm over one layer."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, *layer.shape, device=device)
    x, gradient = (
        x.contiguous(memory_format=layer.memory).requires_grad_(backward),
        gradient.contiguous(memory_format=layer.memory),
    )
    run = forward_and_backward if backward else forward
    return {name: partial(run, norm, x, gradient) for name, norm in norms(layer, device).items()}


def forward_and_backward(norm: Norm, x: Tensor, gradient: Tensor) -> None:
    for _ in range(REPEATS):
        x.grad = None
        norm(x).backward(gradient)


@torch.no_grad()
def forward(norm: Norm, x: Tensor, _gradient: Tensor) -> None:
    for _ in range(REPEATS):
        norm(x)


def measure(rounds: int, device: str) -> pd.DataFrame:
    """All norms on all layers: milliseconds and ratios."""
    tables = []
    for backward, layer in ((backward, layer) for backward in (True, False) for layer in LAYERS):
        synchronize = torch.cuda.synchronize if device.startswith("cuda") else None
        seconds = interleaved(candidates(layer, device, backward), rounds, synchronize) / REPEATS
        bases = pd.Series(BASES).reindex(seconds.columns).fillna(BATCH_NORM)
        rows = pd.concat([against(seconds, base).loc[[name]].assign(base=base) for name, base in bases.items()])
        passes = "forward + backward" if backward else "forward, no_grad"
        tables.append(rows.rename_axis("norm").reset_index().assign(passes=passes, layer=str(layer)))
    return pd.concat(tables).set_index(["passes", "layer", "norm"])


def as_text(table: pd.DataFrame) -> str:
    """Layers as rows, norms as columns."""
    ratios, ms = (table[column].unstack("norm", sort=False) for column in ("ratio", "ms"))
    bases = {f"{base} [ms]": ms[base].round(3) for base in (BATCH_NORM, SEQUENCE)}
    text = ratios.drop(columns=[BATCH_NORM, SEQUENCE]).round(2).assign(**bases).rename_axis(None, axis="columns")
    return text.rename(columns=lambda name: name.replace("nn.", "")).to_string(na_rep="-")


@click.command()
@click.option("--rounds", default=30, show_default=True, help="How often each norm is timed on each layer.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here.")
@click.option("--chart", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draw the ratios here.")
def main(rounds: int, threads: int, device: str, path: Path | None, picture: Path | None) -> None:
    """Time the norms on the layers of two models."""
    torch.set_num_threads(threads)
    keep_memory()
    table = measure(rounds, device)
    click.echo(f"{machine()}\nBase: {BATCH_NORM}; of SeqNorm: {SEQUENCE}.")
    for passes, part in table.droplevel("passes").groupby(table.index.get_level_values("passes"), sort=False):
        click.echo(f"\n{passes}: times over that of the base, and milliseconds of the bases\n{as_text(part)}")
    write_json(path, table)
    chart(table, picture)


if __name__ == "__main__":
    main()
