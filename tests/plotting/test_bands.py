from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from recordings import frame, frames, without

from landscape.analysis.labels import band_labels
from landscape.analysis.measures import measured
from landscape.errors import LandscapeError
from landscape.plotting.bands import Scale, _gap_ends, bands_overlap, draw_order, panel_data


def view(runs, measure="loss", scale="auto"):
    return panel_data(runs.assign(band=band_labels(runs)), "step", measure, scale)


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
    assert not bands_overlap(drawn)
    assert bands_overlap(view(runs, "predictiveness"))


def test_an_update_that_is_not_finite_is_a_gap():
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
        LandscapeError, match=r"A gap of -1 has no place on a logarithmic axis; choose scale linear or symlog"
    ):
        view(with_extremes("gap", -1.0, 5.0), "gap", "log")
    assert view(frames("none", seeds=(0,)), "beta", "log").scale == Scale("log")


def test_what_is_small_is_so_for_the_eye():
    near_zero, far = frame("none", steps=5).assign(gap_min=0.001, gap_max=1.0), frame("batch", steps=5)
    runs = pd.concat([near_zero, far.assign(gap_min=100.0, gap_max=150.0)], ignore_index=True)
    assert list(draw_order(view(runs, "gap", "linear"))) == ["BatchNorm", "No normalization"]
    for scale in ("log", "symlog"):
        assert list(draw_order(view(runs, "gap", scale))) == ["No normalization", "BatchNorm"]


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
    assert shown.limit == pytest.approx(10 * usual, rel=0.5)
    assert f"{shown.limit:.0e}" == f"{shown.limit:e}".replace(".000000", "")  # a round number
    assert shown.bands["No normalization"].high[-1] == shown.limit
    assert view(calm).limit is None


@pytest.mark.parametrize(
    ("scale", "exploding", "limit"),
    [("log", 1, 30), ("linear", 1, 30), ("log", 30, 3000), ("linear", 30, 30), ("log", 0, None), ("linear", 0, None)],
)
def test_the_axis_ends_near_what_is_usual_however_much_explodes(scale, exploding, limit):
    run = frame(steps=100).assign(loss=3.0, loss_min=2.0, loss_max=3.0)
    run.loc[100 - exploding :, ["loss", "loss_min", "loss_max"]] = 1e30
    assert view(run, scale=scale).limit == limit


def test_a_measure_that_grows_by_decades_is_not_cut():
    run = frame(steps=100)
    run["direction_norm"] = np.geomspace(1, 1e-6, 100)
    assert view(run, "beta").limit is None
    assert view(run.iloc[::-1].assign(step=range(100)), "beta").limit is None


def test_what_runs_begin_with_is_not_cut():
    sizes = np.where(np.arange(100) < 10, 1e7, 1.0)
    run = frame(steps=100).assign(loss=sizes, loss_min=sizes, loss_max=sizes)
    assert view(run).limit is None
    assert view(run.iloc[::-1].assign(step=range(100))).limit == 1000


def test_both_ends_of_the_axis_are_kept_near():
    run = frame(steps=100).assign(gap_min=-1.0, gap_max=1.0)
    run.loc[50, ["gap_min", "gap_max"]] = [-1e300, 1e300]
    band = view(run, "gap").bands["BatchNorm"]
    assert (band.low.min(), band.high.max()) == (-10.0, 10.0)


def broken(runs, x="step"):
    """Where the bands are interrupted, by label."""
    found = panel_data(runs.assign(band=band_labels(runs)), x, "loss", "auto")
    assert found.interrupted == any(np.isnan(band.low).any() for band in found.bands.values())
    return {label: list(band.x[np.isnan(band.low)]) for label, band in found.bands.items()}


def at(steps, norm="batch", seed=0):
    """A run that was probed at these steps alone."""
    return frame(norm, seed, steps=len(steps)).assign(step=steps, epoch=np.array(steps) / 7)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(0, 50, 10), []),
        ([*range(10), *range(12, 30)], [10.5]),
        ([*range(0, 50, 5), *range(100, 150, 5)], [72.5]),
        ([*range(10), 50, *range(80, 90)], [29.5, 65]),
        ([0, 31, 61, 92, 121, 154, 184, 220, 251], []),  # as with overhead=
        ([0, 31, 61, 92, 121, 300, 330, 362], [210.5]),
        ([0, 1, 2, 10], [6]),
        ([5], []),
        ([5, 900], []),
    ],
)
def test_a_band_is_broken_where_rows_are_missing(steps, expected):
    assert broken(at(list(steps))) == {"BatchNorm": expected}
    assert broken(at(list(steps)), "epoch")["BatchNorm"] == pytest.approx([x / 7 for x in expected])


def test_a_band_goes_on_where_one_of_its_seeds_has_rows():
    holed = [*range(10), *range(20, 40)]
    runs = [at(holed), at(list(range(30)), seed=1), at(holed, "none"), at(holed, "none", seed=1)]
    assert broken(pd.concat(runs, ignore_index=True)) == {"No normalization": [14.5], "BatchNorm": []}
    apart = [at(list(range(10))), at(list(range(15, 30)), seed=1)]
    assert broken(pd.concat(apart, ignore_index=True)) == {"BatchNorm": [12]}


def test_many_updates_in_a_bin_hide_no_hole():
    steps = [*range(30_000), *range(31_000, 60_000)]
    found = broken(at(steps))["BatchNorm"]
    assert len(found) == 1
    assert 29_900 < found[0] < 31_100


def test_a_hole_within_the_last_bin_is_too_small_to_be_seen():
    assert broken(at([*range(4998), 5010, 5011])) == {"BatchNorm": []}


def test_a_run_without_what_a_measure_needs_has_no_marks():
    run = frame("none")
    run.loc[5, "slope"] = np.nan
    (marks,) = view(pd.concat([run, without(frame("none", 1), "slope")], ignore_index=True), "gap").marks.values()
    assert marks.spans.tolist() == [[4.5, 5.5]]
    assert marks.first.tolist() == [5]


def lost(run, *steps):
    return run.assign(loss_max=run["loss_max"].where(~run["step"].isin(steps), np.inf))


def test_marks_are_where_updates_are_not_finite():
    runs = [lost(frame("none"), 3, 4, 5, 30, 39), lost(frame("none", 1), 0, 5), frame("batch")]
    marks = view(pd.concat(runs, ignore_index=True)).marks
    assert list(marks) == ["No normalization"]
    spans = [[0, 0.5], [2.5, 5.5], [29.5, 30.5], [38.5, 39]]
    assert marks["No normalization"].spans.tolist() == spans
    assert marks["No normalization"].first.tolist() == [3, 0]


def test_a_mark_of_many_updates_is_that_of_their_bin():
    (band,) = view(lost(frame(steps=5000), 2512, 2513)).marks.values()
    assert band.spans.tolist() == [[2507.5, 2512.5]]  # five updates, around the point that they share
    assert band.first.tolist() == [2512]


def test_a_run_of_one_update_that_is_not_finite():
    found = view(lost(frame(steps=1), 0))
    assert found.marks["BatchNorm"].spans.tolist() == [[0, 0]]
    assert np.isnan(found.bands["BatchNorm"].high).all()


def slowly_resumed(runs):
    """Where the record of one band goes on, run by run and gap by gap."""
    holes = []
    for steps in runs:
        distances = sorted(b - a for a, b in pairwise(steps))
        low, high = (distances[int(share * (len(distances) - 1))] for share in (0.25, 0.75))
        fence = max(high + 3 * (high - low), 1.5 * high)
        holes.append([(a, b) for a, b in pairwise(steps) if b - a > fence])
    starts = [steps[0] for steps in runs] + [b for of in holes for _, b in of]

    def spanned(start):
        """Whether some run goes on from before this row to it or beyond it."""
        return any(
            steps[0] < start <= steps[-1] and not any(a < start <= b for a, b in of)
            for steps, of in zip(runs, holes, strict=True)
        )

    return sorted({start for start in starts if start > min(map(min, runs)) and not spanned(start)})


@pytest.mark.parametrize("seed", range(20))
def test_a_record_goes_on_as_run_by_run(seed):
    generator = np.random.default_rng(seed)
    runs = []
    for _ in range(generator.integers(1, 4)):
        far = generator.random(60) < 0.1
        runs.append(np.cumsum(np.where(far, generator.integers(5, 60, 60), generator.integers(1, 4, 60))).tolist())
    rows = [pd.DataFrame({"band": "band", "run": str(run), "step": steps}) for run, steps in enumerate(runs)]
    found = _gap_ends(pd.concat(rows).sample(frac=1, random_state=seed), "step")["band"]
    assert found.tolist() == slowly_resumed(runs)
    assert seed or len(found)
