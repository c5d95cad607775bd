"""The forest plot of a comparison: ratios with intervals, and a dot per seed."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from landscape.analysis.compare import Comparison
from landscape.names import MEASURES
from landscape.plotting.colours import Colour, colours_of
from landscape.plotting.figure import LandscapeFigure, figure_style, footnote

ROW = 0.19
"""Height of a row, in inches."""
COLUMNS = 3
"""Maximum number of panels beside each other."""


def plot_forest(comparison: Comparison) -> Figure:
    """Draw the ratios of a comparison, a panel per measure.

    Each row is a norm in a phase of training: a bar from the lower to the upper end of the interval, a diamond at the
    ratio, and a dot for the ratio of each seed. The line at 1 is the reference.

    Args:
        comparison: Result of :func:`landscape.compare`.

    Returns:
        A :class:`LandscapeFigure`, 8 inches wide.

    Examples:
        >>> rows = [{"run": f"{norm}{seed}", "norm": norm, "seed": seed, "step": step, "loss": 2 - step / 9, "lr": 0.1,
        ...          "step_sizes": [0.1, 0.2], "losses": [1.0, 1.0 + scale * (1 + seed / 10)]}
        ...         for norm, scale in (("batch", 1.0), ("none", 3.0)) for seed in range(3) for step in range(9)]
        >>> from landscape import compare
        >>> from landscape.plotting import save_figure
        >>> save_figure(plot_forest(compare(pd.DataFrame(rows), measure="range")), "forest.png")
    """
    table = comparison.table
    measures = list(table["measure"].unique())
    pairs = list(table[["setting", "band", "reference"]].drop_duplicates().itertuples(index=False, name=None))
    rows = _rows(table, pairs)
    columns = min(COLUMNS, len(measures))
    panels = -(-len(measures) // columns)
    with figure_style():
        figure = LandscapeFigure(figsize=(8, 1.2 + panels * (0.6 + ROW * len(rows))), layout="constrained")
        grid = figure.subplots(panels, columns, sharey=True, squeeze=False).ravel()
        colours = colours_of(comparison.bands)
        for axes in grid[len(measures) :]:
            axes.remove()
        for axes, measure in zip(grid, measures, strict=False):
            _draw(axes, pd.DataFrame(table[table["measure"] == measure]), rows, colours)
            axes.set_title(MEASURES[measure].title, loc="left")
        _label(list(grid[: len(measures)][::columns]), rows)
        footnote(figure, _caption(table))
    return figure


def _rows(table: pd.DataFrame, pairs: list[tuple[str, str, str]]) -> list[tuple[tuple[str, str, str], str]]:
    """Return pair and phase of each row.

    A heading has no phase.
    """
    rows = []
    for pair in pairs:
        of_pair = table.loc[(table["setting"] == pair[0]) & (table["band"] == pair[1]), "phase"]
        rows += [(pair, ""), *((pair, phase) for phase in dict.fromkeys(of_pair))]
    return rows


def _draw(axes: Axes, table: pd.DataFrame, rows: list, colours: dict[str, Colour]) -> None:
    by_row = {(row["setting"], row["band"], row["phase"]): row for row in table.to_dict("records")}
    axes.axvline(1, color="0.4", linewidth=0.8)
    for y, ((setting, band, _), phase) in enumerate(rows):
        row = by_row.get((setting, band, phase))
        if row is None or not np.isfinite(row["ratio"]):
            continue
        colour = colours[band]
        if np.isfinite(row["low"]):
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
        own = list(row["seed_ratios"].values())
        below = [y + 0.3] * len(own)  # Close seeds would cover the diamond.
        axes.plot(own, below, "o", color="white", markeredgecolor="0.25", markeredgewidth=0.7, markersize=2.8)
        axes.plot(
            row["ratio"], y, "D", color=colour, markeredgecolor="black", markeredgewidth=0.5, markersize=5, zorder=3
        )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 1 / 1.25), max(high, 1.25))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    if high < 5 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.25, 1.5, 2, 3, 4, 6, 8), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ratio (log scale)")
    sns.despine(ax=axes, left=True)
    axes.tick_params(axis="y", length=0)


def _label(first: list[Axes], rows: list) -> None:
    """Write norms and phases at the first panels."""
    names = [phase or f"{pair[1]}{f', {pair[0]}' if pair[0] else ''}" for pair, phase in rows]
    for axes in first:
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for text, (_, phase) in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_fontweight("normal" if phase else "bold")


def _caption(table: pd.DataFrame) -> str:
    references = " and ".join(table["reference"].unique())
    methods = sorted(set(table.loc[table["low"].notna(), "method"]))
    intervals = f"Bars: 95 % intervals ({' or '.join(methods)} on log ratios)." if methods else "One seed."
    counts = sorted(set(table["seeds"]))
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return (
        f"Ratios to {references}: diamonds are over {seeds} seeds, dots are single seeds. {intervals} Thirds are of "
        "training; bins of loss hold the updates at which both norms have the same training loss."
    )
