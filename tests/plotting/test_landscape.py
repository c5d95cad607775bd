"""The figure of the loss landscape."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from recordings import frame, frames, without

from landscape.analysis.measures import measured
from landscape.errors import LandscapeError
from landscape.names import MEASURES
from landscape.plotting.colours import colours_of
from landscape.plotting.figure import save_figure
from landscape.plotting.landscape import plot_landscape as plot_default

plot_landscape = partial(plot_default, measure="loss")


def bands(axes):
    return [artist for artist in axes.collections if isinstance(artist, PolyCollection)]


def corners(axes):
    return np.concatenate([path.vertices for band in bands(axes) for path in band.get_paths()])


def luminance(colour):
    return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])


def test_band_and_line():
    run = frame(steps=20)
    (axes,) = plot_landscape(run).axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), run[["step", "loss"]])
    found = {tuple(point) for point in corners(axes)}
    for name in ("loss_min", "loss_max"):
        assert set(run[["step", name]].itertuples(index=False, name=None)) <= found


def test_band_of_long_trace():
    run = frame(steps=50_000)
    run.loc[33_333, "loss_max"] = 123.5
    run.loc[44_444, "loss_min"] = 0.0123
    (axes,) = plot_landscape(run).axes
    assert len(axes.lines[0].get_xdata()) == 1000
    assert len(corners(axes)) < 3000
    assert {123.5, 0.0123} <= set(corners(axes)[:, 1])


def test_band_non_finite():
    run = frame(steps=20)
    limits = plot_landscape(run).axes[0].get_ylim()
    run.loc[10, "loss_max"] = np.inf
    (axes,) = plot_landscape(run).axes
    assert len(bands(axes)[0].get_paths()) == 2
    assert 10 not in corners(axes)[:, 0]
    assert axes.get_ylim() == limits


def bars_and_crosses(axes):
    """Return the intervals of the bars and the positions of the crosses of each row of marks, lowest row first."""
    lines = [line for line in axes.lines if not line.get_clip_on()]
    bars = [line.get_xdata().reshape(-1, 3)[:, :2].tolist() for line in lines[::2]]
    return list(zip(bars, [line.get_xdata().tolist() for line in lines[1::2]], strict=True))


def test_marks_one_seed():
    runs = frames("batch", steps=20)
    runs.loc[(runs["seed"] == 1) & (runs["step"].isin([10, 11, 15])), "loss_max"] = np.nan
    runs.loc[(runs["seed"] == 0) & (runs["step"] == 12), "loss"] = np.inf
    (axes,) = plot_landscape(runs).axes
    assert bars_and_crosses(axes) == [([[9.5, 12.5], [14.5, 15.5]], [12, 10])]
    other = runs.query("seed == 0 and step == 10").iloc[0]
    assert {(10, other["loss_min"]), (10, other["loss_max"])} <= {tuple(point) for point in corners(axes)}
    assert "BatchNorm in 2 of 2 runs, first at update 10 (4 of 40)." in axes.figure.get_supxlabel().replace("\n", " ")


def test_marks_rows():
    runs = frames("none", "batch", "ghost", seeds=(0,), steps=20)
    runs.loc[(runs["norm"] == "ghost") & (runs["step"] >= 8), "loss"] = np.nan
    runs.loc[(runs["norm"] == "none") & (runs["step"] == 0), "loss"] = np.nan
    (axes,) = plot_landscape(runs, layout="overlay").axes
    assert bars_and_crosses(axes) == [([[7.5, 19]], [8]), ([[0, 0.5]], [0])]
    marks = [line for line in axes.lines if not line.get_clip_on()]
    heights = [line.get_window_extent().y0 for line in marks[::2]]
    assert axes.get_window_extent().y1 < heights[0] < heights[1]
    colours = colours_of(["GhostNorm", "No normalization"])
    ghost, none = colours["GhostNorm"], colours["No normalization"]
    assert [line.get_color() for line in marks] == [ghost, ghost, none, none]


def test_marks_panels():
    runs = frames("none", "batch", seeds=(0,), steps=20)
    runs.loc[(runs["norm"] == "batch") & (runs["step"] == 8), "direction_norm"] = 0.0
    figure = plot_landscape(runs, measure="beta", layout="multiples")
    assert [bars_and_crosses(axes) for axes in figure.axes] == [[], [([[7.5, 8.5]], [8])]]
    check_titles_above_marks(figure)
    figure = plot_landscape(runs, measure=["loss", "beta"])
    assert [len(bars_and_crosses(axes)) for axes in figure.axes] == [0, 1]
    check_titles_above_marks(figure)


def check_titles_above_marks(figure):
    figure.draw_without_rendering()
    marks = [line.get_window_extent().y1 for axes in figure.axes for line in axes.lines if not line.get_clip_on()]
    titles = {axes.get_title(loc="left"): axes for axes in figure.axes}
    texts = [text for title, axes in titles.items() for text in axes.findobj(Text) if text.get_text() == title]
    assert len(texts) == len(titles)
    assert {round(text.get_window_extent().y0 - max(marks)) for text in texts} <= {0, 1, 2, 3, 4, 5}
    bottoms = [text.get_window_extent().y0 for text in texts]
    assert max(bottoms) - min(bottoms) < 3  # Descenders of some titles reach lower.


def test_gap_missing_rows():
    runs = frames("none", "batch", seeds=(0,), steps=40)
    missing = (runs["norm"] == "none") & runs["step"].between(10, 19)
    for measure in ("loss", "beta"):
        figure = plot_landscape(runs[~missing], measure=measure, layout="multiples")
        none = next(line for line in figure.axes[0].lines if line.get_color() != "0.88")
        assert list(none.get_xdata()[np.isnan(none.get_ydata())]) == [14.5]
        text = figure.get_supxlabel().replace("\n", " ")
        assert "Gaps: no updates were recorded" in text
    assert "Gaps" not in plot_landscape(runs).get_supxlabel()


def test_caption_unread():
    run = frame(steps=5)
    run.attrs["left_out"] = ["run/updates-000000005.parquet cannot be read; move it out"]
    text = plot_landscape(run).get_supxlabel().replace("\n", " ")
    assert "Left out: run/updates-000000005.parquet cannot be read." in text


def test_line_single_update():
    run = frame(steps=20)
    run.loc[[4, 6], "loss"] = np.nan
    line = plot_landscape(run).axes[0].lines[0]
    assert (line.get_marker(), line.get_markevery()) == (".", [5])
    assert plot_landscape(frame(steps=20)).axes[0].lines[0].get_marker() == "None"


def test_line_non_finite():
    run = frame(steps=20)
    run.loc[4, "loss"] = np.inf
    line = plot_landscape(run).axes[0].lines[0].get_ydata()
    assert list(np.flatnonzero(np.isnan(line))) == [4]


def test_no_finite_loss(tmp_path):
    run = frame(steps=5).assign(loss=np.nan, loss_min=np.nan, loss_max=np.inf)
    figure = plot_landscape(run)
    save_figure(figure, tmp_path / "figure.png")
    (axes,) = figure.axes
    assert bars_and_crosses(axes) == [([[0, 4]], [0])]
    assert list(axes.get_yticks()) == []
    assert "BatchNorm from update 0 on (5 of 5)." in figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(
    ("power", "scale", "expected"),
    [
        (1.0, "auto", "log"),
        (1.0, "linear", "linear"),
        (0.3, "auto", "linear"),
        (0.3, "log", "log"),
    ],
)
def test_scale_log(power, scale, expected):
    run = frame(steps=40)
    run[["loss", "loss_min", "loss_max"]] **= power
    figure = plot_landscape(run, scale=scale)
    assert figure.axes[0].get_yscale() == expected
    assert ("heights are ratios" in figure.get_supylabel()) == (expected == "log")


def test_scale_negative_loss():
    run = frame(steps=5)
    run.loc[2, "loss_min"] = -1.0
    assert plot_landscape(run).axes[0].get_yscale() == "linear"
    with pytest.raises(LandscapeError, match=r"scale='log': the loss must be positive.*-1.*linear"):
        plot_landscape(run, scale="log")


def test_layout_multiples():
    alike = frames("none", "batch", "ghost")
    figure = plot_landscape(alike)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["No normalization", "BatchNorm", "GhostNorm"]
    assert [len(bands(axes)) for axes in figure.axes] == [3, 3, 3]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert len(plot_landscape(alike, layout="overlay").axes) == 1


@pytest.mark.parametrize(
    ("norms", "measure", "layout", "expected"),
    [
        (["none", "batch"], "loss", "multiples", "The grey bands are those of the other panels."),
        (["none", "batch"], "beta", "multiples", "The grey lines are those of the other panels."),
        (["none", "batch"], "loss", "overlay", ""),
        (["none"], "loss", "multiples", ""),
    ],
)
def test_caption_of_grey_bands(norms, measure, layout, expected):
    figure = plot_landscape(frames(*norms, steps=5), measure=measure, layout=layout)
    text = figure.get_supxlabel().replace("\n", " ")
    assert expected in text
    assert ("grey" in text) == bool(expected)


def test_layout_overlay():
    apart = frames("none", "batch")
    lifted = apart["norm"] == "none"
    apart.loc[lifted, ["loss", "loss_min", "loss_max"]] *= 10
    figure = plot_landscape(apart)
    assert len(figure.axes) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["No normalization", "BatchNorm"]
    assert len(plot_landscape(apart, layout="multiples").axes) == 2


@pytest.mark.parametrize("norms", [["none", "batch", "ghost", "seq", "layer"], ["none", "batch", "ghost", "seq"]])
def test_layout_x_labels(norms):
    axes = plot_landscape(frames(*norms, seeds=(0,)), layout="multiples").axes
    columns = len({panel.get_position().x0 for panel in axes})
    assert len(axes) == len(norms)
    assert [bool(panel.get_xlabel()) for panel in axes] == [False] * (len(norms) - columns) + [True] * columns


def test_default_has_a_panel_of_the_lost_share():
    runs = frames("none", "batch", steps=300)
    main, below = plot_default(runs, layout="overlay").axes
    shares = measured(runs, "lost_share").query("norm == 'batch' and step < 5")["lost_share"]
    starts = [line.get_xydata()[0] for line in below.lines if len(line.get_xydata()) == 60]  # not the dashed line
    assert any(start == pytest.approx([2, shares.median().clip(-3, 3)]) for start in starts)
    assert len(bands(below)) == 2
    low, high = below.get_ylim()
    assert low <= 0
    assert high >= 1.2
    assert below.get_xlabel() == "update"
    assert not main.get_xlabel()
    multiples = plot_default(runs, layout="multiples")
    assert [axes.get_title(loc="left") for axes in multiples.axes] == ["No normalization", "", "BatchNorm", ""] or [
        axes.get_title(loc="left") for axes in multiples.axes
    ] == ["No normalization", "BatchNorm", "", ""]
    assert "Below: share" in multiples.get_supxlabel().replace("\n", " ")


def test_default_without_slope():
    figure = plot_default(without(frame(steps=5), "slope"))
    assert len(figure.axes) == 1
    assert "no run recorded slope" in figure.get_supxlabel().replace("\n", " ")


def test_default_with_step_sizes_below_the_learning_rate():
    figure = plot_default(frame(steps=5).assign(lr=100.0))
    assert len(figure.axes) == 1
    assert "must reach the learning rate" in figure.get_supxlabel().replace("\n", " ")


def test_default_clips_the_lost_share():
    run = frame(steps=20)
    run.loc[5, "slope"] = 1e-9
    figure = plot_default(run)
    assert figure.axes[1].get_ylim()[1] <= 3.5
    assert "of the lost share beyond ±3 are cut off" in figure.get_supxlabel().replace("\n", " ")


def test_layout_multiples_of_several_measures():
    figure = plot_landscape(frames("none", "batch", steps=20), measure=["loss", "beta"], layout="multiples")
    assert len(figure.axes) == 4
    assert sorted(axes.get_title(loc="left") for axes in figure.axes) == ["", "", "BatchNorm", "No normalization"]
    assert sum("β" in axes.get_ylabel() for axes in figure.axes) == 1


def test_four_norms_are_compared_along_a_row_for_each_measure():
    norms = frames("none", "batch", "ghost", "seq", seeds=(0,), steps=20)
    figure = plot_landscape(norms, measure=["loss", "range", "beta"], layout="multiples")
    titles = ["loss", "", "", "", "range of the loss", "", "", "", "effective β-smoothness", "", "", ""]
    assert [axes.get_ylabel().partition("\n")[0] for axes in figure.axes] == titles
    assert len({panel.get_position().y0 for panel in figure.axes}) == 3


@pytest.mark.parametrize("others", [[], ["seq"], ["none", "seq", "layer"]])
def test_colour_of_a_norm_is_the_same_in_every_figure(others):
    figure = plot_landscape(frames("batch", *others), layout="multiples")
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "BatchNorm" or not others]
    alone = plot_landscape(frames("batch", "ghost"), layout="multiples").axes[0]
    own, expected = (
        [line.get_color() for line in each.lines if line.get_color() != "0.88"][-1] for each in (axes, alone)
    )
    assert own == expected


def test_line_styles_differ_in_one_panel():
    figure = plot_landscape(frames("none", "batch", "ghost", "seq", seeds=(0,)), layout="overlay")
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in figure.axes[0].lines}) == 4


def test_draw_order():
    runs = pd.concat([frame("none", width=0.3), frame("batch", width=9.0)])
    wide, narrow = bands(plot_landscape(runs, layout="overlay").axes[0])
    assert wide.get_datalim(wide.axes.transData).height > narrow.get_datalim(narrow.axes.transData).height
    colours = colours_of(["BatchNorm", "No normalization"])  # They follow the norms, not the order of drawing.
    assert tuple(wide.get_facecolor()[0][:3]) == colours["BatchNorm"]
    assert tuple(narrow.get_facecolor()[0][:3]) == colours["No normalization"]


@pytest.mark.parametrize("measure", ["predictiveness", "gap", "curvature"])
def test_measure_without_line(measure):
    run = measured(frame(steps=20), measure)
    figure = plot_landscape(run, measure=measure)
    (axes,) = figure.axes
    low, high = (line.get_xydata() for line in axes.lines)
    np.testing.assert_array_equal(low, run[["step", f"{measure}_min"]])
    np.testing.assert_array_equal(high, run[["step", f"{measure}_max"]])
    assert len(bands(axes)) == 1
    assert figure.get_supylabel().startswith(MEASURES[measure].title)


def test_measure_without_band():
    runs = frames("batch", steps=20)
    (axes,) = plot_landscape(runs, measure="beta").axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_ydata(), measured(runs, "beta").groupby("step")["beta"].mean())
    assert not bands(axes)


def test_several_measures():
    runs = frames("none", "batch", steps=20)
    figure = plot_landscape(runs, measure=("loss", "predictiveness", "beta", "loss"))
    titles = ["loss (heights", "gradient predictiveness (heights", "effective β-smoothness"]
    for axes, title in zip(figure.axes, titles, strict=True):
        assert axes.get_title(loc="left").replace("\n", " ").startswith(title)
    assert [(len(bands(axes)), len(axes.lines)) for axes in figure.axes] == [(2, 2), (2, 4), (0, 2)]
    assert len({axes.get_ylim() for axes in figure.axes}) == 3
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert [axes.get_xlabel() for axes in figure.axes] == ["update"] * 3
    assert figure.get_supylabel() == ""
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["No normalization", "BatchNorm"]
    text = figure.get_supxlabel().replace("\n", " ")
    assert all(f"{title}, " in text for title in ("Loss", "Gradient predictiveness", "Effective β-smoothness"))


def test_several_measures_scales():
    run = frame(steps=20)
    run["slope"] -= 1.0  # Some gaps become negative.
    figure = plot_landscape(run.assign(loss_max=run["loss_min"] * 1.1, loss=run["loss_min"]), measure=["loss", "gap"])
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "symlog"]
    text = figure.get_supxlabel().replace("\n", " ")
    linear = figure.axes[1].yaxis.get_transform().linthresh
    assert f"The axis of the gap to the linear prediction is linear between ±{linear:g}" in text


@pytest.mark.parametrize(
    ("measure", "patches", "lines"),
    [("loss", 2, 2), ("beta", 0, 2), ("gap", 2, 0), (["gap", "beta"], 2, 2), (["beta", "loss"], 2, 2)],
)
def test_legend_entries(measure, patches, lines):
    (legend,) = plot_landscape(frames("none", "batch", steps=5), measure=measure, layout="overlay").legends
    assert (len(legend.findobj(Rectangle)), len(legend.findobj(Line2D))) == (patches, lines)


def test_legend_band_without_measure():
    lacking = without(frame("none", steps=5), "gradient_distances")
    runs = pd.concat([lacking, frame("batch", steps=5)], ignore_index=True)
    figure = plot_landscape(runs, measure=["beta", "loss"])
    beta, loss = (axes.lines for axes in figure.axes)
    assert (len(beta), len(loss)) == (1, 2)
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["No normalization", "BatchNorm"]
    assert beta[0].get_color() in {line.get_color() for line in loss}
    assert "(gradient_distances not recorded): No normalization." in figure.get_supxlabel().replace("\n", " ")


def test_legend_left_out():
    lacking = without(frame("none", steps=5), "slope")
    runs = pd.concat([lacking, frame("batch", steps=5)], ignore_index=True)
    figure = plot_landscape(runs, measure="gap")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BatchNorm"]
    with pytest.raises(LandscapeError, match=r"gap.* requires slope"):
        plot_landscape(lacking, measure="gap")


def test_layout_multiples_of_lines():
    figure = plot_landscape(frames("none", "batch", "ghost", steps=5), measure="beta", layout="multiples")
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3]
    assert [[line.get_color() for line in axes.lines].count("0.88") for axes in figure.axes] == [2, 2, 2]
    assert [axes.yaxis.get_tick_params().get("labelleft", True) for axes in figure.axes] == [True, False, False]


def test_caption_width():
    runs = pd.concat([without(frame("none", steps=5), "slope"), frame("batch", steps=5)], ignore_index=True)
    runs = runs.assign(batch_size=128, mode="training", direction="gradient")
    runs.loc[8, "direction_norm"] = 0.0
    figure = plot_landscape(runs, measure=[name for name in MEASURES if name != "sam_sharpness"])
    figure.draw_without_rendering()
    (text,) = (text for text in figure.texts if text.get_text() == figure.get_supxlabel())
    assert figure.get_supxlabel().count("\n") > 5
    assert 0.85 < text.get_window_extent().x1 / figure.bbox.x1 < 1


def test_log_ticks():
    figure = plot_landscape(frame(steps=40))
    figure.draw_without_rendering()
    labels = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert {"0.2", "0.5", "1", "2"} <= labels
    wide = frame(steps=40).assign(loss_max=1e3)
    figure = plot_landscape(wide)
    figure.draw_without_rendering()
    assert "$\\mathdefault{10^{2}}$" in {text.get_text() for text in figure.axes[0].get_yticklabels()}


def test_x_epoch():
    run = frame(steps=20)
    axes = plot_landscape(run, x="epoch").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), run["epoch"])
    assert axes.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "time"}, "x='time'.*step or epoch"),
        ({"scale": "sqrt"}, "scale='sqrt'.*auto, log, symlog or linear"),
        ({"layout": "grid"}, "layout='grid'.*auto, overlay or multiples"),
        ({"measure": "width"}, "measure='width': .*loss, predictiveness, beta, gap, curvature, .*cosine"),
        ({"measure": ["loss", "width"]}, "measure='width'"),
        ({"measure": []}, r"measure=\[\].*loss, predictiveness"),
    ],
)
def test_invalid_option(options, message):
    with pytest.raises(LandscapeError, match=message):
        plot_landscape(frame(steps=2), **options)


def test_empty_frame():
    with pytest.raises(LandscapeError, match="no rows"):
        plot_landscape(frame(steps=2).iloc[:0])


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_save_figure(tmp_path, suffix, start):
    pictures = [tmp_path / "new" / f"{name}{suffix}" for name in "ab"]
    for picture in pictures:
        save_figure(plot_landscape(frame(steps=5)), picture)
    first, second = (picture.read_bytes() for picture in pictures)
    assert first.startswith(start)
    assert first == second
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_save_figure_suffix(tmp_path):
    with pytest.raises(LandscapeError, match=r"figure\.jpg.*\.png, \.svg, \.pdf"):
        save_figure(plot_landscape(frame(steps=5)), tmp_path / "figure.jpg")
    assert list(tmp_path.iterdir()) == []


def test_save_figure_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "figure.png", tmp_path / "folder.png"):
        with pytest.raises(LandscapeError, match="cannot be written"):
            save_figure(plot_landscape(frame(steps=5)), path)
    assert len(list(tmp_path.iterdir())) == 2


def test_notebook_display(tmp_path):
    before = dict(mpl.rcParams)
    figure = plot_landscape(frame(steps=5))
    assert figure._repr_png_().startswith(b"\x89PNG")
    save_figure(figure, tmp_path / "figure.svg")
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


def test_no_torch():
    program = "import sys, landscape.plotting.landscape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_limit_in_caption():
    calm, wild = frame("batch"), frame("none")
    wild.loc[39, "loss_max"] = 1e6
    figure = plot_landscape(pd.concat([calm, wild], ignore_index=True))
    top = max(axes.get_ylim()[1] for axes in figure.axes)
    assert 1 < top < 100
    assert f"Values beyond {top:g} are cut off." in figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize("scale", ["log", "linear", "symlog"])
@pytest.mark.parametrize("size", [1e30, 1.7e308])
def test_limit_explosion(scale, size):
    run = frame(steps=400)
    run.loc[300:309, ["loss", "loss_min", "loss_max"]] = np.geomspace(1, size, 10)[:, None] * [1, 0.5, 1]
    run.loc[310:, ["loss", "loss_min", "loss_max"]] = np.nan
    figure = plot_landscape(run, scale=scale)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 1 < high < 100
    assert low > (-100 if scale == "symlog" else -2)
    assert np.abs(corners(axes)).max() < 1e4
    sign = "" if scale == "log" else "±"
    assert f"Values beyond {sign}{high:g} are cut off." in figure.get_supxlabel().replace("\n", " ")


def test_limit_several_measures():
    run = frame(steps=100)
    run.loc[50, "loss_max"] = 1e6
    assert "Values of the loss beyond 20 are cut off." in plot_landscape(
        run, measure=["loss", "beta"]
    ).get_supxlabel().replace("\n", " ")


def test_reproducible_across_processes(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import pandas as pd
from recordings import frame
from landscape.plotting.figure import save_figure
from landscape.plotting.landscape import plot_landscape
runs = pd.concat([frame(norm, seed) for seed, norm in enumerate(["none", "batch", "ghost", "seq"])], ignore_index=True)
save_figure(plot_landscape(runs, layout="multiples"), sys.argv[2])
"""
    here = str(Path(__file__).parents[1] / "helpers")
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, here, str(tmp_path / f"{seed}.svg")]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_seeds_in_memory():
    """Frames of several probes have no runs, but seeds."""
    text = plot_landscape(frames("none", "batch", seeds=(0, 1, 2)).drop(columns="run")).get_supxlabel()
    assert "3 seeds per band" in text.replace("\n", " ")
