"""The figure of the loss landscape along training runs."""

import itertools
import textwrap
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from landscape.analysis.columns import normalized
from landscape.analysis.labels import band_labels
from landscape.analysis.measures import has_inputs, measured
from landscape.errors import LandscapeError
from landscape.names import MEASURES, check_choice, check_measure
from landscape.plotting.bands import (
    POINTS,
    QUARTILE_BINS,
    Band,
    NonFiniteMarks,
    PanelData,
    bands_overlap,
    draw_order,
    panel_data,
    quartiles_over_training,
)
from landscape.plotting.caption import caption
from landscape.plotting.colours import LINES, Colour, colours_of
from landscape.plotting.figure import LandscapeFigure, figure_style, footnote

X_LABELS = {"step": "update", "epoch": "epoch"}
SCALES = ("auto", "log", "symlog", "linear")
LAYOUTS = ("auto", "overlay", "multiples")

MARK = 6.0
"""Height of a row of marks above a panel, in points."""
COLOURED = 12
"""Maximum number of bands in colour: more shades are hard to tell apart."""

PANEL_WIDTH = {1: 100, 2: 48, 3: 30, 4: 24}
"""Maximum number of characters in a line above a panel, by columns of panels."""
LEGEND_ROW = 0.16
"""Height of a row of the legend, in inches."""

SHADE = 0.5
"""Opacity of a band."""
LOWER = "lost_share"
"""Measure in the slim panel below the losses."""


def plot_landscape(
    frame: pd.DataFrame,
    *,
    measure: str | Sequence[str] | None = None,
    x: str = "step",
    scale: str = "auto",
    layout: str = "auto",
) -> LandscapeFigure:
    """Draw the loss landscape along training runs.

    At every update the band spans the losses along the ray, from ``min_k L(theta - eta_k d)`` to
    ``max_k L(theta - eta_k d)``: the wider the band, the rougher the landscape. The line is ``L(theta)``. See Santurkar
    et al. 2018 (arXiv:1805.11604), figure 4, and Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 3.1. Each
    norm with its groups is one band, which covers all its seeds. The caption states step sizes, statistics and seeds.

    The style does not depend on ``matplotlib.rcParams``, except for fonts and resolution. Of more than 12 bands the
    first 12 are in colour and all others in grey. To join runs in fewer bands, give them a column ``norm``, any text::

        plot_landscape(frame.assign(norm="lr " + frame["base_lr"].astype(str)))

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``, or any frame with their columns, such as one read
            from CSV or converted from polars.
        measure: Name of a measure of :func:`landscape.measured`, or several of them for one panel each. Runs that did
            not record what a measure requires are left out of its panel and named in the caption. None is the loss and,
            in a slim panel below it, the lost share of the decrease: its median and quartiles in bins of training. The
            dashed line at 1 is the edge of stability of gradient descent, at which a step does not decrease the loss.
        x: ``"step"`` or ``"epoch"``.
        scale: Scale of the measures' axes: ``"log"``, ``"linear"``, ``"symlog"`` (logarithmic for large values of both
            signs, linear between) or ``"auto"``. Automatic is logarithmic if all values are positive and span more than
            a decade, symlog if some are not positive and span 2 decades or more, and linear otherwise; losses are never
            symlog, because their 0 has no meaning.
        layout: ``"overlay"`` (one panel), ``"multiples"`` (one panel per band, with the other bands in grey) or
            ``"auto"``, which is ``"overlay"`` for several measures, or unless one band would hide another. Multiples of
            several measures are a panel per band and measure.

    Returns:
        A :class:`LandscapeFigure`, 8 inches wide. Notebooks display it; :func:`save_figure` writes it.

    Raises:
        LandscapeError: An option is invalid, the frame has no rows, a column is missing or has a value of another type,
            no run recorded what a measure requires, or a value is 0 or less and the scale is ``"log"``.

    Examples:
        >>> frame = pd.DataFrame({"step": [0, 1], "lr": 0.1, "loss": [2.0, 1.5], "loss_min": [1.4, 0.9],
        ...                       "loss_max": [1.8, 1.6], "step_sizes": [[0.1, 0.2]] * 2,
        ...                       "losses": [[1.8, 1.4], [0.9, 1.6]]})
        >>> from landscape.plotting import save_figure
        >>> figure = plot_landscape(frame)
        >>> save_figure(figure, "landscape.png")

        The 3 measures of Santurkar et al. 2018 are drawn side by side with
        ``plot_landscape(frame, measure=("loss", "predictiveness", "beta"))``.
    """
    measures = [measure or "loss"] if measure is None or isinstance(measure, str) else list(dict.fromkeys(measure))
    _check(measures, x, scale, layout)
    unread = list(getattr(frame, "attrs", {}).get("left_out", ()))  # pandas drops attributes easily.
    frame = normalized(frame, dict.fromkeys(("step", x, "step_sizes", *(["loss"] if "loss" in measures else []))))
    if frame.empty:
        raise LandscapeError("The frame has no rows. Use a frame of read_traces or LandscapeProbe.frame.")
    if "run" not in frame and "seed" in frame:  # rows of several probes in memory
        frame = frame.assign(run=frame["seed"].map("seed {}".format))
    frame = frame.assign(band=band_labels(frame))
    for name in measures:
        frame = measured(frame, name)
    views = [panel_data(frame, x, name, scale) for name in measures]
    below = [quartiles_over_training(frame, x, LOWER)] if measure is None and has_inputs(frame, LOWER).any() else []
    below = [view for view in below if view.bands]
    shown = {label for view in views for label in view.bands}
    labels = [label for label in map(str, frame["band"].cat.categories) if label in shown]
    coloured = labels[:COLOURED]
    multiples = layout == "multiples" or (
        layout == "auto" and len(views) == 1 and bands_overlap(_only(views[0], coloured))
    )
    text = caption(frame, measures, POINTS, unread, _about_grey(labels, multiples))
    if len(labels) > COLOURED:
        warnings.warn(
            f"{len(labels):,} bands: only the first {COLOURED} have a colour and a name. Give runs that belong "
            "together the same fact norm, which makes them one band, or draw fewer: frame[frame['run'].isin([...])].",
            stacklevel=2,
        )
    with figure_style():
        figure = LandscapeFigure(figsize=(8, 4.5), layout="constrained")
        if multiples:
            _draw_multiples(figure, views, below, coloured, X_LABELS[x])
        else:
            _draw_overlays(figure, views, below, coloured, X_LABELS[x])
        title = _axis_title(views[0]) if len(views) == 1 and not below else ""
        reach = (float(np.min(frame[x])), float(np.max(frame[x])))
        lower = _about_lower(frame, below) if measure is None else ""
        _finish(figure, reach, title, " ".join(filter(None, [text, lower, _about_axes([*views, *below])])))
    return figure


def _about_grey(labels: Sequence[str], multiples: bool) -> str:
    """Return what the bands in grey are."""
    if len(labels) > COLOURED:
        others = "all" if multiples else f"the other {len(labels) - COLOURED:,} of"
        return f"{others} {len(labels):,}; the first {COLOURED} are in colour"
    return "those of the other panels" if multiples and len(labels) > 1 else ""


def _about_lower(frame: pd.DataFrame, below: Sequence[PanelData]) -> str:
    """Return the slim panel's description, or why it is missing."""
    if not below:
        reason = f"no run recorded {' and '.join(MEASURES[LOWER].needs)}"
        if has_inputs(frame, LOWER).any():
            reason = "no update has one, for which the step sizes must reach the learning rate"
        return f"Without the {MEASURES[LOWER].title}: {reason}."
    return (
        f"Below: {MEASURES[LOWER].line.partition(';')[0]}: median (line) and quartiles (band) of up to "
        f"{QUARTILE_BINS} parts of training; at 1 (dashed) a step does not decrease the loss."
    )


def _check(measures: Sequence[str], x: str, scale: str, layout: str) -> None:
    for kind, name, known in (("x", x, X_LABELS), ("scale", scale, SCALES), ("layout", layout, LAYOUTS)):
        check_choice(kind, name, known)
    for name in measures:
        check_measure(name)
    if not measures:
        raise LandscapeError(f"measure={measures}: must have at least one name. Use some of {', '.join(MEASURES)}.")


def _only(view: PanelData, labels: Collection[str]) -> PanelData:
    return view._replace(bands={label: band for label, band in view.bands.items() if label in labels})


def _draw_overlays(
    figure: Figure, views: Sequence[PanelData], below: Sequence[PanelData], labels: Sequence[str], x_label: str
) -> None:
    """Draw a panel for each measure, with all bands.

    The panels below are drawn under the first one.
    """
    colours, handles = colours_of(labels), {label: {} for label in labels}
    styles = dict(zip(labels, itertools.cycle(LINES), strict=False))
    stacks = _panels(figure, len(views), (3, 1) if below else (1,), x_label)
    places = [*zip([stack[0] for stack in stacks], views, strict=True), *zip(stacks[0][1:], below, strict=True)]
    rows = max(len(colours.keys() & view.marks.keys()) for view in views)
    for axes, view in places:
        for label, band in view.bands.items():
            if label not in colours:
                _draw_behind(axes, view, band)
        for label, band in draw_order(_only(view, labels)).items():
            artists = _draw_band(axes, view, band, colours[label], styles[label])
            if view in views:
                handles[label] |= {type(artist): artist for artist in artists}
        _set_axis(axes, view)
        _draw_marks(axes, [(view.marks[label], colours[label]) for label in labels if label in view.marks])
        _set_title(
            axes,
            _axis_title(view, PANEL_WIDTH[_columns(len(views))]) if len(views) > 1 else "",
            rows if view in views else 0,
        )
        if below:
            axes.set_ylabel(_axis_title(view))
        if view in below:
            _show_edge(axes)
    if any(labels):
        entries: list[Any] = [tuple(sorted(of.values(), key=Artist.get_zorder)) for of in handles.values()]
        columns = max(1, min(4, 100 // (6 + max(map(len, labels)))))
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + LEGEND_ROW * max(0, -(-len(labels) // columns) - 2))
        names = [_end(label, PANEL_WIDTH[1]) for label in labels]
        legend = figure.legend(entries, names, loc="outside upper left", ncols=columns, frameon=False, handlelength=3)
        for text in legend.get_texts():
            text.set_parse_math(False)  # A name may contain dollar signs.


def _draw_multiples(
    figure: Figure, views: Sequence[PanelData], below: Sequence[PanelData], labels: Sequence[str], x_label: str
) -> None:
    """Draw panels per band, one for each measure.

    The others are in grey.
    """
    heights = (3, 1) if below else (1,) * len(views)
    stacks = _panels(figure, len(labels), heights, x_label, sharey=True)
    views = [*views, *below]
    columns = _columns(len(labels), heights)
    for index, (stack, (label, colour)) in enumerate(zip(stacks, colours_of(labels).items(), strict=True)):
        for axes, view in zip(stack, views, strict=True):
            for other, band in view.bands.items():
                if other != label:
                    _draw_behind(axes, view, band)
            if label in view.bands:
                _draw_band(axes, view, view.bands[label], colour)
            _set_axis(axes, view)
            _draw_marks(axes, [(view.marks[label], colour)] if label in view.marks else [])
            if len(views) > 1 and index % columns == 0:
                axes.set_ylabel(_axis_title(view, 24))
            if view in below:
                _show_edge(axes)
        _set_title(stack[0], _in_lines(label, PANEL_WIDTH[columns]), min(1, len(views[0].marks)))


def _show_edge(axes: Axes) -> None:
    """Show 0 and the edge of stability, with its name."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 1.4))
    name = axes.text(1, 1.03, "edge of stability", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    name.set(color="0.4", fontsize="small")


def _axis_title(view: PanelData, width: int = 60) -> str:
    """Return title of the measure, with the axis' meaning."""
    title, ratios = view.measure.title, "(heights are ratios)"
    if view.scale.name != "log":
        return textwrap.fill(title, width)
    whole = f"{title} {ratios}"
    return whole if len(whole) <= width else "\n".join([*textwrap.wrap(title, width), *textwrap.wrap(ratios, width)])


def _in_lines(label: str, width: int) -> str:
    """Return a name in lines of a panel's width."""
    label = _end(label, 3 * width)
    parts = label.replace(" (", "\n(").splitlines() if len(label) > 24 else [label]
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


def _end(label: str, width: int) -> str:
    """Return the end of a long name."""
    # Runs of a folder differ at the end.
    return label if len(label) <= width else f"…{label[1 - width :]}"


def _columns(stacks: int, heights: Sequence[int] = (1,)) -> int:
    """Return the columns of stacks of panels."""
    # Several measures of four bands are compared along rows; a loss alone, or above a slim panel, needs width.
    are_measures = len(heights) > 1 and len(set(heights)) == 1
    return {1: 1, 2: 2, 4: 4 if are_measures else 2}.get(stacks, 3)


def _panels(figure: Figure, count: int, heights: Sequence[int], x_label: str, sharey: bool = False) -> list[list[Axes]]:
    """Return stacks of panels, from left to right.

    Args:
        figure: Empty figure, which is resized.
        count: Number of stacks.
        heights: Relative heights of the panels of a stack.
        x_label: Label of the horizontal axes.
        sharey: True if panels at the same place of all stacks share their vertical axis.
    """
    columns = _columns(count, heights)
    rows, deep = -(-count // columns), len(heights)
    if count > 1 or deep > 1:
        figure.set_size_inches(8, 1.3 + (2.4 if count > 1 else 3.2) * rows * (sum(heights) / max(heights)))
    ratios = list(heights) * rows
    grid = figure.subplots(len(ratios), columns, sharex=True, squeeze=False, height_ratios=ratios)
    stacks = [list(grid[row * deep : (row + 1) * deep, column]) for row in range(rows) for column in range(columns)]
    for axes in itertools.chain(*stacks[count:]):
        axes.remove()
    stacks = stacks[:count]
    for index, stack in enumerate(stacks):
        for axes, first in zip(stack, stacks[0], strict=True):
            axes.xaxis.set_major_locator(MaxNLocator("auto" if count == 1 else 5, steps=[1, 2, 5, 10], integer=True))
            if sharey and index:
                axes.sharey(first)
            if sharey and index % columns:
                axes.tick_params(labelleft=False)
        if index + columns >= count:  # no other stack below
            stack[-1].tick_params(labelbottom=True)
            stack[-1].set_xlabel(x_label)
    return stacks


def _draw_band(axes: Axes, view: PanelData, band: Band, colour: Colour, style: Any = "-") -> list[Artist]:
    """Draw band and line, and return both for the legend."""
    artists: list[Artist] = []
    if view.measure.band:  # Bands behind it show through.
        artists.append(_shade(axes, band, facecolor=(*colour, SHADE), edgecolor=(*colour, SHADE)))
    if view.measure.line:
        dark = tuple(0.7 * part for part in colour)
        artists.append(_line(axes, band.x, band.line, color=dark, linestyle=style))
    else:  # Edges show a band that is covered by another one.
        for edge in (band.low, band.high):
            _line(axes, band.x, edge, color=colour, linewidth=0.5)
    return artists


def _draw_behind(axes: Axes, view: PanelData, band: Band) -> None:
    if view.measure.band:
        _shade(axes, band, color="0.88")
    else:
        _line(axes, band.x, band.line, color="0.88", zorder=1)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> Artist:
    known = np.pad(np.isfinite(y), 1)
    lone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])  # A single point makes no line.
    points = {"marker": ".", "markersize": 3, "markevery": list(lone)} if len(lone) else {}
    return axes.plot(x, y, **{"linewidth": 0.9, **points, **style})[0]


def _shade(axes: Axes, band: Band, **style: Any) -> PolyCollection:
    # The outline makes a single update between two gaps visible, which has no area.
    return axes.fill_between(band.x, band.low, band.high, linewidth=0.5, **style)


def _draw_marks(axes: Axes, rows: Sequence[tuple[NonFiniteMarks, Colour]]) -> None:
    """Draw a row of marks per band above a panel.

    Bars are updates that are not finite; a cross is the first of a run.
    """
    for row, (marks, colour) in enumerate(reversed(rows)):
        up = ScaledTranslation(0, (row + 0.6) * MARK / 72, axes.figure.dpi_scale_trans)
        place = {"transform": axes.get_xaxis_transform() + up, "clip_on": False, "color": colour}
        bars = np.pad(marks.spans, ((0, 0), (0, 1)), constant_values=np.nan).ravel()
        # The ticks at its ends make a very short bar visible.
        ticks = {"marker": "|", "markersize": MARK - 2, "markeredgewidth": 0.7}
        axes.plot(bars, np.ones(len(bars)), linewidth=MARK - 2, solid_capstyle="butt", **ticks, **place)
        cross = {"marker": "X", "markersize": MARK, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot(marks.first, np.ones(len(marks.first)), **cross, **place)


def _set_title(axes: Axes, title: str, rows: int) -> None:
    """Write a title above a number of rows of marks."""
    axes.set_title(title, loc="left", pad=mpl.rcParams["axes.titlepad"] + rows * MARK, parse_math=False)


def _finish(figure: Figure, reach: tuple[float, float], title: str, text: str) -> None:
    margin = 0.01 * (reach[1] - reach[0]) or 0.5
    for axes in figure.axes:
        axes.set_xlim(reach[0] - margin, reach[1] + margin)  # also if nothing is drawn, as after a divergence
        sns.despine(ax=axes)
        axes.xaxis.set_major_formatter("{x:,.10g}")
    figure.supylabel(title, fontsize="medium")
    figure.align_ylabels()
    footnote(figure, text)


def _set_axis(axes: Axes, view: PanelData) -> None:
    axes.set_yscale(view.scale.name, **view.scale.options)
    if view.measure.edge is not None:
        axes.axhline(view.measure.edge, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    if view.limit:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -view.limit), min(high, view.limit))
    if not any(np.isfinite(part).any() for band in view.bands.values() for part in band[1:]):
        axes.set_yticks([])  # No values, no ticks.
    low, high = axes.get_ylim()
    if view.scale.name == "log" and high < 100 * low:  # Powers of 10 alone would give 1 or 2 ticks.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _about_axes(views: Sequence[PanelData]) -> str:
    several = len(views) > 1
    sentences = []
    for view in views:
        if view.limit:
            of, sign = f" of the {view.measure.title}" * several, "±" * (view.scale.name != "log")
            sentences.append(f"Values{of} beyond {sign}{view.limit:g} are cut off.")
    if any(view.interrupted for view in views):
        sentences.append("Gaps: no updates were recorded for unusually long.")
    for view in views:
        if view.scale.name == "symlog":
            linear = f"linear between ±{view.scale.linear:g} and logarithmic beyond"
            sentences.append(f"The axis of the {view.measure.title} is {linear}.")
    return " ".join(sentences)
