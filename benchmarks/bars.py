"""The charts: of the rays, a panel for each workload with its goal; of the norms, a panel for each layer."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS, LIMIT = 3, 2.5
OURS, OTHERS, GOAL = sns.color_palette("colorblind")[0], "0.7", sns.color_palette("colorblind")[3]
CAPTION = (
    "Median time over that of the base in the same round, with quartiles; numbers on the right. The base, the line at "
    "1, is K forward passes without gradients, unless the title names another. Blue: this package; grey: what people "
    f"do without it. Dashed: the goal of the row with the bold number. Bars end at {LIMIT}."
)


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the tables that `benchmarks.rays.measure` returns, by names of workloads."""
    ways = _ways(tables)
    columns = min(COLUMNS, len(tables))
    rows = -(-len(tables) // columns)
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure = Figure((2.2 + 3.0 * columns, 0.7 + rows * (0.9 + 0.2 * len(ways))), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(tables) :]:
            axes.remove()
        for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
            _draw_panel(axes, name, table, ways)
        text = textwrap.fill(CAPTION, 30 + 45 * columns)
        figure.supxlabel(text, x=0.01, ha="left", fontsize="small", color="0.3")
    return figure


def _ways(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Every way that has a bar anywhere: this package's first, then in the order of the longest table."""
    longest = sorted(tables.values(), key=len, reverse=True)
    names = dict.fromkeys(name for table in longest for name in table.index if name != table["base"].iloc[0])
    return sorted(names, key=lambda name: not str(name).startswith("landscape"))


def _draw_panel(axes: Axes, name: str, table: pd.DataFrame, ways: list[str]) -> None:
    base = table["base"].iloc[0]
    rows: dict[str, Any] = table.to_dict("index")  # type: ignore[assignment]
    for place, way in enumerate(ways):
        if way in rows and way != base:
            _draw_bar(axes, place, way, rows[way])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlim=(0, LIMIT), ylim=(len(ways) - 0.4, -0.6), yticks=range(len(ways)), yticklabels=ways)
    axes.set_title(name if base.startswith("bare") else f"{name} (base: {base})", loc="left", pad=16, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    sns.despine(ax=axes, left=True)


def _draw_bar(axes: Axes, place: int, way: str, row: dict[str, Any]) -> None:
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": "small"}
    if math.isnan(row["ratio"]):
        box = {"color": "white", "pad": 1}  # the line of the goal would go through the word
        axes.text(0.02, place, row["note"].partition(":")[0], color="0.4", style="italic", bbox=box, **beside)
        return
    goal = row["goal"]
    ours = way.startswith("landscape") or not math.isnan(goal)
    axes.barh(place, row["ratio"], height=0.7, color=OURS if ours else OTHERS)
    axes.plot([row["from"], row["to"]], [place, place], color="0.2", linewidth=1)
    axes.text(1.02, place, f"{row['ratio']:.2f}", fontweight="normal" if math.isnan(goal) else "bold", **beside)
    if not math.isnan(goal):
        axes.axvline(goal, color=GOAL, linewidth=1, linestyle="--")
        above = axes.get_xaxis_transform()
        axes.text(goal, 1.01, f"goal {goal:g}", transform=above, ha="center", color=GOAL, fontsize="small")


def chart(table: pd.DataFrame, path: Path | None) -> None:
    """Draw what `against` returns as bars with quartiles, one panel for all but the last level of the index."""
    if path is None:
        return
    levels = table.index.names[:-1]
    panels = list(table.groupby(level=levels, sort=False)) if levels else [("", table)]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.5 * columns, rows * (1.2 + 0.22 * max(len(panel) for _, panel in panels)))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (key, panel) in zip(axes.flat, panels, strict=False):
        spread = (panel["ratio"] - panel["from"], panel["to"] - panel["ratio"])
        names = panel.index.get_level_values(-1)
        axis.barh(names, panel["ratio"] - 1, left=1, xerr=spread, color=[f"C{i}" for i in range(len(panel))])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title("\n".join(map(str, key if isinstance(key, tuple) else (key,))), fontsize="medium")
        axis.set(xscale="log", xlabel="time / time of the base")
    figure.savefig(path)
