"""The forest plot shows the numbers of the table."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from recordings import frame, frames

from landscape import compare
from landscape.plotting import plot_forest
from landscape.plotting.colours import colours_of


def drawn(axes):
    """Return the artists of each row: intervals, diamonds and dots."""
    lines = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    bars = [line for line in lines if line.get_xdata()[0] != line.get_xdata()[1]]
    marks = {mark: [line for line in axes.lines if line.get_marker() == mark] for mark in "Do"}
    return bars, marks["D"], marks["o"]


def test_numbers_are_the_table():
    widths = {"batch": 0.5, "none": 1.5, "ghost": 0.7}
    runs = [frame(norm, seed, width=width + seed / 20) for norm, width in widths.items() for seed in range(3)]
    comparison = compare(pd.concat(runs, ignore_index=True), measure=["range", "lost_share"])
    figure = plot_forest(comparison)
    assert len(figure.axes) == 2
    for axes, (_, table) in zip(figure.axes, comparison.table.groupby("measure", sort=False), strict=True):
        bars, diamonds, dots = drawn(axes)
        table = table[table["ratio"].notna()]
        assert [diamond.get_xdata()[0] for diamond in diamonds] == list(table["ratio"])
        np.testing.assert_array_equal([bar.get_xdata() for bar in bars], table[["low", "high"]])
        assert [list(dot.get_xdata()) for dot in dots] == [list(own.values()) for own in table["seed_ratios"]]
        assert axes.get_xscale() == "log"
        assert (np.array(axes.lines[0].get_xdata()) == 1).all()
        low, high = axes.get_xlim()
        assert low < min(table["low"])
        assert high > max(table["high"])


def test_colours_are_those_of_the_bands():
    runs = frames("batch", "none", "ghost", seeds=(0, 1))
    _, diamonds, _ = drawn(plot_forest(compare(runs, measure="range")).axes[0])
    colours = [colours_of([label])[label] for label in ("No normalization", "GhostNorm")]
    assert list(dict.fromkeys(to_rgb(diamond.get_color()) for diamond in diamonds)) == colours


def test_one_seed_has_no_interval():
    figure = plot_forest(compare(frames("batch", "none", seeds=(0,)), measure="range"))
    bars, diamonds, _ = drawn(figure.axes[0])
    assert not bars
    assert len(diamonds) >= 3


@pytest.mark.parametrize("count", [1, 4])
def test_panels(count):
    measures = ["range", "lost_share", "sharpness", "lipschitz"][:count]
    figure = plot_forest(compare(frames("batch", "none"), measure=measures))
    assert len(figure.axes) == count
    figure.draw_without_rendering()
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert "No normalization" in names
    assert "last third" in names


def test_settings_are_named():
    other = pd.concat([frame(norm, seed).assign(epochs=3) for norm in ("batch", "none") for seed in (0, 1)])
    runs = pd.concat([frames("batch", "none").assign(epochs=2), other.assign(run=other["run"] + "x")])
    figure = plot_forest(compare(runs.reset_index(drop=True), measure="range"))
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert {"No normalization, epochs 2", "No normalization, epochs 3"} <= set(names)
