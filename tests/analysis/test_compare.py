"""Comparisons of runs whose ratios are known."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from recordings import frame, without
from scipy import stats

from landscape import compare
from landscape.analysis.comparable import loss_edges, updates_that_rule
from landscape.analysis.compare import BINS, THIRDS
from landscape.errors import LandscapeError

STEPS = 90


def run(norm, seed, scale=1.0, loss=None, steps=STEPS, **facts):
    """Return a run with a range of ``scale`` times the loss, and a lost share of ``scale / 10``."""
    loss = 2.0 * 0.97 ** np.arange(steps) if loss is None else loss
    rows = {"run": f"{norm}-{seed}", "norm": norm, "seed": seed, "step": range(steps), "lr": 0.2, "loss": loss}
    rows |= {"slope": loss, "direction_norm": 1.0, "step_sizes": [[0.1, 0.2]] * steps}
    # L(0.2) = L - 0.2 s (1 - scale / 10), and the other loss is larger by scale * loss
    rows["losses"] = [[of * (0.8 + 0.02 * scale) + scale * of, of * (0.8 + 0.02 * scale)] for of in loss]
    return pd.DataFrame(rows | facts)


NOISE = {0: 1.0, 1: 1.3, 2: 0.8}


def pairs(factor=3.0, spread=0.0, **facts):
    """Return three seeds of two norms; a seed's noise is the same for both."""
    runs = []
    for seed, noise in NOISE.items():
        runs += [run("batch", seed, noise, **facts), run("none", seed, noise * factor * (1 + spread * seed), **facts)]
    return pd.concat(runs, ignore_index=True)


def test_known_ratio():
    table = compare(pairs(), measure=["range", "lost_share"]).table
    assert list(table["phase"]) == [*THIRDS, *BINS] * 2
    np.testing.assert_allclose(table[["ratio", "low", "high", "ratio_of_medians"]], 3.0)
    assert set(table["method"]) == {"paired t"}
    assert set(table["seeds"]) == set(table["same_direction"]) == {3}
    assert set(table["smallest_p"]) == {0.25}
    np.testing.assert_allclose([list(own.values()) for own in table["seed_ratios"]], 3.0)


def test_bootstrap_checks_the_interval_of_many_seeds():
    skewed = [1.0] * 9 + [0.9, 300.0]
    runs = [run("batch", seed) for seed in range(11)] + [run("none", seed, 1.5 * x) for seed, x in enumerate(skewed)]
    comparison = compare(pd.concat(runs, ignore_index=True), measure="range")
    row = comparison.table.iloc[0]
    assert row["low"] < 1 < row["bootstrap_low"] < row["ratio"] < row["bootstrap_high"]
    assert sum("bootstrap" in note for note in comparison.notes) == len(comparison.table)
    assert compare(pairs()).table["bootstrap_low"].isna().all()


def test_interval_is_of_the_seeds():
    """One number per seed: the interval does not shrink with the updates."""
    table = compare(pairs(spread=0.2), measure="range").table.set_index("phase")
    own = np.log([3.0, 3.6, 4.2])
    expected = stats.ttest_1samp(own, 0)
    row = table.loc["last third"]
    assert row["ratio"] == pytest.approx(np.exp(own.mean()))
    np.testing.assert_allclose(row[["low", "high"]].astype(float), np.exp(expected.confidence_interval()))
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["superiority"] == 1.0
    assert row["p_holm"] == pytest.approx(min(1, 6 * expected.pvalue))  # 6 phases of one norm


def test_other_seeds_are_not_paired():
    runs = pairs(spread=0.2)
    runs.loc[runs["norm"] == "none", "seed"] += 10
    table = compare(runs, measure="range").table.set_index("phase")
    a, b = np.log([3 * 1.0, 3.6 * 1.3, 4.2 * 0.8]), np.log([1.0, 1.3, 0.8])
    expected = stats.ttest_ind(a, b, equal_var=False)
    row = table.loc["first third"]
    assert row["method"] == "Welch's t"
    np.testing.assert_allclose(row[["low", "high"]].astype(float), np.exp(expected.confidence_interval()))
    assert row["smallest_p"] == 0.1
    assert set(row["seed_ratios"]) == {"10", "11", "12"}


def test_order_is_irrelevant():
    runs = pairs(spread=0.2)
    mixed = runs.sample(frac=1, random_state=0).set_index(np.arange(len(runs))[::-1])
    there, back = compare(runs), compare(mixed)
    pd.testing.assert_frame_equal(there.table, back.table)
    assert there.sentences == back.sentences


def test_reference():
    there, back = compare(pairs(spread=0.1), "range").table, compare(pairs(spread=0.1), "range", "none").table
    np.testing.assert_allclose(there["ratio"], 1 / back["ratio"])
    assert set(back["reference"]) == {"No normalization"}


def test_equal_loss_separates_norm_from_progress():
    """A slower run has a larger range in each third, and an equal one at equal loss."""
    slow = 2.0 * 0.985 ** np.arange(STEPS)
    runs = [run("batch", seed) for seed in NOISE] + [run("none", seed, loss=slow) for seed in NOISE]
    table = compare(pd.concat(runs), measure="range").table.set_index("phase")
    assert table.loc["last third", "ratio"] > 2
    np.testing.assert_allclose(table.loc[list(BINS), "ratio"], 1.0, atol=0.05)
    limits = table.loc[list(BINS), ["loss_from", "loss_to"]].to_numpy(float)
    assert (limits[:-1, 0] == limits[1:, 1]).all()
    assert (limits[:, 0] < limits[:, 1]).all()
    seeds = compare(pd.concat(runs), measure="range").seeds
    for (low, high), phase in zip(limits, BINS, strict=True):
        for norm, loss in (("BatchNorm", runs[0]["loss"]), ("No normalization", slow)):
            counts = seeds.query(f"phase == {phase!r} and band == {norm!r}")["updates"]
            assert set(counts) == {((loss > low) & (loss <= high)).sum() + (loss == low).sum() * (phase == BINS[-1])}


def test_losses_without_overlap():
    runs = [run("batch", seed) for seed in NOISE] + [run("none", seed, loss=np.full(STEPS, 9.0)) for seed in NOISE]
    assert set(compare(pd.concat(runs), measure="range").table["phase"]) == set(THIRDS)


def test_not_finite_updates_are_counted():
    runs = pairs()
    lost = runs.index[(runs["run"] == "none-1") & (runs["step"] < 7)]
    runs.loc[lost, "losses"] = pd.Series([[np.inf, 1.0]] * len(lost), lost)
    comparison = compare(runs, measure="range")
    assert "7 of No normalization" in comparison.sentences[0]
    first = comparison.seeds.query("band == 'No normalization' and seed == '1' and phase == 'first third'").iloc[0]
    assert (first["updates"], first["not_finite"]) == (30, 7)
    assert comparison.table["ratio"].notna().all()


def test_one_seed():
    comparison = compare(pairs().query("seed == 0"), measure="range")
    assert set(comparison.table["method"]) == {"one seed"}
    assert comparison.table[["low", "high", "p", "p_holm", "smallest_p"]].isna().all(axis=None)
    np.testing.assert_allclose(comparison.table["ratio"], 3.0)
    assert "12 at 20%" in comparison.sentences[0]


@pytest.mark.parametrize(
    ("fact", "values"),
    [
        ("epochs", (2, 3)),
        ("every", (1, 5)),
        ("overhead", (None, 0.1)),
        ("batch_size", (64, 128)),
        ("precision", ("float32", "bfloat16")),
        ("direction", ("gradient", "update")),
        ("recipe", ("mnist", "digits")),
        ("batch_size", (64, None)),
    ],
)
def test_settings_are_not_pooled(fact, values):
    first, second = pairs(2.0, **{fact: values[0]}), pairs(5.0, **{fact: values[1]})
    second["run"] += "-other"
    comparison = compare(pd.concat([first, second], ignore_index=True), measure="range")
    ratios = comparison.table.groupby("setting")["ratio"].first()
    np.testing.assert_allclose(sorted(ratios), [2.0, 5.0])
    assert all(fact.replace("_", " ") in setting for setting in ratios.index)
    assert sum("settings differ" in note for note in comparison.notes) == 2


def test_step_sizes_are_not_pooled():
    second = pairs(5.0).assign(run=lambda runs: runs["run"] + "-other")
    second["step_sizes"] = [[0.1, 0.4]] * len(second)
    comparison = compare(pd.concat([pairs(2.0), second], ignore_index=True), measure="range")
    assert {"step sizes 0.1, 0.2", "step sizes 0.1, 0.4"} == set(comparison.table["setting"])


def test_relative_step_sizes_are_the_same():
    """Multiples of two learning rates are one setting if the runs say that they are multiples."""
    second = run("none", 0, relative=True).assign(lr=0.4)
    second["step_sizes"] = [[0.2, 0.4]] * STEPS
    runs = pd.concat([run("batch", 0, relative=True), second], ignore_index=True)
    assert set(compare(runs, measure="range").table["setting"]) == {""}


def test_nothing_to_compare():
    runs = pd.concat([run("batch", 0, epochs=2), run("none", 0, epochs=3)], ignore_index=True)
    with pytest.raises(LandscapeError, match=r"epochs 2.*epochs 3"):
        compare(runs)
    with pytest.raises(LandscapeError, match="BatchNorm"):
        compare(run("batch", 0))
    with pytest.raises(LandscapeError, match="rows"):
        compare(run("batch", 0).iloc[:0])
    with pytest.raises(LandscapeError, match="measure='width'"):
        compare(pairs(), measure="width")


def test_same_seed_twice():
    again = run("batch", 0, 1.0).assign(run="again")
    comparison = compare(pd.concat([pairs(), again], ignore_index=True), measure="range")
    np.testing.assert_allclose(comparison.table["ratio"], 3.0)
    assert set(comparison.table["seeds"]) == {3}
    assert [note for note in comparison.notes if "again" in note]


def test_short_step_sizes_are_said():
    comparison = compare(pairs().assign(lr=0.5), measure=["range", "lost_share"])
    assert [note for note in comparison.notes if "100%" in note and "learning rate" in note]
    assert set(comparison.table.query("measure == 'lost_share'")["method"]) == {"no value"}


def test_mean_ruled_by_few_updates():
    runs = pairs()
    place = runs.index[(runs["run"] == "none-2") & (runs["step"] == 70)]
    runs.loc[place, "losses"] = pd.Series([[1000.0, 0.0]], place)
    notes = compare(runs, measure="range").notes
    assert [note for note in notes if "none-2" in note and "last third" in note]
    assert not [note for note in notes if "first third" in note]


def test_censored_steps_are_said():
    runs = pd.concat([run("batch", 0, 0.1), run("none", 0, 0.5)], ignore_index=True)
    notes = [note for note in compare(runs, measure="critical_step").notes if "right-censored" in note]
    assert len(notes) == 1
    assert "BatchNorm" in notes[0]
    assert "100%" in notes[0]


def test_early_end_is_said():
    runs = pairs()
    runs = runs[(runs["run"] != "none-1") | (runs["step"] < 40)]
    comparison = compare(runs, measure="range")
    assert [note for note in comparison.notes if "none-1" in note]
    counts = comparison.table.set_index("phase")["seeds"]
    assert (counts["first third"], counts["last third"]) == (3, 2)


def test_measure_that_no_run_has():
    runs = without(pd.concat([frame("batch"), frame("none")], ignore_index=True), "gradient_cosines")
    comparison = compare(runs, measure=["range", "cosine"])
    assert set(comparison.table["measure"]) == {"range"}
    assert [note for note in comparison.notes if note.startswith("cosine")]
    with pytest.raises(LandscapeError, match="cosine"):
        compare(runs, measure="cosine")


def test_values_that_are_not_positive():
    runs = pairs()
    runs.loc[runs["norm"] == "none", "slope"] *= 0.5  # the loss falls more than the slope promises
    table = compare(runs, measure="lost_share").table
    assert set(table["method"]) == {"not positive"}
    assert table["ratio"].isna().all()


def test_runs_without_facts():
    """Runs of a user's own loop are compared by name."""
    runs = pd.concat([run("batch", 0), run("none", 0, 3.0)], ignore_index=True).drop(columns=["norm", "seed"])
    comparison = compare(runs, measure="range")
    np.testing.assert_allclose(comparison.table["ratio"], 3.0)
    assert set(comparison.table["method"]) == {"one seed"}


def test_several_norms_in_order_of_figures():
    runs = [run(norm, seed, scale) for norm, scale in (("ghost", 2.0), ("batch", 1.0), ("none", 3.0)) for seed in NOISE]
    comparison = compare(pd.concat(runs), measure="range")
    assert comparison.bands == ("No normalization", "BatchNorm", "GhostNorm")
    assert list(comparison.table["band"].unique()) == ["No normalization", "GhostNorm"]
    assert len(comparison.sentences) == 2


@pytest.mark.parametrize(("sizes", "count"), [([1.0] * 40, None), ([1.0] * 38 + [100.0, 90.0], 2), ([1.0] * 5, None)])
def test_updates_that_rule(sizes, count):
    assert updates_that_rule(np.array(sizes)) == count


def test_loss_edges():
    runs = [np.linspace(0, 10, 101), np.linspace(4, 20, 101)]
    edges = loss_edges(runs, 2)
    assert (edges[0], edges[-1]) == pytest.approx((4.8, 9.5))
    within = np.concatenate(runs)
    counts = [((within > low) & (within <= high)).sum() for low, high in pairwise(edges)]
    assert abs(counts[0] - counts[1]) <= 1
    assert loss_edges([np.ones(5), np.ones(5)], 3) is None


def test_frame_after_csv(tmp_path):
    """Numbers and lists are read from their text."""
    pairs().to_csv(tmp_path / "rows.csv")
    table = compare(pd.read_csv(tmp_path / "rows.csv"), measure=["range", "lost_share"]).table
    np.testing.assert_allclose(table["ratio"], 3.0, rtol=1e-6)


def test_frame_without_runs():
    """Rows of probes in memory: a run begins where the step falls."""
    rows = pairs(spread=0.1)
    expected = compare(rows).table
    pd.testing.assert_frame_equal(compare(rows.drop(columns="run")).table, expected)


@pytest.mark.parametrize("given", [{"measure": []}, {"reference": "ghst"}])
def test_arguments_are_refused(given):
    with pytest.raises(LandscapeError, match=next(iter(given))):
        compare(pairs(), **given)


@pytest.mark.parametrize("column", ["step", "loss", "step_sizes"])
def test_missing_column_is_named(column):
    with pytest.raises(LandscapeError, match=column):
        compare(pairs().drop(columns=column))


def test_run_that_diverges_at_once_hides_no_common_loss():
    rows = pairs()
    rows.loc[(rows["run"] == "none-2") & (rows["step"] > 0), "loss"] = np.nan
    assert set(BINS) <= set(compare(rows, measure="range").table["phase"])


def test_columns_of_users_are_not_the_bands():
    pd.testing.assert_frame_equal(compare(pairs().assign(band="mine")).table, compare(pairs()).table)


def test_index_with_the_name_of_a_column():
    pd.testing.assert_frame_equal(compare(pairs().set_index("run", drop=False)).table, compare(pairs()).table)


def test_sentence_says_that_holm_decides():
    """Each interval leaves out 1, but with six phases no p is below 5 %; the sentence does not hide it."""
    runs = pairs(1.2, spread=0.06)
    table, close = compare(runs, measure="range").table, compare(pairs(1.05, spread=0.06), measure="range")
    assert (table["low"] > 1).all()
    assert (table["p_holm"] > 0.05).all()
    assert "Holm's" in compare(runs, measure="range").sentences[0]
    assert (close.table["low"] < 1).all()
    assert "Holm's" not in close.sentences[0]


def test_phases_that_some_seeds_lack_hide_no_others():
    """Three of four seeds end early: the last third is one seed's, the others are of all."""
    runs = pairs()
    early = (runs["norm"] == "none") & (runs["seed"] > 0) & (runs["step"] >= STEPS * 6 // 10)
    comparison = compare(runs[~early], measure="range")
    seeds = comparison.table.set_index("phase")["seeds"]
    assert (seeds["first third"], seeds["last third"]) == (3, 1)
    line = comparison.sentences[0].splitlines()[1]
    assert "rougher in 2 of 3" in line
    assert "last third" in line.partition("not counted")[2]


def test_searches_that_some_runs_lack_are_not_used():
    """A run beside itself has a ratio of 1, whether or not one of both was searched."""
    plain = pairs(1.0)
    searched = plain.assign(
        critical_step_sizes=[[0.3]] * len(plain), critical_losses=[[2 * loss] for loss in plain["loss"]]
    )
    searched.loc[searched["norm"] == "none", ["critical_step_sizes", "critical_losses"]] = None
    comparison = compare(searched, measure="critical_step")
    np.testing.assert_allclose(comparison.table["ratio"], 1.0)
    assert sum("critical=True" in note for note in comparison.notes) == 1


def test_reference_is_found_under_a_long_label():
    settings = {"recipe": "a-recipe-with-a-long-name", "schedule": "triangle", "precision": "bfloat16"}
    runs = pd.concat([pairs(**settings, clip_norm=1.0), pairs(**settings, clip_norm=2.0)]).reset_index(drop=True)
    runs["run"] += runs["clip_norm"].astype(str)
    runs["model"] = ["m" * 90 if norm == 1.0 else "n" * 90 for norm in runs["clip_norm"]]
    table = compare(runs, measure="range", reference="none").table
    assert set(table["reference"]) == {"No normalization"}
