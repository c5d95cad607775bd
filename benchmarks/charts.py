"""Bar charts of the benchmarks: one panel per workload for rays, and one per layer for norms."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.figure import LandscapeFigure, figure_style, footnote

COLUMNS, LIMIT = 3, 2.5
OURS, OTHERS, GOAL = sns.color_palette("colorblind")[0], "0.7", sns.color_palette("colorblind")[3]
CAPTION = (
    "Median time over that of the base in the same round, with quartiles; numbers on the right. The base, the line at "
    "1, is K forward passes without gradients, unless the title names another. Blue: this package; grey: alternatives. "
    f"Dashed: the goal of the row with the bold number. Bars end at {LIMIT}."
)

NORMS_CAPTION = (
    "Median time over that of nn.BatchNorm on the same input in the same round (of SeqNorm: nn.GroupNorm, then "
    "nn.BatchNorm), on a logarithmic axis. Blue: this package; grey: other implementations of GhostNorm."
)


def draw_rays(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the tables of ``benchmarks.rays.measure`` by workload."""
    methods = _method_names(tables)
    columns = min(COLUMNS, len(tables))
    rows = -(-len(tables) // columns)
    with figure_style():
        figure = LandscapeFigure(
            figsize=(2.2 + 3.0 * columns, 0.7 + rows * (0.9 + 0.2 * len(methods))), layout="constrained"
        )
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(tables) :]:
            axes.remove()
        for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
            _draw_rays_panel(axes, name, table, methods)
        footnote(figure, CAPTION, 30 + 45 * columns)
    return figure


def _method_names(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return the methods with a bar, this package first."""
    longest = sorted(tables.values(), key=len, reverse=True)
    names = dict.fromkeys(name for table in longest for name in table.index if name != table["base"].iloc[0])
    return sorted(names, key=lambda name: not str(name).startswith("landscape"))


def _draw_rays_panel(axes: Axes, name: str, table: pd.DataFrame, methods: list[str]) -> None:
    base = table["base"].iloc[0]
    rows: dict[str, Any] = table.to_dict("index")  # type: ignore[assignment]
    for y, method in enumerate(methods):
        if method in rows and method != base:
            _draw_bar(axes, y, method, rows[method])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlim=(0, LIMIT), ylim=(len(methods) - 0.4, -0.6), yticks=range(len(methods)), yticklabels=methods)
    axes.set_title(name if base.startswith("bare") else f"{name} (base: {base})", loc="left", pad=16, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    sns.despine(ax=axes, left=True)


def _draw_bar(axes: Axes, y: int, method: str, row: dict[str, Any]) -> None:
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": "small"}
    if math.isnan(row["ratio"]):
        box = {"color": "white", "pad": 1}  # Without it the line of the goal would cross the word.
        axes.text(0.02, y, row["note"].partition(":")[0], color="0.4", style="italic", bbox=box, **style)
        return
    goal = row["goal"]
    ours = method.startswith("landscape") or not math.isnan(goal)
    axes.barh(y, row["ratio"], height=0.7, color=OURS if ours else OTHERS)
    axes.plot([row["from"], row["to"]], [y, y], color="0.2", linewidth=1)
    axes.text(1.02, y, f"{row['ratio']:.2f}", fontweight="normal" if math.isnan(goal) else "bold", **style)
    if not math.isnan(goal):
        axes.axvline(goal, color=GOAL, linewidth=1, linestyle="--")
        above = axes.get_xaxis_transform()
        axes.text(goal, 1.01, f"goal {goal:g}", transform=above, ha="center", color=GOAL, fontsize="small")


def draw_norms(table: pd.DataFrame) -> Figure:
    """Draw the table of ``benchmarks.norms.measure``."""
    panels = list(table.groupby(level=list(range(table.index.nlevels - 1)), sort=False))
    names = [name for name in dict.fromkeys(table.index.get_level_values(-1)) if not str(name).startswith("nn.")]
    columns = 5
    rows = -(-len(panels) // columns)
    with figure_style():
        figure = LandscapeFigure(
            figsize=(2.0 + 1.9 * columns, 0.7 + rows * (0.7 + 0.2 * len(names))), layout="constrained"
        )
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (key, panel) in zip(grid.flat, panels, strict=False):
            title = [textwrap.fill(str(part), 22) for part in (key if isinstance(key, tuple) else (key,))]
            _draw_norms_panel(axes, "\n".join(title), panel, names)
        footnote(figure, NORMS_CAPTION, 150)
    return figure


def _draw_norms_panel(axes: Axes, title: str, panel: pd.DataFrame, names: list[str]) -> None:
    ratios: dict[str, float] = panel["ratio"].droplevel(list(range(panel.index.nlevels - 1))).to_dict()
    for y, name in enumerate(names):
        ratio = ratios.get(name, math.nan)
        if not math.isnan(ratio):
            axes.barh(y, ratio - 1, left=1, height=0.7, color=OURS if "Norm" in name else OTHERS)
            label = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            axes.text(max(ratio, 1) * 1.15, y, label, va="center", fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(0.2, 1000), ylim=(len(names) - 0.4, -0.6), yticks=range(len(names)), yticklabels=names)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.tick_params(axis="y", length=0)
    sns.despine(ax=axes, left=True)
