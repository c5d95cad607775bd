"""Table of accuracies from trials, like tables 1 and 2 of arXiv:2007.08554."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from landscape.files import whole_file
from landscape.names import NORMS, TITLES, options_of
from landscape.training.recipe import Recipe
from landscape.tuning.plan import TuningPlan
from landscape.tuning.strategies import Configuration, best


def accuracies(trials: pd.DataFrame, chosen: Mapping[str, Configuration | None]) -> pd.DataFrame:
    """Return the accuracies of the configurations of each norm.

    For norms with groups of both kinds, the best G_M of each G_C, as in table 1 of the paper; else each configuration.

    Args:
        trials: ``trials`` of :class:`landscape.tuning.tune.Outcome`.
        chosen: ``chosen`` of :class:`landscape.tuning.tune.Outcome`.

    Returns:
        One row per configuration: ``norm``, ``configuration`` (as text), ``channel_groups``, ``groups``, ``chosen``
        (True for the best of the norm, which alone is tested), then ``validation_accuracy`` and ``test_accuracy``
        (means over runs, 0 to 1; NaN if there was no run or one diverged), each with ``_spread`` (sample standard
        deviation) and ``_runs`` (number).
    """
    rows = []
    for configuration in (each for norm in chosen for each in _shown(trials, norm)):
        row: dict[str, Any] = {"norm": configuration.norm, "configuration": str(configuration)}
        row |= {name: getattr(configuration, name) for name in ("channel_groups", "groups")}
        row["chosen"] = configuration == chosen[configuration.norm]
        for part, column in (("tuning", "validation_accuracy"), ("test", "test_accuracy")):
            selected = _is_run_of(trials, configuration, part)
            values = np.where(np.isfinite(trials["train_loss"]), trials[column], np.nan)[selected]
            row[column] = values.mean() if len(values) else np.nan
            row[f"{column}_spread"] = values.std(ddof=1) if len(values) > 1 else np.nan
            row[f"{column}_runs"] = len(values)
        rows.append(row)
    return pd.DataFrame(rows).astype({"channel_groups": "Int64", "groups": "Int64"})


def _shown(trials: pd.DataFrame, norm: str) -> list[Configuration]:
    """Return the configurations of a norm that have a row."""
    names = options_of(norm)
    tried = trials[(trials["norm"] == norm) & (trials["part"] == "tuning")]
    scores: dict[tuple[int, ...], dict[Configuration, list[float]]] = {}
    finished = np.where(np.isfinite(tried["train_loss"]), tried["validation_accuracy"], np.nan)
    for row in tried.assign(score=finished).to_dict("records"):
        configuration = Configuration(norm, **{name: int(row[name]) for name in names})
        key = (configuration.channel_groups or 0,) if len(names) > 1 else tuple(configuration.options.values())
        scores.setdefault(key, {}).setdefault(configuration, []).append(row["score"])
    return [best(each) or next(iter(each)) for _, each in sorted(scores.items())]


def _is_run_of(trials: pd.DataFrame, configuration: Configuration, part: str) -> np.ndarray:
    """Return a mask (trials,) of the runs of a configuration."""
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
        name, runs = _name(row, plan.tuning.recipe), row["validation_accuracy_runs"]
        validation, tested = (_percent(row, f"{part}_accuracy") for part in ("validation", "test"))
        lines.append(f"| {name} | {validation} | {tested} | {runs} |")
    return "\n".join(lines) + "\n"


def _name(row: Mapping[str, Any], recipe: Recipe) -> str:
    """Return a row's norm, on several devices with groups' size."""
    options = {name: int(row[name]) for name in options_of(row["norm"])}
    _, layer = replace(recipe, norm=row["norm"], **options).layer
    if recipe.devices == 1 or "groups" not in layer:
        return row["configuration"]
    groups = layer["groups"]
    size = recipe.batch_size / groups
    shown = f"{size:.0f}" if size.is_integer() else f"{int(size)} or {int(size) + 1}"
    symbols = [f"{'G_C' if name == 'channel_groups' else 'G_M'} = {value}" for name, value in options.items()]
    return f"{', '.join([NORMS[row['norm']].title, *symbols])} ({groups} groups of {shown})"


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
        _devices(recipe),
        _tried(plan),
        f"{len(trials)} trainings took {time} ({devices}).",
        *(f"Left out: {abridged(left_out)}: {why}" for why, left_out in reasons(plan).items()),
    ]
    return " ".join(filter(None, sentences))


def _devices(recipe: Recipe) -> str:
    if recipe.devices == 1:
        return ""
    return (
        f"Groups are those of one of {recipe.devices} devices, each with {recipe.batch_size // recipe.devices} samples "
        f"of a batch: G_M is {recipe.devices} G_M groups of the batch, and BatchNorm normalizes each device's part."
    )


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
