"""Captions of figures: step sizes, statistics, seeds, and the rows that are not drawn."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.analysis.comparable import share_beyond_step_sizes, updates_that_rule
from landscape.analysis.measures import flatten_lists
from landscape.analysis.summary import has_measure, is_finite
from landscape.names import MEASURES, TITLES
from landscape.text import short

DIRECTIONS = {"gradient": "the gradient", "update": "the optimizer's update"}
QUOTED = 3
"""Maximum number of quoted reading errors."""
NAMED = 12
"""Maximum number of bands that a sentence names."""
CHANGED = 1e-3
"""Part of the optimizer's gradient, not along the loss's, from which on the caption states it."""
MODES = {"training": ", in training mode (batch statistics)", "evaluation": ", in evaluation mode (running statistics)"}


def caption(
    frame: pd.DataFrame, measures: Sequence[str], points: int, unread: Sequence[str] = (), grey: str = ""
) -> str:
    """Return the caption of a figure.

    It states training run, step sizes, direction, batch, mode, definition of each measure, number of seeds, number of
    updates, and which rows are left out or not finite.

    Args:
        frame: All rows, with a column ``band`` and the columns of each measure.
        measures: Names of the measures that are drawn.
        points: Maximum number of points of a band.
        unread: Errors of reading the traces, one sentence each.
        grey: What the bands or lines in grey are, such as ``"those of the other panels"``; empty if there are none.
    """
    known = {measure: has_measure(frame, measure) for measure in measures}
    any_known = np.logical_or.reduce(list(known.values()))
    drawn = frame if any_known.all() else frame.loc[any_known]  # A copy of a million rows is avoided.
    band = any(MEASURES[measure].band for measure in measures)
    line = any(MEASURES[measure].line for measure in measures)
    sentences = [
        _trained(drawn),
        _probes(drawn),
        *(_measure(measure, alone=len(measures) == 1) for measure in measures),
        f"The grey {'bands' if band else 'lines'} are {grey}." if grey else "",
        _zero(drawn, measures),
        _gradient(drawn),
        _runs(drawn, band, line),
        _same_seeds(drawn),
        _reach(drawn),
        _ruled(drawn) if "loss" in measures else "",
        _updates(drawn, points, band, line),
        _left_out(frame, known),
        _not_finite(frame, known),
        *(f"Left out: {short(sentence.partition('; ')[0].rstrip('.'), 300)}." for sentence in unread[:QUOTED]),
        f"And {len(unread) - QUOTED:,} more are left out." if len(unread) > QUOTED else "",
    ]
    return " ".join(filter(None, sentences))


def _trained(frame: pd.DataFrame) -> str:
    """Return model, data set, epochs and largest learning rate."""
    model, dataset, samples, epochs = (_only(frame, fact) for fact in ("model", "dataset", "samples", "epochs"))
    if model is None or dataset is None or not all(isinstance(count, int | np.integer) for count in (samples, epochs)):
        return ""
    names = [short(TITLES.get(name, str(name))) for name in (model, dataset)]
    return (
        f"{names[0]} on {samples:,} samples of {names[1]}, {epochs:,} epoch{'s' if epochs != 1 else ''}{_rates(frame)}."
    )


def _rates(frame: pd.DataFrame) -> str:
    if _only(frame, "schedule") in (None, "constant") or "lr" not in frame:
        return ""
    peaks = {band: f"{max(rows['lr']):.2g}" for band, rows in frame.groupby("band", observed=True)}
    usual = statistics.mode(peaks.values())
    others = [f" ({band}: {peak})" for band, peak in peaks.items() if peak != usual]
    return f" at learning rates up to {usual}{_abridged(others, '')}"


def _probes(frame: pd.DataFrame) -> str:
    batch = _only(frame, "batch_size")
    samples = f" of {batch:,} samples" if isinstance(batch, int | np.integer) else ""
    direction = DIRECTIONS.get(_only(frame, "direction"), "the probed direction")
    return (
        f"Measured at {_step_sizes(frame)} along {direction}, on the batch{samples} of each update"
        f"{MODES.get(_only(frame, 'mode'), '')}."
    )


def _measure(measure: str, alone: bool) -> str:
    name = MEASURES[measure]
    band = "band" if name.line else "band with thin edges"
    parts = [f"{kind}: {words}" for kind, words in ((band, name.band), ("line", name.line)) if words]
    if alone:
        return " ".join(f"{part.capitalize()}." for part in parts)
    return f"{name.title.capitalize()}, {'; '.join(parts)}."


def _zero(frame: pd.DataFrame, measures: Sequence[str]) -> str:
    titles = [MEASURES[measure].title for measure in measures if not MEASURES[measure].at_zero]
    if not titles or flatten_lists(frame, "step_sizes")[0].all():
        return ""
    return f"Step size 0 is left out of the {' and the '.join(titles)} (undefined)."


def _gradient(frame: pd.DataFrame) -> str:
    """Return the distance of the optimizer's gradient from the loss's."""
    rest = frame["gradient_rest"].dropna() if "gradient_rest" in frame else []
    if not len(rest) or max(rest) < CHANGED:
        return ""
    return f"Of the optimizer's gradient {np.median(rest):.0%} is not along the loss's (median), as after clipping."


def _step_sizes(frame: pd.DataFrame) -> str:
    """Return the step sizes if all updates share them.

    Otherwise return their common multiples of the learning rate, or their range.
    """
    sizes, counts = flatten_lists(frame, "step_sizes")
    if not len(sizes):
        return "unknown step sizes"
    if (counts == counts[0]).all():
        rows = sizes.reshape(len(frame), -1)
        if (rows == rows[0]).all():
            return f"step sizes {_enumeration(rows[0])}"
        lr = frame["lr"].to_numpy() if "lr" in frame else np.zeros(len(frame))
        largest = lr.argmax()  # A warm-up may start at a learning rate of 0.
        if lr[largest] > 0 and np.allclose(rows, np.outer(lr, rows[largest] / lr[largest]), atol=0):
            return f"{_enumeration(rows[largest] / lr[largest])} times the learning rate"
    return f"step sizes from {sizes.min():.4g} to {sizes.max():.4g}"


def _enumeration(values: Sequence[float] | np.ndarray) -> str:
    words = [f"{value:.4g}" for value in values]
    return ", ".join(words if len(words) <= 4 else [*words[:2], "…", words[-1]])


def _runs(frame: pd.DataFrame, band: bool, line: bool) -> str:
    """Return the number of runs per band."""
    bands = frame.groupby("band", observed=True)
    runs = list(bands["run"].nunique()) if "run" in frame else [1]
    # Runs are called seeds if no two of a band have the same seed.
    word = "seed" if "seed" in frame and list(bands["seed"].nunique()) == runs else "run"
    what = "band" if band else "line"
    if max(runs) == 1:
        return f"One {word} per {what}."
    number = f"{max(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    how = ", ".join(["the band covers all of them"] * band + ["the line is their mean"] * line)
    return f"{number} {word}s per {what}: {how}."


def _same_seeds(frame: pd.DataFrame) -> str:
    """Return the seeds of which a band has several runs."""
    if "run" not in frame or "seed" not in frame:
        return ""
    runs = pd.DataFrame(frame.loc[frame["seed"].notna(), ["band", "seed", "run"]])
    runs = runs[~runs.duplicated()]
    pairs = pd.DataFrame(runs[["band", "seed"]])
    twice = pd.DataFrame(pairs[pairs.duplicated()])
    twice = pd.DataFrame(twice[~twice.duplicated()])
    parts = [f"{row['band']} (seed {row['seed']})" for row in twice.to_dict("records")]
    return f"Seeds that were run more than once: {_abridged(parts)}." if parts else ""


def reservations(frame: pd.DataFrame) -> list[str]:
    """Return what may mislead about the range of losses.

    Args:
        frame: Rows with a column ``band``.

    Returns:
        Sentences on learning rates beyond the step sizes, and on bands that are ruled by a few updates.
    """
    return [sentence for sentence in (_reach(frame), _ruled(frame)) if sentence]


def _reach(frame: pd.DataFrame) -> str:
    """Return the share of updates that step beyond the ray."""
    share = share_beyond_step_sizes(frame) if "step_sizes" in frame else 0
    return f"At {share:.0%} of the updates the learning rate is beyond the largest step size." if share else ""


def _ruled(frame: pd.DataFrame) -> str:
    """Return the bands whose range is that of few updates."""
    parts = []
    for band, rows in frame.groupby("band", observed=True):
        ranges = (rows["loss_max"] - rows["loss_min"]).to_numpy(float)
        ranges = ranges[np.isfinite(ranges)]
        if count := updates_that_rule(ranges):
            parts.append(f"{band} {count:,} of {len(ranges):,}".strip())
    return f"Updates that hold half of the sum of the ranges: {_abridged(parts)}." if parts else ""


def _updates(frame: pd.DataFrame, points: int, band: bool, line: bool) -> str:
    steps = frame["step"].unique()
    sizes = frame.groupby([name for name in ("band", "run") if name in frame], observed=True).size().to_numpy()
    least, most = sizes.min(), sizes.max()
    number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    how = ", ".join(["the band keeps every minimum and maximum"] * band + ["the line is a mean"] * line)
    binned = f", drawn at {points:,} points: {how}" if len(steps) > points else ""
    return f"{number} probed updates per run{binned}."


def _left_out(frame: pd.DataFrame, known: Mapping[str, np.ndarray]) -> str:
    """Return the runs without a measure, by reason."""
    titles: dict[str, list[str]] = {}
    for measure, rows in known.items():
        if not rows.all():
            reason = f"({MEASURES[measure].needs[0]} not recorded): {_runs_of(frame, ~rows)}"
            titles.setdefault(reason, []).append(MEASURES[measure].title)
    return " ".join(f"Left out of the {' and the '.join(of)} {reason}." for reason, of in titles.items())


def _runs_of(frame: pd.DataFrame, rows: np.ndarray) -> str:
    """Return bands of rows, with counts for incomplete bands."""
    frame = frame if "run" in frame else frame.assign(run="")
    lacking, runs = (of.groupby("band", observed=True)["run"].nunique().to_dict() for of in (frame.loc[rows], frame))
    return _abridged(
        [
            f"{band}" if number == runs[band] else f"{band} ({number} of {runs[band]} runs)"
            for band, number in lacking.items()
        ]
    )


def _abridged(parts: Sequence[str], separator: str = ", ") -> str:
    more = [f" and {len(parts) - NAMED:,} more"] if len(parts) > NAMED else []
    return separator.join(parts[:NAMED]) + "".join(more)


def _not_finite(frame: pd.DataFrame, known: Mapping[str, np.ndarray]) -> str:
    """Return the updates that are not finite, by measure."""
    titles: dict[str, list[str]] = {}
    rows = pd.DataFrame(frame[["band", "step"]]).assign(run=frame.get("run", ""))
    for measure, held in known.items():
        if departures := _departures(pd.DataFrame(rows.assign(finite=is_finite(frame, measure))[held])):
            titles.setdefault(departures, []).append(MEASURES[measure].title)
    if not titles:
        return ""
    where = [words if len(known) == 1 else f"{' and '.join(of)}: {words}" for words, of in titles.items()]
    panel = "panel" if len(known) == 1 else "panels"
    return (
        f"Updates with NaN or infinite values are not drawn but marked above the {panel} (cross: first of a run): "
        f"{'; '.join(where)}."
    )


def _departures(rows: pd.DataFrame) -> str:
    """Return the non-finite updates of each band.

    Args:
        rows: Rows with the columns ``band``, ``run``, ``step`` and ``finite``.
    """
    parts = []
    for band, of in rows.groupby("band", observed=True):
        lost, runs = pd.DataFrame(of[~of["finite"]]), len(of["run"].unique())
        if lost.empty:
            continue
        first = lost["step"].min()
        later = of["finite"].to_numpy()[of["step"].to_numpy() > first]
        if runs > 1:
            where = f"in {len(lost['run'].unique())} of {runs} runs, first at update {first:,}"
        elif len(lost) == 1:
            where = f"at update {first:,}"
        else:
            where = f"first at update {first:,}" if np.any(later) else f"from update {first:,} on"
        parts.append(f"{band} {where} ({len(lost):,} of {len(of):,})".strip())
    return _abridged(parts)


def _only(frame: pd.DataFrame, fact: str) -> Any:
    """Return the value that all rows of a column share."""
    values = list(frame[fact].unique()) if fact in frame else []
    return values[0] if len(values) == 1 and not pd.isna(values[0]) else None
