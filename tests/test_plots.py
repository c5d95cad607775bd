import subprocess
import sys
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from traces import frame, frames

from landscape.errors import UserError
from landscape.plots import plot_landscape, save


def bands(axes):
    return [artist for artist in axes.collections if isinstance(artist, PolyCollection)]


def corners(axes):
    return np.concatenate([path.vertices for band in bands(axes) for path in band.get_paths()])


def luminance(colour):
    return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])


def test_the_band_reaches_from_the_smallest_to_the_largest_probe():
    run = frame(steps=20)
    (axes,) = plot_landscape(run).axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), run[["step", "loss"]])
    found = {tuple(point) for point in corners(axes)}
    for name in ("loss_min", "loss_max"):
        assert set(run[["step", name]].itertuples(index=False, name=None)) <= found


def test_a_long_trace_is_drawn_with_few_points_and_every_extreme():
    run = frame(steps=50_000)
    run.loc[33_333, "loss_max"] = 1234.5
    run.loc[44_444, "loss_min"] = 0.0123
    (axes,) = plot_landscape(run).axes
    assert len(axes.lines[0].get_xdata()) == 1000
    assert len(corners(axes)) < 3000
    assert {1234.5, 0.0123} <= set(corners(axes)[:, 1])


def test_a_loss_that_is_not_finite_interrupts_the_band_and_leaves_the_axis_alone():
    run = frame(steps=20)
    limits = plot_landscape(run).axes[0].get_ylim()
    run.loc[10, "loss_max"] = np.inf
    (axes,) = plot_landscape(run).axes
    assert len(bands(axes)[0].get_paths()) == 2
    assert 10 not in corners(axes)[:, 0]
    assert axes.get_ylim() == limits


def test_one_seed_that_is_not_finite_interrupts_the_band_of_all():
    runs = frames("batch", steps=20)
    runs.loc[(runs["seed"] == 1) & (runs["step"] == 10), "loss_max"] = np.nan
    assert 10 not in corners(plot_landscape(runs).axes[0])[:, 0]


def test_the_line_has_a_gap_where_the_training_loss_is_not_finite():
    run = frame(steps=20)
    run.loc[4, "loss"] = np.inf
    line = plot_landscape(run).axes[0].lines[0].get_ydata()
    assert list(np.flatnonzero(np.isnan(line))) == [4]


def test_a_trace_without_a_finite_loss_is_still_a_figure(tmp_path):
    run = frame(steps=5).assign(loss=np.nan, loss_min=np.nan, loss_max=np.inf)
    figure = plot_landscape(run)
    save(figure, tmp_path / "figure.png")
    assert "At 5 updates" in figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(
    ("power", "scale", "expected"),
    [
        (1.0, "auto", "log"),
        (1.0, "linear", "linear"),
        (0.3, "auto", "linear"),
        (0.3, "log", "log"),
    ],
)
def test_the_scale_is_logarithmic_beyond_a_decade(power, scale, expected):
    run = frame(steps=40)
    run[["loss", "loss_min", "loss_max"]] **= power
    figure = plot_landscape(run, scale=scale)
    assert figure.axes[0].get_yscale() == expected
    assert ("heights are ratios" in figure.get_supxlabel().replace("\n", " ")) == (expected == "log")


def test_a_negative_loss_has_no_place_on_a_logarithmic_axis():
    run = frame(steps=5)
    run.loc[2, "loss_min"] = -1.0
    assert plot_landscape(run).axes[0].get_yscale() == "linear"
    with pytest.raises(UserError, match="loss of -1 has no place on a logarithmic axis; choose scale linear"):
        plot_landscape(run, scale="log")


def test_bands_that_hide_one_another_get_panels():
    alike = frames("none", "batch", "ghost")
    figure = plot_landscape(alike)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["No normalization", "BatchNorm", "GhostNorm"]
    assert [len(bands(axes)) for axes in figure.axes] == [3, 3, 3]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert len(plot_landscape(alike, layout="overlay").axes) == 1


def test_bands_that_can_all_be_seen_share_a_panel():
    apart = frames("none", "batch")
    lifted = apart["norm"] == "none"
    apart.loc[lifted, ["loss", "loss_min", "loss_max"]] *= 10
    figure = plot_landscape(apart)
    assert len(figure.axes) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["No normalization", "BatchNorm"]
    assert len(plot_landscape(apart, layout="multiples").axes) == 2


@pytest.mark.parametrize("norms", [["none", "batch", "ghost", "seq", "layer"], ["none", "batch", "ghost", "seq"]])
def test_every_column_of_panels_ends_in_an_axis(norms):
    axes = plot_landscape(frames(*norms, seeds=(0,)), layout="multiples").axes
    columns = len({panel.get_position().x0 for panel in axes})
    assert len(axes) == len(norms)
    assert [bool(panel.get_xlabel()) for panel in axes] == [False] * (len(norms) - columns) + [True] * columns


def test_colours_grow_darker():
    figure = plot_landscape(frames("none", "batch", "ghost", "seq"), layout="multiples")
    shades = [luminance(axes.lines[0].get_color()) for axes in figure.axes]
    assert all(lighter - darker > 0.1 for lighter, darker in pairwise(shades))


def test_the_narrow_band_lies_over_the_wide_one():
    runs = pd.concat([frame("none", width=0.3), frame("batch", width=9.0)])
    wide, narrow = bands(plot_landscape(runs, layout="overlay").axes[0])
    assert wide.get_datalim(wide.axes.transData).height > narrow.get_datalim(narrow.axes.transData).height
    assert luminance(wide.get_facecolor()[0][:3]) < luminance(narrow.get_facecolor()[0][:3])  # colours keep their norm


def test_steps_or_epochs():
    run = frame(steps=20)
    axes = plot_landscape(run, x="epoch").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), run["epoch"])
    assert axes.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "time"}, "x is 'time'; it can be step, epoch"),
        ({"scale": "sqrt"}, "scale is 'sqrt'; it can be auto, log, linear"),
        ({"layout": "grid"}, "layout is 'grid'; it can be auto, overlay, multiples"),
    ],
)
def test_options_that_do_not_exist_are_named(options, message):
    with pytest.raises(UserError, match=message):
        plot_landscape(frame(steps=2), **options)


def test_a_frame_without_rows_is_refused():
    with pytest.raises(UserError, match="no rows"):
        plot_landscape(frame(steps=2).iloc[:0])


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_written_by_its_suffix_and_always_the_same(tmp_path, suffix, start):
    pictures = [tmp_path / "new" / f"{name}{suffix}" for name in "ab"]
    for picture in pictures:
        save(plot_landscape(frame(steps=5)), picture)
    first, second = (picture.read_bytes() for picture in pictures)
    assert first.startswith(start)
    assert first == second
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"figure\.jpg; give a name that ends in \.png, \.svg, \.pdf"):
        save(plot_landscape(frame(steps=5)), tmp_path / "figure.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "figure.png", tmp_path / "folder.png"):
        with pytest.raises(UserError, match="cannot be written"):
            save(plot_landscape(frame(steps=5)), path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_notebook_can_show_it_and_global_state_is_left_alone(tmp_path):
    before = dict(mpl.rcParams)
    figure = plot_landscape(frame(steps=5))
    assert figure._repr_png_().startswith(b"\x89PNG")
    save(figure, tmp_path / "figure.svg")
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


def test_drawing_does_not_import_torch():
    program = "import sys, landscape.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
