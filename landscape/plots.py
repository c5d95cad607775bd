"""Figures of traces: a frame in, a matplotlib figure out."""

import io
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from landscape.captions import caption
from landscape.errors import UserError
from landscape.files import whole_file
from landscape.measures import band_labels, envelope

X_LABELS = {"step": "update", "epoch": "epoch"}
SCALES = ("auto", "log", "linear")
LAYOUTS = ("auto", "overlay", "multiples")
POINTS = 1000
"""Most points of a band: about as many as a page has pixels."""

_UNDATED = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

Colour = tuple[float, ...]


class Band(NamedTuple):
    """The points of one band; NaN interrupts the drawing."""

    x: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


Bands = dict[str, Band]


class LandscapeFigure(Figure):
    """A figure that a notebook shows although it knows nothing of pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_landscape(frame: pd.DataFrame, *, x: str = "step", scale: str = "auto", layout: str = "auto") -> Figure:
    """Draw the landscape along a training run: at every update, a band from the smallest to the largest probed loss.

    The wider the band, the rougher the landscape (Santurkar et al. 2018, figure 4a; Dimitriou & Arandjelovic 2020,
    section 3.1). Each norm is one band; runs that differ in their seed are joined, and the caption says how.

    Args:
        frame: Rows of ``read_traces`` or ``LandscapeProbe.frame``.
        x: ``"step"`` or ``"epoch"``.
        scale: Of the loss axis: ``"log"``, ``"linear"``, or ``"auto"``, logarithmic if losses span more than a decade.
        layout: ``"overlay"``; ``"multiples"``, a panel per band with the others in grey behind; or ``"auto"``, which
            overlays unless one band would hide another.

    Returns:
        A figure, 8 inches wide, to be shown by a notebook or written by its ``savefig`` or by :func:`save`.

    Raises:
        UserError: An option is none of these, the frame has no rows, or a loss has no place on a logarithmic axis.
    """
    _check(frame, x=(x, tuple(X_LABELS)), scale=(scale, SCALES), layout=(layout, LAYOUTS))
    frame = frame.assign(band=band_labels(frame))
    bands = _bands(frame, x)
    log = _is_log(bands, scale)
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure = LandscapeFigure(figsize=(8, 4.5), layout="constrained")
        if layout == "multiples" or (layout == "auto" and _hidden(bands, log)):
            _draw_multiples(figure, bands, X_LABELS[x])
        else:
            _draw_overlay(figure, bands, X_LABELS[x], log)
        _finish(figure, log, (float(np.min(frame[x])), float(np.max(frame[x]))), caption(frame, POINTS))
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF by the suffix of ``path``: whole or not at all, the same bytes every time.

    Raises:
        UserError: Another suffix, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _UNDATED:
        raise UserError(f"A picture cannot be written to {path}; give a name that ends in {', '.join(_UNDATED)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file, mpl.rc_context({"svg.hashsalt": "landscape"}):
            figure.savefig(file, format=suffix[1:], dpi=200, metadata=_UNDATED[suffix])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Give another path.") from error


def _check(frame: pd.DataFrame, **options: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; it can be {', '.join(allowed)}.")
    if frame.empty:
        raise UserError("The frame has no rows to draw; give one of read_traces or LandscapeProbe.frame.")


def _bands(frame: pd.DataFrame, x: str) -> Bands:
    points = envelope(frame, x, by="band", bins=POINTS)
    points.loc[points["not_finite"] > 0, ["loss_min", "loss_max"]] = np.nan
    columns = [x, "loss", "loss_min", "loss_max"]
    return {str(label): Band(*band[columns].to_numpy().T) for label, band in points.groupby("band", observed=True)}


def _is_log(bands: Bands, scale: str) -> bool:
    smallest = np.fmin.reduce(np.concatenate([losses for band in bands.values() for losses in (band.low, band.loss)]))
    largest = np.fmax.reduce(np.concatenate([band.high for band in bands.values()]))
    if scale == "log" and smallest <= 0:
        raise UserError(f"A loss of {smallest:.4g} has no place on a logarithmic axis; choose scale linear.")
    return scale == "log" or (scale == "auto" and 0 < 10 * smallest < largest)


def _largest_first(bands: Bands, log: bool) -> Bands:
    """The order of drawing: small bands lie over large ones."""
    return dict(sorted(bands.items(), key=lambda item: -np.nansum(_height(item[1].low, item[1].high, log))))


def _height(low: np.ndarray, high: np.ndarray, log: bool) -> np.ndarray:
    """As it is seen on the axis."""
    return np.log(high) - np.log(low) if log else high - low


def _hidden(bands: Bands, log: bool) -> bool:
    """Whether a band would lie with more than two thirds of its area under a smaller one."""
    drawn = _largest_first(bands, log).values()
    return any(_covered(large, small, log) > 2 / 3 for large, small in combinations(drawn, 2))


def _covered(large: Band, small: Band, log: bool) -> float:
    _, i, j = np.intersect1d(large.x, small.x, return_indices=True)
    low, high = np.maximum(large.low[i], small.low[j]), np.minimum(large.high[i], small.high[j])
    area = np.nansum(_height(large.low[i], large.high[i], log))
    return np.nansum(_height(low, high, log).clip(0)) / area if area else 0.0


def _colours(bands: Bands) -> dict[str, Colour]:
    """One colour per band, from light to dark, so that they differ in grey and to colour-blind eyes too."""
    return dict(zip(bands, sns.color_palette("plasma_r", len(bands)), strict=True))


def _draw_overlay(figure: Figure, bands: Bands, x_label: str, log: bool) -> None:
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    colours = _colours(bands)
    drawn = {label: _draw_band(axes, band, colours[label]) for label, band in _largest_first(bands, log).items()}
    if any(bands):
        handles: list[Any] = [drawn[label] for label in bands]
        columns = max(1, min(4, 100 // (6 + max(map(len, bands)))))
        figure.legend(handles, list(bands), loc="outside upper left", ncols=columns, frameon=False)


def _draw_multiples(figure: Figure, bands: Bands, x_label: str) -> None:
    columns = 2 if len(bands) in (2, 4) else 3
    rows = -(-len(bands) // columns)
    figure.set_size_inches(8, 1.3 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (label, colour) in zip(panels, _colours(bands).items(), strict=False):
        for other in bands.keys() - {label}:
            _shade(axes, bands[other], color="0.88")
        _draw_band(axes, bands[label], colour)
        axes.set_title(label, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    for axes in panels[len(bands) :]:
        axes.remove()
    for axes in panels[: len(bands)][-columns:]:  # those with no panel below
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(x_label)


def _draw_band(axes: Axes, band: Band, colour: Colour) -> tuple[PolyCollection, Line2D]:
    marker = "." if np.isfinite(band.loss).sum() == 1 else None  # a lone point makes no line
    (line,) = axes.plot(band.x, band.loss, color=colour, linewidth=0.9, marker=marker)
    tint = tuple(0.4 + 0.6 * part for part in colour[:3])  # opaque: mixed shades would match no entry of the legend
    return _shade(axes, band, color=tint), line


def _shade(axes: Axes, band: Band, **style: Any) -> PolyCollection:
    # The outline keeps a lone update between two gaps visible: it has no area.
    return axes.fill_between(band.x, band.low, band.high, linewidth=0.5, **style)


def _finish(figure: Figure, log: bool, reach: tuple[float, float], text: str) -> None:
    margin = 0.01 * (reach[1] - reach[0]) or 0.5
    for axes in figure.axes:
        axes.set_yscale("log" if log else "linear")
        axes.set_xlim(reach[0] - margin, reach[1] + margin)  # also where nothing is drawn, as after a divergence
        sns.despine(ax=axes)
        axes.xaxis.set_major_formatter("{x:,.10g}")
    figure.supylabel("loss", fontsize="medium")
    text += " On this logarithmic axis, heights are ratios." if log else ""
    figure.supxlabel(textwrap.fill(text, 142), x=0.01, ha="left", fontsize="small", color="0.3")
