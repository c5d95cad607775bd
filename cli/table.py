"""``landscape table``: tables 1 and 2 of the paper, at its scale or at one that a laptop can train."""

from pathlib import Path

import click

from landscape.training.presets import RECIPES
from landscape.tuning.plan import TuningConfig

from .tune import WorkerOptions, run, workshop_options

_SMALL = {"groups": (2, 4, 8, 16), "channel_groups": (2, 4, 8)}
TABLES = {
    ("1", "paper"): (
        TuningConfig(RECIPES["classify-cifar100"]),
        "Table 1: classification of CIFAR-100, WideResNet-28-10.",
    ),
    ("2", "paper"): (
        TuningConfig(RECIPES["classify-cifar10"]),
        "Table 2: classification of CIFAR-10, WideResNet-28-10.",
    ),
    ("1", "small"): (
        TuningConfig(RECIPES["classify-mnist"], **_SMALL),
        "In the place of table 1 (CIFAR-100, WideResNet-28-10), small enough for a CPU: SimpleNet on MNIST.",
    ),
    ("2", "small"): (
        TuningConfig(RECIPES["classify-cifar10-small"], **_SMALL),
        "In the place of table 2 (CIFAR-10, WideResNet-28-10), small enough for a CPU: ResNet-20, part of the images.",
    ),
}


@click.command("table")
@click.argument("number", type=click.Choice(["1", "2"]))
@click.option(
    "--scale",
    type=click.Choice(["small", "paper"]),
    default="paper",
    show_default=True,
    help="paper: WideResNet-28-10, days on a GPU; small: another model on less data, an hour or two on a CPU.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("figures"), show_default=True, help="Parent of the folder."
)
@workshop_options
def command(number: str, scale: str, out: Path, workshop: WorkerOptions) -> None:
    """Train what table NUMBER of the paper compares: 1 for CIFAR-100, 2 for CIFAR-10.

    The same as `landscape tune` with the recipe of the table, the paper's groups and two seeds; the results are in the
    subfolder table1-small (and so on) of OUT. `--plan` says how long it takes.
    """
    tuning, title = TABLES[number, scale]
    run(tuning, out / f"table{number}-{scale}", workshop, title)
