import numpy as np
import pandas as pd
import pytest
from traces import frame, frames, without

from landscape.bands import Band, Scale, hides, largest_first, view_of
from landscape.errors import UserError
from landscape.measures import band_labels
from landscape.smoothness import measured


def view(runs, measure="loss", scale="auto"):
    return view_of(runs.assign(band=band_labels(runs)), "step", measure, scale)


def with_extremes(measure, low, high):
    """A run of ten updates whose measure lies between extremes."""
    extremes = {f"{measure}_min": np.geomspace(low, high / 2, 10) if low > 0 else low, f"{measure}_max": high}
    return frame(steps=10).assign(loss=abs(high), **extremes)


def test_points_are_those_of_the_updates():
    run = measured(frame(steps=6), "gap")
    (band,) = view(run, "gap").bands.values()
    for found, name in ((band.x, "step"), (band.low, "gap_min"), (band.high, "gap_max")):
        np.testing.assert_array_equal(found, run[name])
    assert np.isnan(band.line).all()


def test_a_measure_without_a_band_has_no_height_and_hides_nothing():
    runs = frames("none", "batch", steps=6)  # the two are alike
    drawn = view(runs, "beta")
    for band in drawn.bands.values():
        np.testing.assert_array_equal(band.low, band.line)
        np.testing.assert_array_equal(band.high, band.line)
    assert not hides(drawn)
    assert hides(view(runs, "predictiveness"))


def test_a_value_that_is_not_finite_is_a_gap():
    run = frame(steps=6)
    run.loc[2, "direction_norm"] = 0.0
    assert list(np.flatnonzero(np.isnan(view(run, "beta").bands["BatchNorm"].line))) == [2]
    assert list(np.flatnonzero(np.isnan(view(run, "curvature").bands["BatchNorm"].high))) == [2]
    assert not np.isnan(view(run, "gap").bands["BatchNorm"].high).any()


def test_bands_that_lack_what_the_measure_needs_are_not_there():
    runs = pd.concat([without(frame("none", steps=2), "slope"), frame("batch", steps=2)], ignore_index=True)
    assert list(view(runs, "gap").bands) == ["BatchNorm"]
    assert list(view(runs).bands) == ["No normalization", "BatchNorm"]


@pytest.mark.parametrize(
    ("measure", "low", "high", "scale", "expected"),
    [
        ("gap", 0.01, 1.0, "auto", Scale("log")),
        ("gap", 0.2, 1.0, "auto", Scale("linear")),
        ("gap", -1.0, 5.0, "auto", Scale("linear")),
        ("gap", -0.02, 5.0, "auto", Scale("symlog", 0.01)),
        ("gap", -5.0, 0.02, "auto", Scale("symlog", 0.01)),
        ("gap", -0.02, 5.0, "linear", Scale("linear")),
        ("gap", -1.0, 5.0, "symlog", Scale("symlog", 1.0)),
        ("predictiveness", 0.0, 1e-3, "auto", Scale("linear")),
        ("gap", 0.0, 0.0, "auto", Scale("linear")),
        ("gap", 0.0, 0.0, "symlog", Scale("symlog", 1.0)),
        ("loss", -0.02, 5.0, "auto", Scale("linear")),
        ("loss", -0.02, 5.0, "symlog", Scale("symlog", 0.01)),
        ("gap", np.nan, np.nan, "auto", Scale("linear")),
    ],
)
def test_the_scale_fits_the_values(measure, low, high, scale, expected):
    assert view(with_extremes(measure, low, high), measure, scale).scale == expected


def test_what_has_no_place_on_a_logarithmic_axis_is_told():
    with pytest.raises(
        UserError, match=r"A gap of -1 has no place on a logarithmic axis; choose scale linear or symlog"
    ):
        view(with_extremes("gap", -1.0, 5.0), "gap", "log")
    assert view(frames("none", seeds=(0,)), "beta", "log").scale == Scale("log")


def test_what_is_small_is_so_for_the_eye():
    near_zero, far = frame("none", steps=5).assign(gap_min=0.001, gap_max=1.0), frame("batch", steps=5)
    runs = pd.concat([near_zero, far.assign(gap_min=100.0, gap_max=150.0)], ignore_index=True)
    assert list(largest_first(view(runs, "gap", "linear"))) == ["BatchNorm", "No normalization"]
    for scale in ("log", "symlog"):
        assert list(largest_first(view(runs, "gap", scale))) == ["No normalization", "BatchNorm"]


def test_a_symmetric_axis_is_linear_in_the_middle():
    seen = Scale("symlog", 0.1).seen(np.array([-10.0, -1.0, -0.05, 0.0, 0.05, 0.1, 1.0, 10.0]))
    np.testing.assert_allclose(seen, -seen[[7, 6, 4, 3, 2, 2, 1, 0]] * [1, 1, 1, 1, 1, 2, 1, 1])
    np.testing.assert_allclose(np.diff(seen[5:]), seen[7] - seen[6])


def test_a_run_that_diverges_does_not_flatten_the_others():
    calm, wild = measured(frame("batch"), "loss"), measured(frame("none"), "loss")
    wild.loc[39, ["loss", "loss_min", "loss_max"]] = [1e3, 1e3, 1e6]
    runs = pd.concat([calm, wild], ignore_index=True)
    shown = view(runs)
    usual = np.quantile(runs[["loss", "loss_min", "loss_max"]], 0.95)
    assert shown.top == pytest.approx(10 * usual)
    assert shown.bands["No normalization"].high[-1] == 1e6  # the axis ends, the values stay
    assert view(calm).top is None
    low = Band(*(part.clip(max=shown.top) for part in shown.bands["No normalization"]))
    cut = shown._replace(bands=shown.bands | {"No normalization": low}, top=None)
    assert list(largest_first(shown)) == list(largest_first(cut))
    assert hides(shown) == hides(cut)
