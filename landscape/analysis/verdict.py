"""Sentences on a comparison of two norms: what it shows, and what it cannot show."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from landscape.analysis.statistics import PAIRED, SINGLE, WELCH, seeds_needed
from landscape.names import MEASURES

LEVEL = 0.05
"""Level of the tests, after Holm's correction."""


def sentence(rows: pd.DataFrame, band: str, reference: str, setting: str, not_finite: Mapping[str, int]) -> str:
    """Return the text on one pair of norms.

    It is a heading, and a line per measure.

    Args:
        rows: Rows of a comparison's table for the pair.
        band: Label of the norm.
        reference: Label of the norm that it is divided by.
        setting: What sets this group of runs apart from others, or nothing.
        not_finite: Number of updates by label that are left out, as the first measure is missing, NaN or infinite.
    """
    compared = pd.DataFrame(rows[rows["method"].isin([PAIRED, WELCH, SINGLE])])
    method = str(compared["method"].iloc[0]) if len(compared) else "no ratio"
    n = int(compared["seeds"].to_numpy().max()) if len(compared) else 0
    head = f"{band} beside {reference}{f' ({setting})' if setting else ''}, {_design(method, n)}:"
    lines = [f"- {_line(str(name), part)}" for name, part in rows.groupby("measure", sort=False)]
    if method == SINGLE:
        needed = ", ".join(f"{seeds_needed(spread)} at {spread:.0%}" for spread in (0.05, 0.1, 0.2))
        lines.append(
            "- One seed shows a difference between these two runs, not between the norms: no interval, no p. How many "
            f"seeds a ratio of 1.2 takes depends on how much the ratio varies between seeds: {needed}."
        )
    elif len(compared):
        floor = np.nanmin(compared["smallest_p"].to_numpy(float))
        lines.append(
            f"- 95 % intervals by {method} on log ratios, p by Holm. They assume normal log ratios; a test that does "
            f"not cannot give a p below {floor:.2g} here."
        )
    if lost := [f"{count:,} of {name}" for name, count in not_finite.items() if count]:
        first = rows["measure"].iloc[0]
        lines.append(f"- Left out, as {first} is missing, NaN or infinite: {' and '.join(lost)} (updates).")
    return "\n".join([head, *lines])


def _design(method: str, n: int) -> str:
    if method == SINGLE:
        return "one seed"
    if not n:
        return "no ratio"
    return f"{n} paired seeds" if method == PAIRED else "seeds that do not pair"


def _line(measure: str, rows: pd.DataFrame) -> str:
    rows, seeds = rows.set_index("phase"), int(rows["seeds"].to_numpy().max())
    thirds = pd.DataFrame(rows[[phase.endswith("third") for phase in rows.index]])
    bins = pd.DataFrame(rows[[phase.endswith("loss") for phase in rows.index]])
    at_equal_loss = (
        f"at equal loss {_finding(measure, bins, 'bins', seeds)}"
        if len(bins)
        else "never at the same training loss, so norm and loss cannot be told apart"
    )
    return f"{measure}: {_finding(measure, thirds, 'thirds of training', seeds)}; {at_equal_loss}."


def _finding(measure: str, part: pd.DataFrame, phases: str, seeds: int) -> str:
    """Return how many phases differ, and one ratio.

    It is the last phase that all seeds reach, or the one that Holm's correction decides.
    """
    known = pd.DataFrame(part[part["ratio"].notna()])
    if known.empty:
        return "without a ratio, as values are missing or not positive"
    counted = pd.DataFrame(known[known["seeds"] == seeds])
    if counted.empty:
        return f"not counted, as no phase has all seeds ({known.index[-1]} {_ratio(known.iloc[-1])})"
    row = counted.iloc[-1]
    if row["method"] == SINGLE:
        return f"{row.name} {_ratio(row)} of one seed"
    rougher, smoother = told_apart(measure, part, seeds)
    words = {"rougher": rougher, "smoother": smoother}
    held = [f"{word} in {count} of {len(part)} {phases}" for word, count in words.items() if count]
    if not held:
        held = ["not told apart"]
        if counted["p"].to_numpy(float).min() < LEVEL:
            held, row = ["not told apart after Holm's correction"], counted.loc[counted["p"].idxmin()]
    rest = [str(phase) for phase in known.index if phase not in counted.index]
    left_out = f"; not counted, as some seeds lack it: {', '.join(rest)}" if rest else ""
    return f"{' and '.join(held)} ({row.name} {_ratio(row)}{left_out})"


def told_apart(measure: str, rows: pd.DataFrame, seeds: int) -> tuple[int, int]:
    """Return the numbers of phases told apart: rougher, smoother.

    Args:
        measure: Name of the measure.
        rows: Rows of a comparison's table, one per phase.
        seeds: Seeds of the comparison. A phase that some of them never reach is one of selected seeds, and not counted.
    """
    ratios = np.asarray(rows.loc[(rows["p_holm"] < LEVEL) & (rows["seeds"] == seeds), "ratio"], float)
    larger, smaller = int((ratios > 1).sum()), int((ratios < 1).sum())
    return (larger, smaller) if MEASURES[measure].smoother == "lower" else (smaller, larger)


def _ratio(row: Any) -> str:
    text = f"{row['ratio']:.3g} times"
    if row["method"] == SINGLE:
        return text
    text += f" [{row['low']:.3g}, {row['high']:.3g}], {row['same_direction']} of {len(row['seed_ratios'])} seeds"
    medians = row["ratio_of_medians"]
    return text + (f", medians {medians:.3g} times" if (medians - 1) * (row["ratio"] - 1) < 0 else "")
