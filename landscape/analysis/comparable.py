"""Groups of runs that may be compared, and what a reader of a comparison must know about them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.analysis.measures import flatten_lists

SETTINGS = (
    *("recipe", "dataset", "samples", "model", "criterion", "batch_size", "epochs", "base_lr", "schedule", "optimizer"),
    *("momentum", "nesterov", "weight_decay", "clip_norm", "train_samples", "precision", "mode", "direction"),
    *("relative", "every", "overhead", "devices", "lr_start", "lr_end", "rise"),
)
"""Facts that runs of one band, and of one comparison, must share, as well as the step sizes."""
HANDFUL = 0.05
"""Share of the updates that must hold less than half of a sum for a mean to describe them."""


def runs_of(frame: pd.DataFrame) -> pd.Series:
    """Return the run of each row, where none is recorded.

    A run begins where the step is not larger than in the row before, or where the norm or the seed is another.

    Examples:
        >>> runs_of(pd.DataFrame({"step": [0, 1, 0, 1, 2]})).tolist()
        ['run 1', 'run 1', 'run 2', 'run 2', 'run 2']
    """
    begins = np.diff(frame["step"].to_numpy(float), prepend=np.inf) <= 0
    for name in ("norm", "groups", "seed"):
        if name in frame:
            values = frame[name].astype(object).where(frame[name].notna(), None).to_numpy()
            begins[1:] |= values[1:] != values[:-1]
    return pd.Series([f"run {run}" for run in np.cumsum(begins)], frame.index)


def step_sizes_of(run: pd.DataFrame) -> str:
    """Return the step sizes of a run as text.

    They are multiples of the learning rate if the run recorded them so. Those of a function of the step are described
    by the first update.
    """
    first = run.loc[run["step_sizes"].notna()].head(1)
    if first.empty:
        return "none"
    sizes = flatten_lists(first, "step_sizes")[0]
    relative = bool(first["relative"].fillna(False).iloc[0]) if "relative" in first else False
    scale = float(first["lr"].iloc[0]) if relative else 1.0
    numbers = [f"{size / scale if scale else np.nan:.4g}" for size in sizes]
    if len(sizes) > 4 and np.allclose(np.diff(sizes), sizes[1] - sizes[0], rtol=1e-6):  # The rest is known.
        numbers = [*numbers[:2], "…", numbers[-1]]
    text = ", ".join(numbers)
    return f"{text} times the learning rate" if relative else text


def comparable_groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield runs that share settings, with their differing facts.

    Args:
        frame: Rows with a column ``run``.

    Yields:
        The facts in which this group differs from others, such as ``"epochs 2, every 1"`` (empty for a single group),
        and its rows.
    """
    names = [name for name in SETTINGS if name in frame]
    runs = frame.groupby("run", observed=True, sort=False)
    facts = runs[names].first() if names else pd.DataFrame(index=runs.size().index)
    facts["step sizes"] = [step_sizes_of(rows) for _, rows in runs]
    records = pd.DataFrame(facts.astype(object).where(facts.notna(), None)).to_dict("records")
    differing = [name for name in facts.columns if len({repr(run[name]) for run in records}) > 1]
    texts = [", ".join(shown(str(name), run[name]) for name in differing) for run in records]
    labels = dict(zip(facts.index, texts, strict=True))
    label = np.array([labels[run] for run in frame["run"]], dtype=object)
    for text in dict.fromkeys(texts):
        yield text, pd.DataFrame(frame[label == text])


def shown(name: str, value: Any) -> str:
    """Return name and value of a setting as text."""
    text = "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {text}"


def notes_on_runs(group: pd.DataFrame, in_group: str) -> Iterator[str]:
    """Yield sentences on seeds, early ends and step sizes.

    Args:
        group: Rows of runs that share their settings, with the columns ``run``, ``band`` and ``seed``.
        in_group: Text that names the group.
    """
    runs = group.groupby(["band", "run"], observed=True).agg(seed=("seed", "first"), last=("step", "max")).reset_index()
    for _, same in runs.groupby(["band", "seed"], observed=True):
        if len(same) > 1:
            names, (band, seed) = " and ".join(map(str, same["run"])), same[["band", "seed"]].to_numpy()[0]
            yield f"{band}{in_group}: seed {seed} was recorded {len(same)} times ({names}): their mean is used."
    last = dict(zip(runs["run"], runs["last"], strict=True))
    longest = max(last.values())
    for run, step in last.items():
        if step + 1 < 0.95 * (longest + 1):
            yield f"{run} ends at step {step:,} of {longest:,}: its later phases are missing."
    if short := share_beyond_step_sizes(group):
        yield (
            f"In {short:.0%} of the updates{in_group} the largest step size is below the learning rate: the range does "
            "not see the step that is taken, and lost_share and sharpness are missing there."
        )


def share_beyond_step_sizes(group: pd.DataFrame) -> float:
    """Return the share of updates with too small step sizes."""
    values, counts = flatten_lists(group, "step_sizes")
    held = counts > 0
    if not held.any() or "lr" not in group:
        return 0.0
    largest = np.maximum.reduceat(values, (np.cumsum(counts) - counts)[held])
    return float(np.mean(largest * (1 + 1e-9) < group["lr"].to_numpy(float, na_value=np.nan)[held]))


def updates_that_rule(sizes: np.ndarray) -> int | None:
    """Return how many updates hold half of a sum.

    Args:
        sizes: Sizes of the updates of a phase.

    Returns:
        The number, or None unless it is a handful: at most 5 % of 20 updates or more.

    Examples:
        >>> updates_that_rule(np.r_[np.ones(99), 1000.0]), updates_that_rule(np.ones(100))
        (1, None)
    """
    if len(sizes) < 20 or (sizes < 0).any() or not sizes.sum() > 0:
        return None
    largest = np.cumsum(np.sort(sizes)[::-1])
    count = int(np.searchsorted(largest, largest[-1] / 2)) + 1
    return count if count <= HANDFUL * len(sizes) else None


def loss_edges(losses: Sequence[np.ndarray], bins: int) -> np.ndarray | None:
    """Return edges of bins of training loss for all runs.

    The bins cover the overlap of the runs, each between its 5 % and 95 % quantile, and hold equally many updates of all
    runs together.

    Args:
        losses: Finite training losses of each run.
        bins: Number of bins.

    Returns:
        Ascending edges, (bins + 1,), or None if the runs have no loss in common.
    """
    losses = [of for of in losses if len(of) >= 2]  # A run that diverges at once has no losses to share.
    if not losses:
        return None
    low = max(float(np.quantile(of, 0.05)) for of in losses)
    high = min(float(np.quantile(of, 0.95)) for of in losses)
    if not low < high:
        return None
    within = np.concatenate(losses)
    within = within[(within >= low) & (within <= high)]
    edges = np.quantile(within, np.linspace(0, 1, bins + 1)) if len(within) else np.array([])
    return np.r_[low, edges[1:-1], high] if len(np.unique(edges)) == bins + 1 else None
