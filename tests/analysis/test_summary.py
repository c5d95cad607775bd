"""Bands, summaries and labels."""

import numpy as np
import pandas as pd
import pytest
from recordings import frame, frames, uphill, without

from landscape.analysis.labels import band_labels
from landscape.analysis.measures import measured
from landscape.analysis.summary import envelope, has_measure, is_finite, summarize
from landscape.errors import LandscapeError
from landscape.names import MEASURES

NAN, INF = np.nan, np.inf


def small(loss_min, loss_max, loss=1.0, **columns):
    steps = range(len(loss_min))
    return pd.DataFrame(
        {
            "step": steps,
            "epoch": 0.0,
            "loss": loss,
            "loss_min": loss_min,
            "loss_max": loss_max,
            "seconds": 0.5,
            **columns,
        }
    )


def test_envelope_few_updates():
    run = frame(steps=30)
    band = envelope(run, bins=30)
    for name in ("step", "loss", "loss_min", "loss_max"):
        np.testing.assert_array_equal(band[name], run[name])
    assert set(band["updates"]) == {1}


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_envelope_bins(bins):
    run = frame(steps=40, seed=3)
    band = envelope(run, bins=bins)
    assert len(band) == bins
    assert band["updates"].sum() == 40
    for number, rows in run.groupby(np.arange(40) * bins // 40):
        point = band.iloc[number]
        assert (point["step"], point["loss_min"], point["loss_max"]) == (
            rows["step"].min(),
            rows["loss_min"].min(),
            rows["loss_max"].max(),
        )
        assert point["loss"] == pytest.approx(rows["loss"].mean())


def test_envelope_joins_seeds():
    runs = frames("batch", seeds=(0, 1, 2), steps=20)
    band = envelope(runs, by="norm")
    wide = runs.pivot_table(index="step", columns="seed", values=["loss_min", "loss_max"])
    np.testing.assert_array_equal(band["loss_min"], wide["loss_min"].min(axis=1))
    np.testing.assert_array_equal(band["loss_max"], wide["loss_max"].max(axis=1))
    assert set(band["updates"]) == {3}


@pytest.mark.parametrize("measure", [envelope, summarize])
def test_group_of_missing_values(measure):
    runs = pd.concat([frame("batch", steps=1).assign(groups=None), frame("ghost", steps=1).assign(groups=16)])
    found = measure(runs.astype({"groups": "Int64"}), by=("norm", "groups"))
    assert list(found["groups"].fillna(0)) == [0, 16]


def test_envelope_common_bins():
    runs = pd.concat([frame("batch", steps=40), frame("none", steps=10)])
    bands = envelope(runs, by="norm", bins=20).set_index("norm")
    assert list(bands.loc["none", "step"]) == list(bands.loc["batch", "step"])[:5]


def test_non_finite_counted():
    losses = [1.0, 3.0, 5.0, 7.0, NAN, NAN]
    run = small([1.0, NAN, 3.0, 4.0, 1.0, NAN], [2.0, NAN, INF, 9.0, 2.0, NAN], losses)
    band = envelope(run, bins=3)
    assert list(band["not_finite"]) == [1, 1, 2]
    np.testing.assert_array_equal(band["loss"], [2.0, 6.0, NAN])
    np.testing.assert_array_equal(band["loss_min"], [1.0, 4.0, NAN])
    np.testing.assert_array_equal(band["loss_max"], [2.0, 9.0, NAN])
    summary = summarize(run).iloc[0]
    assert (summary["updates"], summary["not_finite"], summary["seconds"]) == (6, 4, 3.0)
    assert summary["first_not_finite"] == 1
    assert (summary["mean_range"], summary["median_range"], summary["mean_loss"]) == (3.0, 3.0, 4.0)


def test_envelope_non_finite_in_bin():
    run = frame(steps=40)
    whole = envelope(run, bins=4)
    run.loc[25, ["loss", "loss_min", "loss_max"]] = NAN
    band = envelope(run, bins=4)
    assert list(band["not_finite"]) == [0, 0, 1, 0]
    assert list(band["updates"]) == [10] * 4
    for name in ("loss_min", "loss_max"):
        np.testing.assert_array_equal(band[name], whole[name])  # the extremes are those of other updates
    assert band["loss"][2] == pytest.approx(run["loss"][20:30].drop(25).mean())


def test_one_seed_diverges():
    seeds = [frame("batch", seed, steps=20) for seed in (0, 1, 2)]
    seeds[1].loc[12:, ["loss", "loss_min", "loss_max"]] = [INF, 0.0, INF]
    band = envelope(pd.concat(seeds, ignore_index=True), by="norm")
    healthy = envelope(pd.concat([seeds[0], seeds[2]], ignore_index=True), by="norm")
    for name in ("loss", "loss_min", "loss_max"):
        np.testing.assert_allclose(band[name][12:], healthy[name][12:], rtol=1e-12)
    assert list(band["not_finite"]) == [0] * 12 + [1] * 8
    summary = summarize(pd.concat(seeds, ignore_index=True), by=("norm", "run"))
    assert list(summary["not_finite"]) == [0, 8, 0]
    assert list(summary["first_not_finite"].fillna(-1)) == [-1, 12, -1]


@pytest.mark.parametrize(("name", "value"), [("direction_norm", 1e-310), ("direction_norm", 0.0), ("slope", INF)])
def test_is_finite_overflow(name, value):
    run = frame(steps=4)
    run.loc[2, name] = value
    measure = "beta" if name == "direction_norm" else "gap"
    assert list(is_finite(measured(run, measure), measure)) == [True, True, False, True]
    assert list(envelope(run, measure=measure)["not_finite"]) == [0, 0, 1, 0]
    assert np.isfinite(summarize(run, measure=measure)[f"mean_{measure}"]).all()
    assert not summarize(run)["not_finite"].any()


def test_summarize_no_finite_value():
    summary = summarize(small([NAN, 1.0], [NAN, INF], loss=NAN)).iloc[0]
    assert summary[["mean_range", "median_range", "mean_loss"]].isna().all()
    assert summary["not_finite"] == 2


def test_summarize_by_epoch():
    runs = frames("none", "batch", steps=25)
    summary = summarize(runs, by=("norm", "epoch")).set_index(["norm", "epoch"])
    assert list(summary.index) == [(norm, epoch) for norm in ("batch", "none") for epoch in (0, 1, 2)]
    rows = runs[(runs["norm"] == "none") & (runs["step"].between(10, 19))]
    assert summary.loc[("none", 1), "mean_range"] == pytest.approx((rows["loss_max"] - rows["loss_min"]).mean())
    assert list(summary["updates"]) == [20, 20, 10] * 2


OTHERS = [measure for measure in MEASURES if MEASURES[measure].needs]


@pytest.mark.parametrize("measure", MEASURES)
def test_envelope_measure(measure):
    runs = uphill(frames("batch", seeds=(0, 1, 2), steps=20))
    band = envelope(runs, by="norm", bins=10, measure=measure)
    joined = measured(runs, measure).groupby(runs["step"] // 2)
    np.testing.assert_array_equal(band[f"{measure}_min"], joined[f"{measure}_min"].min())
    np.testing.assert_array_equal(band[f"{measure}_max"], joined[f"{measure}_max"].max())
    assert set(band["updates"]) == {6}
    assert (measure in band) == bool(MEASURES[measure].line)
    if measure in band:
        np.testing.assert_allclose(band[measure], joined[measure].mean(), rtol=1e-12)


def signed():
    """Return 3 updates whose gaps are -4 to -1, -1 to 3, and not all finite."""
    losses = [[-4.0, -1.0], [-1.0, 3.0], [np.nan, 1.0]]
    run = frame(steps=3).assign(loss=0.0, slope=0.0, direction_norm=2.0)
    lists = pd.DataFrame({"losses": losses, "step_sizes": [[0.5, 1.0]] * 3, "gradient_distances": [[1.0, 6.0]] * 3})
    return run.assign(**lists)


@pytest.mark.parametrize(
    ("measure", "sizes"), [("predictiveness", [6, 6, 6]), ("beta", [3, 3, 3]), ("gap", [4, 3]), ("curvature", [8, 2])]
)
def test_summarize_largest_magnitude(measure, sizes):
    summary = summarize(signed(), measure=measure).iloc[0]
    assert list(summary.index[-2:]) == [f"median_{measure}", f"mean_{measure}"]
    assert (summary["updates"], summary["not_finite"]) == (3, 3 - len(sizes))
    assert summary[f"mean_{measure}"] == np.mean(sizes)
    assert summary[f"median_{measure}"] == np.median(sizes)


def test_envelope_beta_mean():
    run = frame(steps=6)
    run.loc[[2, 4, 5], "direction_norm"] = 0.0
    band = envelope(run, bins=3, measure="beta")
    assert list(band["beta"].isna()) == [False, False, True]
    assert list(band["not_finite"]) == [0, 1, 2]
    for name in ("beta", "beta_max"):
        np.testing.assert_array_equal(band[name].iloc[1], measured(run, "beta")["beta"][3])


@pytest.mark.parametrize("measure", OTHERS)
def test_run_without_measure(measure):
    lacking = without(
        frames("none", seeds=(0, 1), steps=3), "slope", "direction_norm", "gradient_distances", "gradient_cosines"
    )
    known = [uphill(frame(norm, seed, steps=3)) for norm, seed in (("batch", 0), ("none", 2))]
    runs = pd.concat([known[0], lacking, known[1]], ignore_index=True)
    assert list(has_measure(runs, measure)) == [True] * 3 + [False] * 6 + [True] * 3
    assert set(envelope(runs, measure=measure)["run"]) == {"batch-0", "none-2"}
    assert set(envelope(runs, by="band", measure=measure)["updates"]) == {1}
    summary = summarize(runs, measure=measure).set_index("run")
    assert summary["updates"].to_dict() == {"batch-0": 3, "none-0": 0, "none-1": 0, "none-2": 3}
    assert list(summary[f"mean_{measure}"].isna()) == [False, True, True, False]
    assert set(summary["not_finite"]) == {0}
    assert summary["mean_loss"].notna().all()


@pytest.mark.parametrize("known", [["run"], ["norm"], []])
def test_update_without_measure(known):
    run = frame(steps=4)
    run.loc[1, "slope"] = np.nan
    runs = pd.concat([run, without(frame("none", steps=4), "slope")] if known else [run], ignore_index=True)
    runs = runs.drop(columns={"run", "norm"} - set(known))
    assert list(has_measure(runs, "gap")) == [True] * 4 + [False] * 4 * bool(known)
    assert list(envelope(runs, by=known or "run", measure="gap")["not_finite"]) == [0, 1, 0, 0]


@pytest.mark.parametrize("measure", [envelope, summarize])
def test_no_run_with_measure(measure):
    with pytest.raises(LandscapeError, match=r"gap.* requires slope"):
        measure(without(frame(steps=2), "slope"), measure="gap")
    with pytest.raises(LandscapeError, match=r"measure='width'"):
        measure(frame(steps=2), measure="width")


def test_band_labels_missing_norm():
    own = [frame("x", steps=1).drop(columns="norm").assign(run=run) for run in ("a", "b")]
    runs = pd.concat([*own, frame("batch", steps=1).assign(batch_size=128)], ignore_index=True)
    assert list(band_labels(runs)) == ["a", "b", "BatchNorm"]


def test_band_labels_settings():
    runs = [frame("batch", steps=1).assign(base_lr=lr) for lr in (0.1, 2.0)]
    assert list(band_labels(pd.concat(runs, ignore_index=True))) == ["BatchNorm, base lr 0.1", "BatchNorm, base lr 2"]


@pytest.mark.parametrize("fact", ["recipe", "epochs", "every", "precision", "train_samples"])
def test_runs_of_other_settings_are_other_bands(fact):
    runs = [frame("batch", seed=seed, steps=1).assign(**{fact: value}) for seed, value in enumerate((1, 2, 2))]
    name = fact.replace("_", " ")
    expected = [f"BatchNorm, {name} {value}" for value in (1, 2, 2)]
    assert list(band_labels(pd.concat(runs, ignore_index=True))) == expected


def test_runs_of_other_step_sizes_are_other_bands():
    runs = [frame("batch", seed=seed, steps=2) for seed in range(3)]
    runs[2] = runs[2].assign(step_sizes=[[0.5, 1.0]] * 2, losses=[[1.0, 2.0]] * 2)
    labels = band_labels(pd.concat(runs, ignore_index=True))
    assert labels.nunique() == 2
    assert labels.iloc[0] == labels.iloc[2] != labels.iloc[4]
    assert labels.iloc[4] == "BatchNorm, step sizes 0.5, 1"


def test_band_labels_order():
    runs = pd.concat(
        [
            frame("seq", steps=1).assign(groups=8, channel_groups=4),
            frame("ghost", steps=1).assign(groups=128),
            frame("mine", steps=1),
            frame("ghost", seed=1, steps=1).assign(groups=16),
            frame("batch", steps=1).assign(groups=16),
            frame("batch", seed=1, steps=1),
            frame("none", steps=1),
        ],
        ignore_index=True,
    ).astype({"groups": "Int64", "channel_groups": "Int64", "norm": "category"})
    bands = band_labels(runs)
    names = ["No normalization", "BatchNorm", "GhostNorm (G=16)", "GhostNorm (G=128)", "SeqNorm (G_C=4, G_M=8)", "mine"]
    assert list(bands.cat.categories) == names
    assert [names.index(band) for band in bands] == [4, 3, 5, 2, 1, 1, 0]
    assert list(summarize(runs, by="band")["band"]) == names


def test_band_labels_dataset():
    runs = pd.concat([frame(seed=seed, steps=1).assign(dataset=name) for seed, name in enumerate(("mnist", "digits"))])
    assert list(band_labels(runs)) == ["BatchNorm, dataset mnist", "BatchNorm, dataset digits"]


def test_band_labels_without_metadata():
    runs = frames("batch", "none", seeds=(0,), steps=2)
    assert list(band_labels(runs.drop(columns="norm"))) == ["batch-0"] * 2 + ["none-0"] * 2
    assert list(band_labels(runs[["step"]])) == [""] * 4


@pytest.mark.parametrize("measure", [envelope, summarize])
def test_missing_column(measure):
    with pytest.raises(LandscapeError, match=r"columns=groups: .*step, loss"):
        measure(frame(steps=1), by=("norm", "groups"))


def test_envelope_missing_epoch():
    with pytest.raises(LandscapeError, match=r"x='epoch'.*missing"):
        envelope(frame(steps=2).assign(epoch=NAN), x="epoch")


def test_band_labels_ghost_by():
    ways = ["layer", "accumulation", "ranks"]
    runs = pd.concat([frame("ghost").assign(groups=4, ghost_by=way, run=way) for way in ways], ignore_index=True)
    labels = ["GhostNorm (G=4)", "GhostNorm (G=4) by accumulation", "GhostNorm (G=4) by ranks"]
    assert list(band_labels(runs).unique()) == labels
    assert band_labels(runs).cat.categories[0] == labels[0]


def test_summary_shows_its_sizes_in_a_narrow_terminal():
    summary = summarize(frames("none", "batch", seeds=(0, 1), steps=3), by=("run", "norm", "epoch"))
    with pd.option_context("display.width", 80, "display.max_columns", 0):
        shown = str(summary)
    assert "mean_range" in shown
    assert "median_range" in shown
