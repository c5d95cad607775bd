"""``landscape table``: tables 1 and 2 of arXiv:2007.08554, at two scales."""

from pathlib import Path

import click

from landscape.paper.tables1_2 import TABLES
from landscape.tuning.plan import TuningConfig

from .params import Command, options_under, out_option
from .tune import WorkerOptions, run, worker_options


@click.command("table", cls=Command)
@click.argument("number", type=click.Choice(["1", "2"]))
@options_under("Table")(
    "--scale",
    type=click.Choice(["small", "paper"]),
    default="paper",
    show_default=True,
    help="paper: WideResNet-28-10, days on a GPU; small: another model on less data, 1 or 2 hours on a CPU.",
)
@worker_options
@out_option("figures", "Parent folder of the results.")
def command(number: str, scale: str, out: Path, worker: WorkerOptions) -> None:
    """Train the networks of a table of the paper.

    Table 1 is on CIFAR-100, table 2 on CIFAR-10. The command is `landscape tune` with the recipe of the table, the
    paper's numbers of groups and two seeds; results are in a subfolder of OUT, such as table1-small. `--plan` estimates
    the time.
    """
    table = TABLES[number, scale]
    tuning = TuningConfig(
        table.recipe, groups=table.groups, channel_groups=table.channel_groups, strategy=table.strategy, runs=table.runs
    )
    run(tuning, out / f"table{number}-{scale}", worker, table.title)
