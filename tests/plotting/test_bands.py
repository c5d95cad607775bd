"""Points, gaps, scales and marks of bands."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from recordings import frame, frames, without

from landscape.analysis.labels import band_labels
from landscape.analysis.measures import measured
from landscape.errors import LandscapeError
from landscape.plotting.bands import Scale, bands_overlap, draw_order, gap_ends, panel_data


def view(runs, measure="loss", scale="auto"):
    return panel_data(runs.assign(band=band_labels(runs)), "step", measure, scale)


def with_extremes(measure, low, high):
    """Return a run of 10 updates whose measure lies between extremes."""
    extremes = {f"{measure}_min": np.geomspace(low, high / 2, 10) if low > 0 else low, f"{measure}_max": high}
    return frame(steps=10).assign(loss=abs(high), **extremes)


def test_panel_data_points():
    run = measured(frame(steps=6), "gap")
    (band,) = view(run, "gap").bands.values()
    for found, name in ((band.x, "step"), (band.low, "gap_min"), (band.high, "gap_max")):
        np.testing.assert_array_equal(found, run[name])
    assert np.isnan(band.line).all()


def test_bands_overlap_line():
    runs = frames("none", "batch", steps=6)  # equal losses
    drawn = view(runs, "beta")
    for band in drawn.bands.values():
        np.testing.assert_array_equal(band.low, band.line)
        np.testing.assert_array_equal(band.high, band.line)
    assert not bands_overlap(drawn)
    assert bands_overlap(view(runs, "predictiveness"))


def test_panel_data_non_finite_gap():
    run = frame(steps=6)
    run.loc[2, "direction_norm"] = 0.0
    assert list(np.flatnonzero(np.isnan(view(run, "beta").bands["BatchNorm"].line))) == [2]
    assert list(np.flatnonzero(np.isnan(view(run, "curvature").bands["BatchNorm"].high))) == [2]
    assert not np.isnan(view(run, "gap").bands["BatchNorm"].high).any()


def test_panel_data_band_without_measure():
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
def test_panel_data_scale(measure, low, high, scale, expected):
    assert view(with_extremes(measure, low, high), measure, scale).scale == expected


def test_panel_data_log_of_negative():
    with pytest.raises(LandscapeError, match=r"scale='log': the gap must be positive.*-1.*symlog"):
        view(with_extremes("gap", -1.0, 5.0), "gap", "log")
    assert view(frames("none", seeds=(0,)), "beta", "log").scale == Scale("log")


def test_draw_order_on_axis():
    near_zero, far = frame("none", steps=5).assign(gap_min=0.001, gap_max=1.0), frame("batch", steps=5)
    runs = pd.concat([near_zero, far.assign(gap_min=100.0, gap_max=150.0)], ignore_index=True)
    assert list(draw_order(view(runs, "gap", "linear"))) == ["BatchNorm", "No normalization"]
    for scale in ("log", "symlog"):
        assert list(draw_order(view(runs, "gap", scale))) == ["No normalization", "BatchNorm"]


def test_axis_position_symlog():
    seen = Scale("symlog", 0.1).axis_position(np.array([-10.0, -1.0, -0.05, 0.0, 0.05, 0.1, 1.0, 10.0]))
    np.testing.assert_allclose(seen, -seen[[7, 6, 4, 3, 2, 2, 1, 0]] * [1, 1, 1, 1, 1, 2, 1, 1])
    np.testing.assert_allclose(np.diff(seen[5:]), seen[7] - seen[6])


def test_limit_one_run_diverges():
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
def test_limit_explosion(scale, exploding, limit):
    run = frame(steps=100).assign(loss=3.0, loss_min=2.0, loss_max=3.0)
    run.loc[100 - exploding :, ["loss", "loss_min", "loss_max"]] = 1e30
    assert view(run, scale=scale).limit == limit


def test_limit_growing_measure():
    run = frame(steps=100)
    run["direction_norm"] = np.geomspace(1, 1e-6, 100)
    assert view(run, "beta").limit is None
    assert view(run.iloc[::-1].assign(step=range(100)), "beta").limit is None


def test_limit_first_values():
    sizes = np.where(np.arange(100) < 10, 1e7, 1.0)
    run = frame(steps=100).assign(loss=sizes, loss_min=sizes, loss_max=sizes)
    assert view(run).limit is None
    assert view(run.iloc[::-1].assign(step=range(100))).limit == 1000


def test_limit_both_ends():
    run = frame(steps=100).assign(gap_min=-1.0, gap_max=1.0)
    run.loc[50, ["gap_min", "gap_max"]] = [-1e300, 1e300]
    band = view(run, "gap").bands["BatchNorm"]
    assert (band.low.min(), band.high.max()) == (-10.0, 10.0)


def gaps(runs, x="step"):
    """Return the gaps of the bands, by label."""
    found = panel_data(runs.assign(band=band_labels(runs)), x, "loss", "auto")
    assert found.interrupted == any(np.isnan(band.low).any() for band in found.bands.values())
    return {label: list(band.x[np.isnan(band.low)]) for label, band in found.bands.items()}


def at(steps, norm="batch", seed=0):
    """Return a run that was probed at these steps only."""
    return frame(norm, seed, steps=len(steps)).assign(step=steps, epoch=np.array(steps) / 7)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(0, 50, 10), []),
        ([*range(10), *range(12, 30)], [10.5]),
        ([*range(0, 50, 5), *range(100, 150, 5)], [72.5]),
        ([*range(10), 50, *range(80, 90)], [29.5, 65]),
        ([0, 31, 61, 92, 121, 154, 184, 220, 251], []),  # distances with overhead=
        ([0, 31, 61, 92, 121, 300, 330, 362], [210.5]),
        ([0, 1, 2, 10], [6]),
        ([5], []),
        ([5, 900], []),
    ],
)
def test_gap_of_missing_rows(steps, expected):
    assert gaps(at(list(steps))) == {"BatchNorm": expected}
    assert gaps(at(list(steps)), "epoch")["BatchNorm"] == pytest.approx([x / 7 for x in expected])


def test_gap_covered_by_seed():
    with_gap = [*range(10), *range(20, 40)]
    runs = [at(with_gap), at(list(range(30)), seed=1), at(with_gap, "none"), at(with_gap, "none", seed=1)]
    assert gaps(pd.concat(runs, ignore_index=True)) == {"No normalization": [14.5], "BatchNorm": []}
    apart = [at(list(range(10))), at(list(range(15, 30)), seed=1)]
    assert gaps(pd.concat(apart, ignore_index=True)) == {"BatchNorm": [12]}


def test_gap_between_bins():
    steps = [*range(30_000), *range(31_000, 60_000)]
    found = gaps(at(steps))["BatchNorm"]
    assert len(found) == 1
    assert 29_900 < found[0] < 31_100


def test_gap_in_last_bin():
    assert gaps(at([*range(4998), 5010, 5011])) == {"BatchNorm": []}


def test_marks_run_without_measure():
    run = frame("none")
    run.loc[5, "slope"] = np.nan
    (marks,) = view(pd.concat([run, without(frame("none", 1), "slope")], ignore_index=True), "gap").marks.values()
    assert marks.spans.tolist() == [[4.5, 5.5]]
    assert marks.first.tolist() == [5]


def lost(run, *steps):
    return run.assign(loss_max=run["loss_max"].where(~run["step"].isin(steps), np.inf))


def test_marks():
    runs = [lost(frame("none"), 3, 4, 5, 30, 39), lost(frame("none", 1), 0, 5), frame("batch")]
    marks = view(pd.concat(runs, ignore_index=True)).marks
    assert list(marks) == ["No normalization"]
    spans = [[0, 0.5], [2.5, 5.5], [29.5, 30.5], [38.5, 39]]
    assert marks["No normalization"].spans.tolist() == spans
    assert marks["No normalization"].first.tolist() == [3, 0]


def test_marks_of_bins():
    (band,) = view(lost(frame(steps=5000), 2512, 2513)).marks.values()
    assert band.spans.tolist() == [[2507.5, 2512.5]]  # the bin of 5 updates
    assert band.first.tolist() == [2512]


def test_marks_single_update():
    found = view(lost(frame(steps=1), 0))
    assert found.marks["BatchNorm"].spans.tolist() == [[0, 0]]
    assert np.isnan(found.bands["BatchNorm"].high).all()


def gap_ends_by_loop(runs):
    """Return the ends of the gaps of one band, run by run."""
    gaps_of_runs = []
    for steps in runs:
        distances = sorted(b - a for a, b in pairwise(steps))
        low, high = (distances[int(share * (len(distances) - 1))] for share in (0.25, 0.75))
        fence = max(high + 3 * (high - low), 1.5 * high)
        gaps_of_runs.append([(a, b) for a, b in pairwise(steps) if b - a > fence])
    starts = [steps[0] for steps in runs] + [b for of in gaps_of_runs for _, b in of]

    def covered(start):
        """Return True if a run continues across this row."""
        return any(
            steps[0] < start <= steps[-1] and not any(a < start <= b for a, b in of)
            for steps, of in zip(runs, gaps_of_runs, strict=True)
        )

    return sorted({start for start in starts if start > min(map(min, runs)) and not covered(start)})


@pytest.mark.parametrize("seed", range(20))
def test_gap_ends_by_loop(seed):
    generator = np.random.default_rng(seed)
    runs = []
    for _ in range(generator.integers(1, 4)):
        far = generator.random(60) < 0.1
        runs.append(np.cumsum(np.where(far, generator.integers(5, 60, 60), generator.integers(1, 4, 60))).tolist())
    rows = [pd.DataFrame({"band": "band", "run": str(run), "step": steps}) for run, steps in enumerate(runs)]
    found = gap_ends(pd.concat(rows).sample(frac=1, random_state=seed), "step")["band"]
    assert found.tolist() == gap_ends_by_loop(runs)
    assert seed or len(found)
