"""``landscape tune``: the best groups of each norm, by trainings that several machines may share."""

from collections.abc import Callable, Mapping
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

if TYPE_CHECKING:  # --help waits for neither torch nor pandas
    from landscape.tuning.plan import TuningPlan
    from landscape.tuning.tune import Outcome

TUNABLE = [name for name, recipe in RECIPES.items() if recipe.validation]


@dataclass(frozen=True)
class WorkerOptions:
    """Where the trainings run, and where they are kept."""

    storage: str | None
    jobs: int
    device: str | None
    data_dir: Path | None
    only_plan: bool


def workshop_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that make a :class:`Workshop`, which the command gets as ``workshop``."""

    @wraps(command)
    def with_workshop(**given: Any) -> None:
        names = [field.name for field in fields(WorkerOptions)]
        command(workshop=WorkerOptions(**{name: given.pop(name) for name in names}), **given)

    options = [
        click.option("--storage", help="Database that workers share, postgresql:// or sqlite:///.  [default: in OUT]"),
        click.option("--jobs", type=int, default=1, show_default=True, help="Processes that train on this machine."),
        click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU where there is one]"),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Where data files are, or are put.  [default: the user's cache]",
        ),
        click.option("--plan", "only_plan", is_flag=True, help="Say what would be trained and for how long; no more."),
    ]
    for option in reversed(options):
        with_workshop = option(with_workshop)
    return with_workshop


@click.command("tune")
@click.option(
    "--recipe",
    type=click.Choice(TUNABLE),
    default="classify-digits",
    show_default=True,
    metavar="NAME",
    help=f"What is trained: {', '.join(TUNABLE)}.",
)
@click.option(
    "--norm",
    "norms",
    multiple=True,
    default=TuningConfig.norms,
    help=f"Normalization: {', '.join(NORMS)}. Repeatable.  [default: {', '.join(TuningConfig.norms)}]",
)
@click.option(
    "--groups",
    multiple=True,
    type=int,
    default=TuningConfig.groups,
    help=f"Groups G_M of the batch to try. Repeatable.  [default: {', '.join(map(str, TuningConfig.groups))}]",
)
@click.option(
    "--channel-groups",
    multiple=True,
    type=int,
    default=TuningConfig.channel_groups,
    help=f"Groups G_C of the channels to try. Repeatable.  [default: {', '.join(map(str, TuningConfig.channel_groups))}]",
)
@click.option(
    "--strategy",
    type=click.Choice(list(STRATEGIES)),
    default=TuningConfig.strategy,
    show_default=True,
    help="sequential: G_M on GhostNorm alone, then G_C; grid: every combination.",
)
@click.option(
    "--tolerance",
    type=float,
    default=TuningConfig.tolerance,
    show_default=True,
    help="sequential takes the largest G_M whose accuracy is this close to the best.",
)
@click.option("--runs", type=int, default=TuningConfig.runs, show_default=True, help="Seeds for each configuration.")
@click.option("--epochs", type=int, help="Passes over the training set.  [default: the recipe's]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("tuning"), show_default=True, help="Folder of results."
)
@workshop_options
def command(
    recipe: str,
    epochs: int | None,
    out: Path,
    workshop: WorkerOptions,
    **search: Any,
) -> None:
    """Choose the groups of each norm by validation accuracy, then train with them for the test accuracy.

    Trainings are trials of Optuna studies: the same command goes on where it was stopped, and several machines that
    are given the same --storage share them. Writes table.md, table.parquet and trials.parquet into OUT.
    """
    base = RECIPES[recipe] if epochs is None else replace(RECIPES[recipe], epochs=epochs)
    run(TuningConfig(base, **search), out, workshop)


def run(tuning: TuningConfig, out: Path, workshop: WorkerOptions, title: str = "") -> None:
    """Tune, write the table and print it; or only say what that would take."""
    from landscape.tuning.feasibility import check_feasible
    from landscape.tuning.report import abridged, reasons

    plan = check_feasible(tuning, workshop.data_dir, workshop.device)
    for why, left_out in reasons(plan).items():
        click.echo(f"Left out: {abridged(left_out)}: {why}")
    choosing, testing = plan.counts()
    click.echo(f"{choosing} trainings to choose by, then {testing} on the whole training set for the test accuracy.")
    if workshop.only_plan:
        _tell(plan, workshop)
    else:
        _write(plan, _tune(plan, out, workshop), out, title)


def _tell(plan: "TuningPlan", workshop: WorkerOptions) -> None:
    """Which trainings there are, and how long they take on this device."""
    from landscape.tuning.feasibility import seconds_per_training
    from landscape.tuning.report import duration

    for configuration in plan.tried():
        click.echo(f"  {configuration}, {plan.tuning.runs} seeds")
    if any(len(configurations[0].options) > 1 for configurations in plan.possible.values()):
        click.echo(
            "  (by the strategy sequential the G_M beside a G_C is the one chosen; here, if all do equally well)"
        )
    seconds = seconds_per_training(plan, workshop.data_dir, workshop.device)
    choosing, testing = plan.counts()
    whole = 1 + plan.samples["validation"] / plan.samples["train"]
    click.echo(
        f"Told from a few updates on this device, a training takes {duration(seconds)}; "
        f"one after the other they take {duration(seconds * (choosing + whole * testing))}."
    )


def _tune(plan: "TuningPlan", out: Path, workshop: WorkerOptions) -> "Outcome":
    from landscape.tuning.tune import TuningBackend, tune

    out.mkdir(parents=True, exist_ok=True)
    storage = workshop.storage or f"sqlite:///{out / 'tuning.sqlite3'}"
    try:
        place = TuningBackend(storage, workshop.data_dir, workshop.device)
        return tune(plan, place, jobs=workshop.jobs, on_trained=_say)
    except KeyboardInterrupt:
        click.echo("Interrupted. What has been trained is kept; the same command goes on from there.", err=True)
        raise


def _say(recipe: Recipe, row: Mapping[str, Any]) -> None:
    """One line for a training that has ended."""
    name = Configuration(recipe.norm, **recipe.norm_options)
    part = "validation" if recipe.validation else "test"
    diverged = ", diverged" if row["score"] != row["score"] else ""
    click.echo(
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
    click.echo(f"\n{text}\nTable: {out / 'table.md'}")
