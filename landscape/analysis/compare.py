"""Compare norms over a few seeds: ratios with intervals, at equal progress and at equal loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from landscape.analysis import statistics
from landscape.analysis.columns import normalized
from landscape.analysis.comparable import comparable_groups, loss_edges, notes_on_runs, runs_of, updates_that_rule
from landscape.analysis.labels import band_labels
from landscape.analysis.measures import has_inputs, measured
from landscape.analysis.summary import is_finite, size_of
from landscape.analysis.verdict import sentence
from landscape.errors import LandscapeError
from landscape.names import MEASURES, NORMS, check_measure

THIRDS = ("first third", "second third", "last third")
BINS = ("high loss", "middle loss", "low loss")
PHASES = (*THIRDS, *BINS)
"""Phases of training: thirds of its updates, and bins of equal training loss."""
DEFAULT = ("range", "lost_share")
"""Default measures: the height of the band, and one that a higher loss leaves alone."""


@dataclass(frozen=True)
class Comparison:
    """Ratios between norms, and what may be concluded from them.

    Attributes:
        table: One row per group of comparable runs, measure, norm and phase. Columns: ``setting`` (what sets the group
            apart), ``measure``, ``phase``, ``band`` and ``reference`` (labels of the norms), ``loss_from`` and
            ``loss_to`` (of a bin), ``seeds`` (number of pairs, or of the smaller group), ``ratio`` (of the geometric
            means over seeds), ``low`` and ``high`` (95 % interval), ``method``, ``bootstrap_low`` and
            ``bootstrap_high`` (BCa interval, a check from 10 seeds on), ``p``, ``p_holm``, ``smallest_p`` (of
            an exact test with these seeds), ``same_direction`` (seeds whose own ratio is on the side of ``ratio``),
            ``superiority`` (probability that a seed of the band exceeds one of the reference), ``ratio_of_medians``
            (the same ratio with the median over updates), ``seeds_for_1_2`` (paired seeds that a ratio of 1.2 would
            take) and ``seed_ratios`` (dict from seed to its ratio).
        seeds: The numbers that are compared: one row per group, measure, band, seed and phase (and reference, for bins
            of loss), with ``value`` (mean over updates), ``median``, ``updates`` and ``not_finite``.
        sentences: One text per pair of norms, with a line per measure.
        notes: What limits the comparison: settings that differ, repeated seeds, means ruled by a few updates.
        bands: Labels of the norms, in the order of figures.
    """

    table: pd.DataFrame
    seeds: pd.DataFrame
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    bands: tuple[str, ...]


def compare(frame: pd.DataFrame, measure: str | Sequence[str] = DEFAULT, reference: str = "batch") -> Comparison:
    """Compare the norms of recorded runs, seed by seed.

    The unit is the seed: of each run and phase one number is kept, the mean of a measure over its finite updates, as
    defined by :func:`landscape.summarize`. With the values ``v_i`` of one norm and ``r_i`` of the reference at the same
    seeds, the ratio is ``exp(mean_i log(v_i / r_i))`` with a paired t interval; where seeds do not pair, it is that of
    the geometric means, with Welch's interval. Phases are thirds of training, and three bins of training loss, over the
    losses that all runs of both norms pass through: there, runs that are ahead are compared at the same loss. P values
    are corrected by Holm's method over all norms and phases of a measure.

    Runs whose settings differ (recipe, step sizes, batch size, epochs, ...) are compared in separate groups.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``, or any frame with their columns. Without a column
            ``run`` a run begins where ``step`` falls, or ``norm`` or ``seed`` change.
        measure: Name of a measure of :func:`landscape.measured`, or several. Those that no run recorded are named in
            the notes.
        reference: Norm, or label of :func:`band_labels`, that the others are divided by; without it in a group, the
            first norm in the order of figures.

    Returns:
        A :class:`Comparison`.

    Raises:
        LandscapeError: The frame has no rows, no two norms share their settings, or no run recorded the measures.

    Examples:
        >>> rows = [{"run": f"{norm}{seed}", "norm": norm, "seed": seed, "step": step, "loss": 2 - step / 9, "lr": 0.1,
        ...          "step_sizes": [0.1, 0.2], "losses": [1.0, 1.0 + scale * (1 + seed / 10)]}
        ...         for norm, scale in (("batch", 1.0), ("none", 3.0)) for seed in range(3) for step in range(9)]
        >>> comparison = compare(pd.DataFrame(rows), measure="range")
        >>> comparison.table[["band", "phase", "ratio", "seeds", "same_direction"]].round(3).head(1)
                       band        phase  ratio  seeds  same_direction
        0  No normalization  first third    3.0      3               3

    References:
        Agarwal et al. 2021 (arXiv:2108.13264) on few runs; Holm 1979; Vargha & Delaney 2000.
    """
    measures = [measure] if isinstance(measure, str) else list(dict.fromkeys(measure))
    if not measures:
        raise LandscapeError(f"measure={measures}: must have at least one name. Use some of {', '.join(MEASURES)}.")
    for name in measures:
        check_measure(name)
    if frame.empty:
        raise LandscapeError("The frame has no rows. Use a frame of read_traces or LandscapeProbe.frame.")
    frame = normalized(frame, ("step", "loss", "step_sizes"))
    known = [name for name in measures if has_inputs(frame, name).any()]
    if not known:
        measured(frame, measures[0])  # raises, and names what is missing
    frame = frame if "run" in frame else frame.assign(run=runs_of(frame))
    frame, notes = _measured_alike(frame, known)
    _check_reference(frame, reference)
    notes += [f"{name}: no run recorded what it requires." for name in measures if name not in known]
    groups = [_Group.of(setting, rows, reference) for setting, rows in comparable_groups(frame)]
    _check_bands(groups)
    notes += [note for group in groups for note in group.notes(len(groups) > 1)]
    pairs = [pair for group in groups for pair in group.pairs(known, notes)]
    table, texts = pd.concat([pair.table for pair in pairs], ignore_index=True), []
    families = table.groupby(["setting", "measure"], sort=False)["p"]
    table["p_holm"] = families.transform(lambda p: statistics.holm(p.tolist()))
    for key, rows in table.groupby(["setting", "band", "reference"], sort=False):
        setting, band, other = map(str, key)  # pyright: ignore[reportArgumentType]
        lost = {pair.not_finite for pair in pairs if (pair.setting, pair.band) == (setting, band)}
        texts.append(sentence(rows, band, other, setting, dict(next(iter(lost)))))
    seeds = pd.concat([pair.seeds for pair in pairs], ignore_index=True).drop_duplicates(ignore_index=True)
    bands = dict.fromkeys(band for group in groups for band in group.bands)
    return Comparison(table, seeds, tuple(texts), tuple(dict.fromkeys(notes)), tuple(bands))


class _Pair(NamedTuple):
    """Rows of both tables for one norm."""

    setting: str
    band: str
    table: pd.DataFrame
    seeds: pd.DataFrame
    not_finite: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Group:
    """Runs that share their settings."""

    setting: str
    frame: pd.DataFrame
    reference: str

    @classmethod
    def of(cls, setting: str, frame: pd.DataFrame, reference: str) -> "_Group":
        bands = band_labels(frame).astype(str)
        seeds = frame["seed"] if "seed" in frame else pd.Series(np.nan, frame.index)
        # A run without a seed is a seed of its own, which pairs with no other.
        unit = seeds.astype(object).where(seeds.notna(), "run " + frame["run"].astype(str))
        third = np.minimum(3 * frame["step"] // (frame["step"].max() + 1), 2).astype(int)
        frame = frame.assign(band=bands, seed=unit.map(_seed), third=third)
        return cls(setting, frame, _reference(frame, reference))

    @property
    def bands(self) -> list[str]:
        held = list(dict.fromkeys(self.frame["band"]))
        order = list(band_labels(self.frame.drop(columns="band")).cat.categories) if "norm" in self.frame else []
        return sorted(held, key=lambda band: order.index(band) if band in order else len(held))

    def notes(self, several: bool) -> Iterator[str]:
        text = f" ({self.setting})" if several else ""
        if several:
            alone = ": not compared, as no other norm has these settings" if len(self.bands) < 2 else ""
            yield f"Separate, because settings differ: {', '.join(self.bands)} with {self.setting}{alone}."
        yield from notes_on_runs(self.frame, text)

    def pairs(self, measures: Sequence[str], notes: list[str]) -> Iterator[_Pair]:
        others = [band for band in self.bands if band != self.reference]
        sized = {name: _sized(self.frame, name) for name in measures}
        for name, rows in sized.items() if others else ():
            notes += _ruled(rows, name)
            notes += _censored(rows, name)
        for band in others:
            parts = {
                name: pd.DataFrame(rows[rows["band"].isin([band, self.reference])]) for name, rows in sized.items()
            }
            results = [_compared(rows, name, band, self.reference) for name, rows in parts.items()]
            table = pd.concat([result for result, _ in results], ignore_index=True)
            values = pd.concat([found for _, found in results], ignore_index=True)
            notes += _disagreeing(table)
            table.insert(0, "setting", self.setting)
            values.insert(0, "setting", self.setting)
            lost = next(iter(parts.values())).loc[lambda rows: ~rows["finite"]]["band"].value_counts()
            counts = tuple((name, int(lost.get(name, 0))) for name in (band, self.reference))
            yield _Pair(self.setting, band, table, values, counts)


def _measured_alike(frame: pd.DataFrame, measures: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the frame without searches that some runs lack.

    Beyond the largest step size the critical step of one run would be found, and that of another cut off there.
    """
    wanted = [name for name in measures if name.startswith("critical")]
    if not wanted or "critical_losses" not in frame:
        return frame, []
    runs, searched = frame["run"].nunique(), frame.loc[frame["critical_losses"].notna(), "run"].nunique()
    if searched in (0, runs):
        return frame, []
    note = f"{' and '.join(wanted)}: only {searched} of {runs} runs have critical=True; it is not used."
    return frame.drop(columns=["critical_losses", "critical_step_sizes"]), [note]


def _seed(seed: Any) -> str:
    return f"{seed:g}" if isinstance(seed, float | np.floating) else str(seed)


def _reference(frame: pd.DataFrame, wanted: str) -> str:
    """Return the label of the reference."""
    labels = list(dict.fromkeys(frame["band"]))
    title = NORMS[wanted].title if wanted in NORMS else wanted
    if found := [label for label in labels if label in (wanted, title)] or [
        label for label in labels if label.startswith(title)
    ]:
        return found[0]
    return str(band_labels(frame.drop(columns="band")).cat.categories[0]) if "norm" in frame else labels[0]


def _check_reference(frame: pd.DataFrame, wanted: str) -> None:
    """Raise a LandscapeError for a reference of no run."""
    labels = list(map(str, band_labels(frame).cat.categories))
    title = NORMS[wanted].title if wanted in NORMS else wanted
    if wanted == "batch" or wanted in labels or any(label.startswith(title) for label in labels):
        return
    raise LandscapeError(f"reference={wanted!r}: is none of the norms here. Use one of {', '.join(labels)}.")


def _check_bands(groups: Sequence[_Group]) -> None:
    if all(len(group.bands) < 2 for group in groups):
        held = "; ".join(f"{group.bands[0]}{f' with {group.setting}' if group.setting else ''}" for group in groups)
        raise LandscapeError(
            f"There are no two norms with the same settings: {held}. Record runs of at least two norms with the same "
            "recipe, and give your own runs the fact norm: LandscapeProbe(..., norm='batch', seed=0)."
        )


def _sized(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the size of each update that has the measure."""
    held = pd.DataFrame(frame[has_inputs(frame, measure)])
    rows = pd.DataFrame(held[["run", "band", "seed", "third", "loss"]])
    if held.empty:
        return rows.assign(size=0.0, finite=True, inside=True)
    held = measured(held, measure)
    inside = held.get(f"{measure}_inside", pd.Series(True, held.index))
    return rows.assign(size=size_of(held, measure), finite=is_finite(held, measure), inside=inside)


def _ruled(rows: pd.DataFrame, measure: str) -> Iterator[str]:
    for _, part in rows[rows["finite"]].groupby(["band", "third"]):
        band, third = next(iter(part["band"])), THIRDS[next(iter(part["third"]))]
        for run, updates in part.groupby("run", observed=True):
            if count := updates_that_rule(np.asarray(updates["size"], float)):
                yield (
                    f"{measure}, {band}, {third}: half of the mean of {run} comes from {count} of "
                    f"{len(updates):,} updates. Look at ratio_of_medians, too."
                )
                break


def _censored(rows: pd.DataFrame, measure: str) -> Iterator[str]:
    for band, part in rows[rows["finite"]].groupby("band"):
        beyond = float(1 - np.asarray(part["inside"], float).mean())
        if beyond > 0:
            yield (
                f"{measure}, {band}: in {beyond:.0%} of the updates the step lies beyond the largest step size "
                "(right-censored), which is used instead."
            )


def _disagreeing(table: pd.DataFrame) -> Iterator[str]:
    """Yield notes on intervals that disagree about 1."""
    for row in table.to_dict("records"):
        bounds = [(row["low"], row["high"]), (row["bootstrap_low"], row["bootstrap_high"])]
        if np.isfinite(bounds).all() and len({low <= 1 <= high for low, high in bounds}) == 2:
            yield (
                f"{row['measure']}, {row['band']}, {row['phase']}: only one of the {row['method']} interval "
                f"({bounds[0][0]:.3g} to {bounds[0][1]:.3g}) and the BCa bootstrap ({bounds[1][0]:.3g} to "
                f"{bounds[1][1]:.3g}) excludes a ratio of 1. More seeds would tell."
            )


def _compared(rows: pd.DataFrame, measure: str, band: str, reference: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the ratios of phases, and the seeds' values."""
    finite = rows[np.isfinite(rows["loss"])]
    edges = loss_edges([np.asarray(part["loss"], float) for _, part in finite.groupby("run", observed=True)], len(BINS))
    paired = _same_seeds(rows, band, reference)
    results, values = [], []
    for index, phase in enumerate(PHASES):
        limits = (np.nan, np.nan)
        if phase in THIRDS:
            part = rows[rows["third"] == index]
        elif edges is None:
            continue
        else:
            position = len(PHASES) - 1 - index  # the first bin has the highest losses
            limits = (float(edges[position]), float(edges[position + 1]))
            above = rows["loss"] > limits[0] if position else rows["loss"] >= limits[0]
            part = rows[above & (rows["loss"] <= limits[1])]
        seeds = _per_seed(pd.DataFrame(part))
        names = {"measure": measure, "phase": phase}
        results.append(names | _row(seeds, band, reference, paired, limits))
        values.append(seeds.assign(**names, reference=reference if phase in BINS else ""))
    return pd.DataFrame(results), pd.concat(values, ignore_index=True)


def _same_seeds(rows: pd.DataFrame, band: str, reference: str) -> bool:
    seeds = [set(rows.loc[rows["band"] == name, "seed"]) for name in (band, reference)]
    return seeds[0] == seeds[1]


def _per_seed(part: pd.DataFrame) -> pd.DataFrame:
    """Return mean and median over the updates of each seed.

    Several runs of one seed count as their mean.
    """
    part = part.assign(value=part["size"].where(part["finite"]), lost=~part["finite"])
    runs = part.groupby(["band", "seed", "run"], observed=True).agg(
        value=("value", "mean"), median=("value", "median"), updates=("value", "size"), not_finite=("lost", "sum")
    )
    seeds = runs.groupby(["band", "seed"]).agg(
        {"value": "mean", "median": "mean", "updates": "sum", "not_finite": "sum"}
    )
    return seeds.reset_index()


def _row(seeds: pd.DataFrame, band: str, reference: str, paired: bool, limits: tuple[float, float]) -> dict[str, Any]:
    """Return the statistics of one phase.

    They are NaN where a value is not positive.
    """
    of = {name: seeds[seeds["band"] == name].set_index("seed") for name in (band, reference)}
    ours, theirs = (pd.DataFrame(of[name][of[name]["value"].notna()]) for name in (band, reference))
    if paired:
        both = ours.index.intersection(theirs.index)
        ours, theirs = ours.loc[both], theirs.loc[both]
    facts: dict[str, Any] = {"band": band, "reference": reference, "loss_from": limits[0], "loss_to": limits[1]}
    facts["seeds"] = min(len(ours), len(theirs))
    a, b = ours["value"].to_numpy(float), theirs["value"].to_numpy(float)
    if facts["seeds"] == 0 or min(a.min(), b.min()) <= 0:
        unknown = (
            *("ratio", "low", "high", "bootstrap_low", "bootstrap_high"),
            *("p", "smallest_p", "superiority", "ratio_of_medians"),
        )
        method = "no value" if facts["seeds"] == 0 else "not positive"
        return (
            facts
            | dict.fromkeys(unknown, np.nan)
            | {
                "method": method,
                "same_direction": 0,
                "seeds_for_1_2": None,
                "seed_ratios": {},
            }
        )
    result, (low, high) = statistics.ratio(a, b, paired), statistics.bootstrap_interval(a, b, paired)
    own = a / (b if paired else np.exp(np.log(b).mean()))
    one = result.method == statistics.SINGLE
    medians = np.log(ours["median"].to_numpy(float)).mean() - np.log(theirs["median"].to_numpy(float)).mean()
    return facts | {
        "ratio": result.ratio,
        "low": result.low,
        "high": result.high,
        "method": result.method,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "p": result.p,
        "smallest_p": np.nan if one else statistics.smallest_p(len(a), len(b), paired),
        "same_direction": int((np.log(own) * np.log(result.ratio) > 0).sum()),
        "superiority": statistics.superiority(a, b),
        "ratio_of_medians": float(np.exp(medians)),
        "seeds_for_1_2": statistics.seeds_needed(result.deviation),
        "seed_ratios": {str(seed): float(value) for seed, value in zip(ours.index, own, strict=True)},
    }
