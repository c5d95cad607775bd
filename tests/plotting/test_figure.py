"""The style of figures, whatever the user's settings, and many runs in one figure."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text
from recordings import frame, frames

from benchmarks.charts import draw_norms, draw_rays
from landscape.paper.figure1 import figure1_blocks, plot_blocks
from landscape.paper.rank_changes import plot_orders
from landscape.plotting.figure import LandscapeFigure, _family_with, figure_style, save_figure, use_fallback_fonts
from landscape.plotting.landscape import COLOURED, plot_landscape

JOURNAL = {
    "font.size": 4,
    "axes.titlesize": 3,
    "axes.labelsize": 3,
    "legend.fontsize": 3,
    "legend.frameon": True,
    "figure.figsize": (2, 1),
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 1.0,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "lines.linewidth": 5,
    "axes.prop_cycle": plt.cycler(color=["red"]),
    "axes.formatter.limits": (-1, 1),
    "text.parse_math": True,
    "xtick.direction": "in",
}
STYLES = {"journal": JOURNAL, "TeX": {"text.usetex": True, "axes.formatter.use_mathtext": False}} | {
    name: mpl.style.library[name] for name in ("dark_background", "bmh")
}


def landscape():
    return plot_landscape(frames("none", "batch", seeds=(0,), steps=10).assign(groups=2))


def several():
    return plot_landscape(frames("none", "batch", seeds=(0,), steps=10), measure=["loss", "beta"])


def blocks():
    return plot_blocks(figure1_blocks())


def orders():
    facts = {"model": "simplenet", "dataset": "digits", "batch_size": 128, "layer": "norm 1 of 1", "channel": 0}
    return plot_orders(pd.DataFrame({**facts, "groups": [1, 2] * 2, "updates": [0, 0, 9, 9], "share": [0, 0.1] * 2}))


def rays():
    row = {"ratio": 1.5, "from": 1.4, "to": 1.6, "goal": np.nan, "note": "", "base": "K forward passes"}
    return draw_rays({"MLP_1": pd.DataFrame([row, row], index=["landscape", "copy & move"])})


def norms():
    index = pd.MultiIndex.from_tuples([("(64, 32)", "GhostNorm"), ("(64, 32)", "other_one")])
    return draw_norms(pd.DataFrame({"ratio": [1.1, 30.0]}, index=index))


FIGURES = [landscape, several, blocks, orders, rays, norms]


def picture(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    buffer.seek(0)
    return imread(buffer)


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("style", STYLES)
def test_same_picture_in_any_style(style, draw):
    expected, kept = picture(draw()), draw()
    with mpl.rc_context(dict(STYLES[style])):
        before = dict(mpl.rcParams)
        inside = [picture(draw()), picture(kept)]
        assert dict(mpl.rcParams) == before
    later = draw_in(style, draw)
    for found in (*inside, picture(later)):
        np.testing.assert_array_equal(found, expected)


def draw_in(style, draw):
    with mpl.rc_context(dict(STYLES[style])):
        return draw()


def test_saved_and_displayed_in_any_style(tmp_path):
    save_figure(landscape(), tmp_path / "usual.png")
    usual = landscape()._repr_png_()
    with mpl.rc_context(dict(STYLES["dark_background"])):
        save_figure(landscape(), tmp_path / "dark.png")
        assert landscape()._repr_png_() == usual
    assert (tmp_path / "usual.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


@pytest.mark.parametrize("style", STYLES)
def test_drawn_on_a_canvas_in_any_style(style):
    def pixels(figure):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()

    def below_zero():
        run = frame(steps=10)
        return plot_landscape(run.assign(**{name: run[name] - 5 for name in ("loss", "loss_min", "loss_max")}))

    expected, figure = pixels(below_zero()), below_zero()  # Tick labels, with their signs, are made while drawing.
    with mpl.rc_context(dict(STYLES[style])):
        np.testing.assert_array_equal(pixels(figure), expected)


def test_users_font_and_resolution_are_kept():
    with mpl.rc_context({"font.family": ["serif"], "font.serif": ["STIXGeneral"], "figure.dpi": 50, "savefig.dpi": 40}):
        figure = landscape()
        assert {tuple(text.get_fontfamily()) for text in figure.findobj(Text)} == {("serif",)}
        assert figure.dpi == 50
        with figure_style():
            assert mpl.rcParams["font.serif"] == ["STIXGeneral"]
        buffer = io.BytesIO()
        figure.savefig(buffer)
        buffer.seek(0)
        assert imread(buffer).shape[1] == 8 * 40


def test_names_with_special_characters():
    names = ["a_b $x% &#", r"\alpha {", "$", "^~"]
    runs = pd.concat([frame(name, steps=5).assign(run=name) for name in names])
    with mpl.rc_context({"text.usetex": True}):
        for layout in ("overlay", "multiples"):
            figure = plot_landscape(runs, layout=layout)
            figure.draw_without_rendering()
            shown = {text.get_text() for text in figure.findobj(Text)}
            assert set(names) <= shown


def test_fallback_font():
    name = "жизнь ∇ β"
    with mpl.rc_context({"font.family": ["cmr10"], "axes.formatter.use_mathtext": True}):
        figure = plot_landscape(frame(name, steps=5).assign(norm=name), layout="multiples")
        FigureCanvasAgg(figure).draw()  # Warnings are errors.
    (title,) = (text for text in figure.findobj(Text) if text.get_text() == name)
    assert title.get_fontfamily()[0] == "cmr10"
    assert len(title.get_fontfamily()) > 1


def test_characters_that_no_font_has(monkeypatch):
    # The fonts of this machine may have all characters; those of matplotlib have no Chinese ones.
    own = [font for font in font_manager.fontManager.ttflist if Path(mpl.get_data_path()) in Path(font.fname).parents]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    _family_with.cache_clear()
    figure = plot_landscape(frames("批归一化", "实验", seeds=(0,), steps=5), layout="multiples")
    with pytest.warns(UserWarning, match="一 化 实 归 批 验") as caught:
        FigureCanvasAgg(figure).draw()
    assert len(caught) == 1
    FigureCanvasAgg(figure).draw()  # It warns once.
    _family_with.cache_clear()


def test_use_fallback_fonts_prefers_none():
    text = Text(text="é β", fontfamily=["DejaVu Sans"])
    assert use_fallback_fonts([text]) == set()
    assert text.get_fontfamily() == ["DejaVu Sans"]


def sweep(runs, steps=5, name="trial{:03d}"):
    own = [frame(seed=seed, steps=steps).assign(run=name.format(seed)) for seed in range(runs)]
    return pd.concat(own, ignore_index=True).drop(columns="norm")


def artists(figure):
    return sum(1 for _ in figure.findobj(Artist))


def test_many_runs_in_linear_time(monkeypatch):
    """Count artists and calls, as seconds depend on the machine."""
    import landscape.plotting.bands as bands
    import landscape.plotting.landscape as module

    calls = {"compared": 0, "drawn": 0}

    def counted(name, function):
        def wrapper(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(bands, "_covered", counted("compared", bands._covered))
    monkeypatch.setattr(module, "_shade", counted("drawn", module._shade))
    sizes = {}
    for runs in (16, 24, 32):
        calls.update(compared=0, drawn=0)
        with pytest.warns(UserWarning, match=f"{runs} bands"):
            figure = plot_landscape(sweep(runs), measure="loss")
        sizes[runs] = (artists(figure), calls["compared"], calls["drawn"])
        assert len(figure.axes) == COLOURED
    for few, more, many in zip(*sizes.values(), strict=True):
        assert many - more <= 1.1 * (more - few)
    assert 0 < sizes[32][1] <= COLOURED * (COLOURED - 1) / 2


@pytest.mark.parametrize(
    "name", ["trial{:03d}", "a-long-name-of-a-run-in-the-folder-of-the-sweep/{:03d}", "x" * 180 + "{:03d}"]
)
@pytest.mark.parametrize("runs", [5, 12, 30])
def test_legend_covers_nothing(name, runs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = plot_landscape(sweep(runs, name=name), measure="loss", layout="overlay")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    box, panel = legend.get_window_extent(), axes.get_tightbbox(canvas.get_renderer())
    assert box.y0 >= panel.y1
    assert box.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height > 0.4 * figure.bbox.height
    assert len(legend.get_texts()) == min(runs, COLOURED)


@pytest.mark.parametrize("runs", [3, 4, 12, 30])
def test_titles_of_panels_cover_nothing(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = plot_landscape(sweep(runs, name="long-name-of-a-run-in-a-folder-of-runs/{:03d}"), layout="multiples")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for one in titles for other in titles if one is not other)
    assert max(title.x1 for title in titles) <= figure.bbox.x1


def test_many_runs_are_one_band_with_a_norm():
    (axes,) = plot_landscape(sweep(30).assign(norm="my sweep"), measure="loss").axes
    assert len(axes.collections) == 1


def test_usetex_without_latex(tmp_path):
    """A process without LaTeX on its path, whose matplotlibrc asks for it."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from recordings import frame\n"
        "from landscape.plotting.figure import save_figure\n"
        "from landscape.plotting.landscape import plot_landscape\n"
        "save_figure(plot_landscape(frame('a_b $ %', steps=5)), sys.argv[2])\n"
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "PATH": str(tmp_path)}
    out = tmp_path / "figure.png"
    subprocess.run([sys.executable, "-c", code, helpers, str(out)], check=True, env=environment)
    assert out.stat().st_size > 1000


def test_figure_without_style_is_drawn_in_it():
    with mpl.rc_context(dict(STYLES["dark_background"])):
        with figure_style():
            figure = LandscapeFigure(figsize=(2, 2))
            figure.subplots().plot([1, 2])
        shades = picture(figure)[..., :3]
    assert shades[0, 0].tolist() == [1.0, 1.0, 1.0]
