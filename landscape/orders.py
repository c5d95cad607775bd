"""The figure of order changes: how many pairs of activations GhostNorm puts in another order, over its groups."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plots import LandscapeFigure, footnote
from landscape.vocabulary import TITLES

CAPTION = (
    "Share of the pairs of a channel's activations that GhostNorm puts in another order. Lines: median over the "
    "channels of a layer; bands: from quartile to quartile. One group is BatchNorm, which changes no order; a random "
    "order would be 50%. The activations are what goes into the norms of a network with BatchNorm, for a batch of "
    "{batch} training samples; they are compared before scale and shift."
)


def plot_orders(frame: pd.DataFrame) -> Figure:
    """Draw the share of pairs that change their order over the number of groups (arXiv:2007.08554, section 2.2).

    Args:
        frame: Rows of :func:`landscape.ranking.ranking`, of one recipe or several.

    Returns:
        A figure, 8 inches wide: a column for each model, a row for its initial and one for its trained weights.
    """
    names = frame["model"].replace(TITLES) + " on " + frame["dataset"].replace(TITLES)
    networks = list(frame.groupby(names, sort=False))
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure = LandscapeFigure(figsize=(8, 6), layout="constrained")
        grid = figure.subplots(2, len(networks), sharex=True, sharey=True, squeeze=False)
        gap = 0.06 * quartiles(frame)["median"].to_numpy().max()  # about the height of a name
        for column, (name, rows) in zip(grid.T, networks, strict=True):
            for axes, (updates, state) in zip(column, rows.groupby("updates"), strict=True):
                _draw(axes, quartiles(state), gap)
                axes.set_title(f"{name}, {f'after {updates:,} updates' if updates else 'initial weights'}", loc="left")
            column[-1].set_xlabel("groups of the batch, G")
        figure.supylabel("pairs in another order", fontsize="medium")
        batch = " or ".join(f"{size:,}" for size in frame["batch_size"].unique())
        footnote(figure, CAPTION.format(batch=batch))
    return figure


def quartiles(frame: pd.DataFrame) -> pd.DataFrame:
    """Quartiles over channels, in percent: columns ``low``, ``median`` and ``high`` by ``layer`` and ``groups``."""
    shares = frame.groupby(["layer", "groups"], sort=False)["share"]
    return pd.DataFrame({"low": shares.quantile(0.25), "median": shares.median(), "high": shares.quantile(0.75)}) * 100


def _draw(axes: Axes, shares: pd.DataFrame, gap: float) -> None:
    """A line and a band for each layer, with its name at the end of the line."""
    layers = list(shares.groupby("layer", sort=False))
    colours = sns.color_palette("plasma_r", len(layers) + 1)[1:]
    ends = _apart([of["median"].iloc[-1] for _, of in layers], gap)
    for (layer, of), colour, end in zip(layers, colours, ends, strict=True):
        groups = of.index.get_level_values("groups")
        axes.fill_between(groups, of["low"], of["high"], color=colour, alpha=0.25, linewidth=0)
        axes.plot(groups, of["median"], color=colour, marker=".", linewidth=1.2)
        axes.text(groups[-1] * 1.2, end, str(layer), color=colour, va="center", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups := shares.index.unique("groups"), map(str, groups))
    axes.yaxis.set_major_formatter("{x:g}%")
    sns.despine(ax=axes)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, raised where they are closer than the gap to the next one below."""
    raised, below = list(heights), float("-inf")
    for place in sorted(range(len(raised)), key=raised.__getitem__):
        below = raised[place] = max(raised[place], below + gap)
    return raised
