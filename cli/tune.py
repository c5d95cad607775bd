"""``landscape tune``: search for the groups of each norm, shared by several machines."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from landscape.names import NORMS
from landscape.training.presets import RECIPES
from landscape.training.recipe import Recipe
from landscape.tuning.plan import TuningConfig
from landscape.tuning.strategies import STRATEGIES, Configuration

from .output import echo, report
from .params import Command, Decorated, data_dir_option, device_option, options_under, out_option

if TYPE_CHECKING:  # torch and pandas are slow to import, and --help does not need them.
    from landscape.tuning.plan import TuningPlan
    from landscape.tuning.tune import Outcome

TUNABLE = [name for name, recipe in RECIPES.items() if recipe.validation]


@dataclass(frozen=True)
class WorkerOptions:
    """Options of the machine that trains."""

    storage: str | None
    jobs: int
    device: str | None
    data_dir: Path | None
    only_plan: bool


def worker_options(command: Decorated) -> Decorated:
    """Add the options of `WorkerOptions`, passed as ``worker``."""

    @wraps(command)
    def with_worker(**given: Any) -> None:
        names = [field.name for field in fields(WorkerOptions)]
        command(worker=WorkerOptions(**{name: given.pop(name) for name in names}), **given)

    worker_option = options_under("Workers")
    options = [
        worker_option("--storage", help="Database of all workers, postgresql:// or sqlite:///.  [default: in OUT]"),
        worker_option("--jobs", type=int, default=1, show_default=True, help="Training processes on this machine."),
        worker_option("--plan", "only_plan", is_flag=True, help="Print the trainings and estimate their time, only."),
        device_option,
        data_dir_option,
    ]
    decorated: Decorated = with_worker
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


search_option = options_under("Search")


@click.command("tune", cls=Command)
@search_option(
    "--recipe",
    type=click.Choice(TUNABLE),
    default="classify-digits",
    show_default=True,
    metavar="NAME",
    help=f"Recipe to train: {', '.join(TUNABLE)}.",
)
@search_option(
    "--norm",
    "norms",
    type=click.Choice([*NORMS]),
    multiple=True,
    default=TuningConfig.norms,
    show_default=True,
    metavar="NAME",
    help=f"Normalization: {', '.join(NORMS)}. Repeatable.",
)
@search_option(
    "--groups",
    multiple=True,
    type=int,
    default=TuningConfig.groups,
    show_default=True,
    help="Groups G_M of the batch to try. Repeatable.",
)
@search_option(
    "--channel-groups",
    multiple=True,
    type=int,
    default=TuningConfig.channel_groups,
    show_default=True,
    help="Groups G_C of the channels to try. Repeatable.",
)
@search_option(
    "--strategy",
    type=click.Choice(list(STRATEGIES)),
    default=TuningConfig.strategy,
    show_default=True,
    help="sequential: G_M on GhostNorm alone, then G_C; grid: every combination.",
)
@search_option(
    "--tolerance",
    type=float,
    default=TuningConfig.tolerance,
    show_default=True,
    help="sequential selects the largest G_M whose accuracy is this close to the best.",
)
@search_option("--runs", type=int, default=TuningConfig.runs, show_default=True, help="Seeds for each configuration.")
@search_option("--epochs", type=int, help="Passes over the training set.  [default: the recipe's]")
@worker_options
@out_option("tuning", "Folder of results.")
def command(
    recipe: str,
    epochs: int | None,
    out: Path,
    worker: WorkerOptions,
    **search: Any,
) -> None:
    """Select the groups of each norm by accuracy.

    Groups are selected by validation accuracy; then networks with these groups are trained on the whole training set
    for the test accuracy. Trainings are trials of Optuna studies: the same command continues an interrupted search, and
    machines with the same --storage share it. Writes table.md, table.parquet and trials.parquet into OUT.
    """
    base = RECIPES[recipe] if epochs is None else replace(RECIPES[recipe], epochs=epochs)
    run(TuningConfig(base, **search), out, worker)


def run(tuning: TuningConfig, out: Path, worker: WorkerOptions, title: str = "") -> None:
    """Tune and write the table, or print the plan."""
    from landscape.tuning.feasibility import check_feasible
    from landscape.tuning.report import abridged, reasons

    plan = check_feasible(tuning, worker.data_dir, worker.device)
    for why, left_out in reasons(plan).items():
        report(f"Left out: {abridged(left_out)}: {why}")
    choosing, testing = plan.counts()
    report(f"{choosing} trainings to select groups, then {testing} on the whole training set for the test accuracy.")
    if worker.only_plan:
        _print_plan(plan, worker)
    else:
        _write(plan, _tune(plan, out, worker), out, title)


def _print_plan(plan: "TuningPlan", worker: WorkerOptions) -> None:
    """Print the trainings and estimate their time."""
    from landscape.tuning.feasibility import seconds_per_training
    from landscape.tuning.report import duration

    for configuration in plan.tried():
        echo(f"  {configuration}, {plan.tuning.runs} seeds")
    if any(len(configurations[0].options) > 1 for configurations in plan.possible.values()):
        echo("  (the strategy sequential combines each G_C with the selected G_M; here, that of equal accuracies)")
    seconds = seconds_per_training(plan, worker.data_dir, worker.device)
    choosing, testing = plan.counts()
    whole = 1 + plan.samples["validation"] / plan.samples["train"]
    echo(
        f"Estimated time on this device: {duration(seconds)} per training, "
        f"{duration(seconds * (choosing + whole * testing))} in sequence."
    )


def _tune(plan: "TuningPlan", out: Path, worker: WorkerOptions) -> "Outcome":
    from landscape.tuning.tune import TuningBackend, tune

    out.mkdir(parents=True, exist_ok=True)
    storage = worker.storage or f"sqlite:///{out / 'tuning.sqlite3'}"
    try:
        place = TuningBackend(storage, worker.data_dir, worker.device)
        return tune(plan, place, jobs=worker.jobs, on_trained=_print_training)
    except KeyboardInterrupt:
        echo("Interrupted. Finished trainings are kept; run the same command to continue.", err=True)
        raise


def _print_training(recipe: Recipe, row: Mapping[str, Any]) -> None:
    """Print a line for a finished training."""
    name = Configuration(recipe.norm, **recipe.norm_options)
    part = "validation" if recipe.validation else "test"
    diverged = ", diverged" if row["score"] != row["score"] else ""
    report(
        f"{name}, seed {recipe.seed}: {part} accuracy {row[f'{part}_accuracy']:.2%}{diverged}, {row['seconds']:.1f} s"
    )


def _write(plan: "TuningPlan", outcome: "Outcome", out: Path, title: str) -> None:
    from landscape.files import whole_file
    from landscape.tuning.report import accuracies, caption, markdown, write_parquet

    table = accuracies(outcome.trials, outcome.chosen)
    text = "\n".join([*([title + "\n"] if title else []), markdown(table, plan), caption(plan, outcome.trials)]) + "\n"
    write_parquet(table, out / "table.parquet")
    write_parquet(outcome.trials, out / "trials.parquet")
    with whole_file(out / "table.md") as file:
        file.write(text.encode())
    echo(f"\n{text}")
    report(f"Table: {out / 'table.md'}")
