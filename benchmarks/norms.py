"""Time GhostNorm and SeqNorm against ``nn.BatchNorm`` and other implementations: ``python -m benchmarks.norms``.

The inputs are those of SimpleNet at batch 512 and of ResNet-56 at batch 128, contiguous and channels_last, in training
mode: forward without gradients, as along a ray, and forward and backward. Ratios are to the base in the same round. The
loop, the view and the equations are plain functions; the layers also track running statistics, which takes about 15 us.
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

from benchmarks.charts import draw_norms
from benchmarks.timing import compare, interleaved, keep_memory, machine, write_json
from landscape import GhostNorm, SeqNorm
from landscape.plotting.figure import save_figure

BATCH_NORM, SEQUENCE = "nn.BatchNorm", "nn.GroupNorm, nn.BatchNorm"
BASES = {SEQUENCE: SEQUENCE, "SeqNorm": SEQUENCE}
"""Base of a norm, if it is not nn.BatchNorm."""
REPEATS = 5
"""Passes per turn; the first one is slower, because the previous candidate has filled the caches."""
EPS = 1e-5
Norm = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """Shape and memory format of an input, with groups."""

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
    """Compute equations 1-3 of arXiv:2007.08554, operation by operation."""
    slices = x.reshape(groups, len(x) // groups, x.shape[1], -1)
    mean = slices.mean((1, 3), keepdim=True)
    var = slices.var((1, 3), unbiased=False, keepdim=True)
    return ((slices - mean) / (var + EPS).sqrt() * weight[:, None] + bias[:, None]).reshape(x.shape)


def chunks(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize group by group, as TabNet and Composer do."""
    parts = (F.batch_norm(chunk, None, None, weight, bias, training=True, eps=EPS) for chunk in x.tensor_split(groups))
    return torch.cat(list(parts))


def view(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups as channels, as cifar10-fast does.

    The groups are interleaved.
    """
    channels = x.view(-1, groups * x.shape[1], *x.shape[2:])
    weights = weight.repeat(groups), bias.repeat(groups)
    return F.batch_norm(channels, None, None, *weights, training=True, eps=EPS).view(x.shape)


def norms(layer: Layer, device: str) -> dict[str, Norm]:
    """Return the norms to time, by row of the table."""
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
    if layer.memory == torch.contiguous_format:  # A channels_last batch has no such view.
        functions["view as in cifar10-fast"] = view
    weight, bias = (nn.Parameter(fill(channels, device=device)) for fill in (torch.ones, torch.zeros))
    bound = {name: partial(norm, groups=groups, weight=weight, bias=bias) for name, norm in functions.items()}
    return {name: module.to(device) for name, module in modules.items()} | bound


def candidates(layer: Layer, device: str, backward: bool) -> dict[str, Callable[[], None]]:
    """Return the passes of every norm over one input."""
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
    """Time all norms on all inputs."""
    tables = []
    for backward, layer in ((backward, layer) for backward in (True, False) for layer in LAYERS):
        synchronize = torch.cuda.synchronize if device.startswith("cuda") else None
        seconds = interleaved(candidates(layer, device, backward), rounds, synchronize) / REPEATS
        bases = pd.Series(BASES).reindex(seconds.columns).fillna(BATCH_NORM)
        rows = pd.concat([compare(seconds, base).loc[[name]].assign(base=base) for name, base in bases.items()])
        passes = "forward + backward" if backward else "forward, no_grad"
        tables.append(rows.rename_axis("norm").reset_index().assign(passes=passes, layer=str(layer)))
    return pd.concat(tables).set_index(["passes", "layer", "norm"])


def as_text(table: pd.DataFrame) -> str:
    """Format the ratios as a table (inputs, norms)."""
    ratios, ms = (table[column].unstack("norm", sort=False) for column in ("ratio", "ms"))
    bases = {f"{base} [ms]": ms[base].round(3) for base in (BATCH_NORM, SEQUENCE)}
    text = ratios.drop(columns=[BATCH_NORM, SEQUENCE]).round(2).assign(**bases).rename_axis(None, axis="columns")
    return text.rename(columns=lambda name: name.replace("nn.", "")).to_string(na_rep="-")


@click.command()
@click.option("--rounds", default=30, show_default=True, help="Timings of each norm on each input.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="Device of torch, such as cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this file.")
@click.option(
    "--chart", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the ratios to this file."
)
def main(rounds: int, threads: int, device: str, path: Path | None, picture: Path | None) -> None:
    """Time the norms on the inputs of two models."""
    torch.set_num_threads(threads)
    keep_memory()
    table = measure(rounds, device)
    click.echo(f"{machine()}\nBase: {BATCH_NORM}; for SeqNorm: {SEQUENCE}.")
    for passes, part in table.droplevel("passes").groupby(table.index.get_level_values("passes"), sort=False):
        click.echo(f"\n{passes}: ratios of times to that of the base, and milliseconds of the bases\n{as_text(part)}")
    write_json(path, table)
    if picture is not None:
        save_figure(draw_norms(table), picture)


if __name__ == "__main__":
    main()
