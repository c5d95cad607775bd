"""Table of accuracies from trials, like tables 1 and 2 of arXiv:2007.08554."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

from landscape.files import whole_file
from landscape.names import NORMS, TITLES, options_of
from landscape.tuning.plan import TuningPlan
from landscape.tuning.strategies import Configuration


def accuracies(trials: pd.DataFrame, chosen: Mapping[str, Configuration | None]) -> pd.DataFrame:
    """Return the accuracies of the chosen configuration of each norm.

    Args:
        trials: ``trials`` of :class:`landscape.tuning.tune.Outcome`.
        chosen: ``chosen`` of :class:`landscape.tuning.tune.Outcome`.

    Returns:
        One row per norm: ``norm``, ``configuration`` (as text; None if every configuration had a diverged run),
        ``channel_groups``, ``groups``, then ``validation_accuracy`` and ``test_accuracy`` (means over runs, 0 to 1; NaN
        if there was no run or one diverged), each with ``_spread`` (sample standard deviation) and ``_runs`` (number).
    """
    rows = []
    for norm, configuration in chosen.items():
        row = {"norm": norm, "configuration": None if configuration is None else str(configuration)}
        row |= {name: getattr(configuration, name, None) for name in ("channel_groups", "groups")}
        for part, column in (("tuning", "validation_accuracy"), ("test", "test_accuracy")):
            selected = _is_run_of(trials, configuration, part)
            values = np.where(np.isfinite(trials["train_loss"]), trials[column], np.nan)[selected]
            row[column] = values.mean() if len(values) else np.nan
            row[f"{column}_spread"] = values.std(ddof=1) if len(values) > 1 else np.nan
            row[f"{column}_runs"] = len(values)
        rows.append(row)
    return pd.DataFrame(rows).astype({"channel_groups": "Int64", "groups": "Int64"})


def _is_run_of(trials: pd.DataFrame, configuration: Configuration | None, part: str) -> np.ndarray:
    """Return a mask (trials,) of the runs of a configuration."""
    if configuration is None:
        return np.zeros(len(trials), bool)
    same = (trials["norm"] == configuration.norm) & (trials["part"] == part)
    for name, value in configuration.options.items():
        same &= trials[name] == value
    return same.to_numpy(bool)


def markdown(table: pd.DataFrame, plan: TuningPlan) -> str:
    """Format a table of :func:`accuracies` as Markdown."""
    images = plan.samples["test"]
    test = f"test accuracy ({images:,} images)" if images else "test accuracy"
    lines = [f"| norm | validation accuracy | {test} | runs |", "|---|---|---|---|"]
    for row in table.to_dict("records"):
        name, runs = row["configuration"] or NORMS[row["norm"]].title, row["validation_accuracy_runs"]
        validation = _percent(row, "validation_accuracy") if runs else "every configuration diverged"
        lines.append(f"| {name} | {validation} | {_percent(row, 'test_accuracy')} | {runs or '-'} |")
    return "\n".join(lines) + "\n"


def _percent(row: Mapping[str, float], column: str) -> str:
    if not row[f"{column}_runs"]:
        return "-"
    if np.isnan(row[column]):
        return "diverged"
    spread = row[f"{column}_spread"]
    return f"{row[column]:.2%}" + ("" if np.isnan(spread) else f" ± {spread:.2%}")


def caption(plan: TuningPlan, trials: pd.DataFrame) -> str:
    """Return the caption of a table.

    It states recipe, data, seeds, strategy, training time, and the configurations that were left out.
    """
    tuning, recipe, samples = plan.tuning, plan.tuning.recipe, plan.samples
    whole = samples["train"] + samples["validation"]
    seeds = _list(range(tuning.runs))
    time, devices = duration(trials["seconds"].to_numpy(float).sum()), _list(sorted(set(trials["device"])))
    sentences = [
        f"Recipe {recipe.name}: {TITLES.get(recipe.model, recipe.model)} on "
        f"{TITLES.get(recipe.dataset, recipe.dataset)}, {recipe.epochs} epoch{'s' if recipe.epochs != 1 else ''}, "
        f"{samples['train']:,} images to train on and {samples['validation']:,} held out to choose by.",
        f"For the test accuracy the chosen configuration is trained on all {whole:,}." if samples["test"] else "",
        f"Mean and sample standard deviation over the seeds {seeds}." if tuning.runs > 1 else f"Seed {seeds}.",
        _tried(plan),
        f"{len(trials)} trainings took {time} ({devices}).",
        *(f"Left out: {abridged(left_out)}: {why}" for why, left_out in reasons(plan).items()),
    ]
    return " ".join(filter(None, sentences))


def reasons(plan: TuningPlan) -> dict[str, list[Configuration]]:
    """Return the configurations that cannot be trained, by reason."""
    by_reason: dict[str, list[Configuration]] = {}
    for configuration, reason in plan.impossible.items():
        by_reason.setdefault(reason, []).append(configuration)
    return by_reason


def _tried(plan: TuningPlan) -> str:
    """Return the sentence about the groups that were tried."""
    tuning = plan.tuning
    used = {option for norm in tuning.norms for option in options_of(norm)}
    options = (("groups", "G_M", tuning.groups), ("channel_groups", "G_C", tuning.channel_groups))
    tried = [f"{symbol} of {_list(values)}" for option, symbol, values in options if option in used]
    return f"Groups tried: {'; '.join([*tried, _strategy(plan)])}." if tried else ""


def _strategy(plan: TuningPlan) -> str:
    both = any(len(configurations[0].options) > 1 for configurations in plan.possible.values())
    if plan.tuning.strategy == "grid" or not both:
        return "every combination that a norm takes (grid)"
    return (
        "where a norm takes both, the largest G_M of those that on GhostNorm alone are within "
        f"{plan.tuning.tolerance:.2%} of the best, then G_C with it (sequential)"
    )


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def abridged(configurations: Sequence[Configuration]) -> str:
    """List up to three configurations, and the number of others."""
    more = f" and {len(configurations) - 3} more" if len(configurations) > 3 else ""
    return _list(configurations[:3]) + more


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours.

    Examples:
        >>> duration(90), duration(5400)
        ('90.0 seconds', '90.0 minutes')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame to a Parquet file atomically."""
    content = BytesIO()
    frame.to_parquet(content, index=False)
    with whole_file(path) as file:
        file.write(content.getvalue())
