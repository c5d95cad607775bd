"""The words under a figure: what was measured, on what, and how it was joined."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from landscape.analysis.measures import flatten_lists
from landscape.analysis.summary import has_measure, is_finite
from landscape.names import MEASURES, TITLES
from landscape.text import short

DIRECTIONS = {"gradient": "the gradient", "update": "the optimizer's update"}
QUOTED = 3
"""Most sentences on what could not be read."""
MODES = {"training": ", in training mode (batch statistics)", "evaluation": ", in evaluation mode (running statistics)"}


def caption(frame: pd.DataFrame, measures: Sequence[str], points: int, unread: Sequence[str] = ()) -> str:
    """Say what a figure shows: step sizes, batch, statistics, measures, runs and how they are joined, and any gaps.

    Args:
        frame: All rows, with a column ``band`` and the columns of each measure.
        measures: The measures that are drawn, by name.
        points: Most points that a band is drawn with.
        unread: Sentences on what could not be read.
    """
    known = {measure: has_measure(frame, measure) for measure in measures}
    any_known = np.logical_or.reduce(list(known.values()))
    drawn = frame if any_known.all() else frame.loc[any_known]  # a copy of a million rows is not made for nothing
    band = any(MEASURES[measure].band for measure in measures)
    line = any(MEASURES[measure].line for measure in measures)
    sentences = [
        _trained(drawn),
        _probes(drawn),
        *(_measure(measure, alone=len(measures) == 1) for measure in measures),
        _zero(drawn, measures),
        _runs(drawn, band, line),
        _updates(drawn, points, band, line),
        _left_out(frame, known),
        _not_finite(frame, known),
        *(f"Left out: {short(sentence.partition('; ')[0].rstrip('.'), 300)}." for sentence in unread[:QUOTED]),
        f"And {len(unread) - QUOTED:,} more are left out." if len(unread) > QUOTED else "",
    ]
    return " ".join(filter(None, sentences))


def _trained(frame: pd.DataFrame) -> str:
    """What was trained on how much, and how high the learning rate went where a schedule moved it."""
    model, dataset, samples, epochs = (_only(frame, fact) for fact in ("model", "dataset", "samples", "epochs"))
    if model is None or dataset is None or not all(isinstance(count, int | np.integer) for count in (samples, epochs)):
        return ""
    names = [short(TITLES.get(name, str(name))) for name in (model, dataset)]
    return (
        f"{names[0]} on {samples:,} samples of {names[1]}, {epochs:,} epoch{'s' if epochs != 1 else ''}{_rates(frame)}."
    )


def _rates(frame: pd.DataFrame) -> str:
    if _only(frame, "schedule") in (None, "constant"):
        return ""
    peaks = {band: f"{max(rows['lr']):.2g}" for band, rows in frame.groupby("band", observed=True)}
    usual = statistics.mode(peaks.values())
    others = [f" ({band}: {peak})" for band, peak in peaks.items() if peak != usual]
    return f" at learning rates up to {usual}{''.join(others)}"


def _probes(frame: pd.DataFrame) -> str:
    batch = _only(frame, "batch_size")
    samples = f" of {batch:,} samples" if isinstance(batch, int | np.integer) else ""
    direction = DIRECTIONS.get(_only(frame, "direction"), "the probed direction")
    return (
        f"Measured at {_step_sizes(frame)}, along {direction}, on the batch{samples} of each probed update"
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
    return f"Step size 0, which moves nothing, is left out of the {' and the '.join(titles)}."


def _step_sizes(frame: pd.DataFrame) -> str:
    """The step sizes if all updates share them, or the shared multiples of the learning rate, or else the range."""
    sizes, counts = flatten_lists(frame, "step_sizes")
    if (counts == counts[0]).all():
        rows = sizes.reshape(len(frame), -1)
        if (rows == rows[0]).all():
            return f"step sizes {_enumeration(rows[0])}"
        lr = frame["lr"].to_numpy()
        largest = lr.argmax()  # a warm-up may begin with a learning rate of 0
        if lr[largest] > 0 and np.allclose(rows, np.outer(lr, rows[largest] / lr[largest]), atol=0):
            return f"{_enumeration(rows[largest] / lr[largest])} times the learning rate"
    return f"step sizes from {sizes.min():.4g} to {sizes.max():.4g}"


def _enumeration(values: Sequence[float] | np.ndarray) -> str:
    words = [f"{value:.4g}" for value in values]
    return ", ".join(words if len(words) <= 4 else [*words[:2], "…", words[-1]])


def _runs(frame: pd.DataFrame, band: bool, line: bool) -> str:
    """How many runs a band joins; they are seeds only if no two of them have the same."""
    bands = frame.groupby("band", observed=True)
    runs = list(bands["run"].nunique()) if "run" in frame else [1]
    word = "seed" if "seed" in frame and list(bands["seed"].nunique()) == runs else "run"
    what = "band" if band else "line"
    if max(runs) == 1:
        return f"One {word} per {what}."
    number = f"{max(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    how = " and ".join(["the band spans all of them"] * band + ["the line is their mean"] * line)
    return f"{number} {word}s per {what}, joined: {how}."


def _updates(frame: pd.DataFrame, points: int, band: bool, line: bool) -> str:
    steps = frame["step"].unique()
    sizes = frame.groupby([name for name in ("band", "run") if name in frame], observed=True).size().to_numpy()
    least, most = sizes.min(), sizes.max()
    number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    how = " and ".join(["the band keeps every extreme"] * band + ["the line is a mean"] * line)
    binned = f", drawn at {points:,} points: {how}" if len(steps) > points else ""
    return f"Updates probed in each run: {number}{binned}."


def _left_out(frame: pd.DataFrame, known: Mapping[str, np.ndarray]) -> str:
    """Which runs are not drawn; measures that lack the same of the same runs are named together."""
    titles: dict[str, list[str]] = {}
    for measure, rows in known.items():
        if not rows.all():
            reason = f"for want of {MEASURES[measure].needs[0]}: {_runs_of(frame, ~rows)}"
            titles.setdefault(reason, []).append(MEASURES[measure].title)
    return " ".join(f"Not in the {' and the '.join(of)}, {reason}." for reason, of in titles.items())


def _runs_of(frame: pd.DataFrame, rows: np.ndarray) -> str:
    """The bands that rows belong to, and how many of a band's runs, where they are not all of it."""
    frame = frame if "run" in frame else frame.assign(run="")
    lacking, runs = (of.groupby("band", observed=True)["run"].nunique().to_dict() for of in (frame.loc[rows], frame))
    return ", ".join(
        f"{band}" if number == runs[band] else f"{band} ({number} of {runs[band]} runs)"
        for band, number in lacking.items()
    )


def _not_finite(frame: pd.DataFrame, known: Mapping[str, np.ndarray]) -> str:
    """Which bands left the finite numbers, and where; measures of which the same is true are named together."""
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
        f"NaN or infinite, so not drawn but marked above the {panel} (by a cross where a run first is): "
        f"{'; '.join(where)}."
    )


def _departures(rows: pd.DataFrame) -> str:
    """For each band, the first update that is not finite and how many there are; ``rows`` has a column ``finite``."""
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
        parts.append(f"{band} {where} ({len(lost):,} of its {len(of):,})".strip())
    return ", ".join(parts)


def _only(frame: pd.DataFrame, fact: str) -> Any:
    """The value of a fact if all rows share it."""
    values = list(frame[fact].unique()) if fact in frame else []
    return values[0] if len(values) == 1 and not pd.isna(values[0]) else None
