import numpy as np
import pandas as pd
import pytest
from recordings import frame, frames, without

from landscape.analysis.labels import band_labels
from landscape.analysis.measures import measured
from landscape.plotting.caption import caption


def words(runs, *measures, points=1000):
    runs, measures = runs.assign(band=band_labels(runs)), measures or ("loss",)
    for measure in measures:
        runs = measured(runs, measure)
    return caption(runs, measures, points)


def with_step_sizes(step_sizes, arrow=False):
    run = frame(steps=len(step_sizes)).assign(lr=np.arange(1, len(step_sizes) + 1) / 10)
    kind = run["step_sizes"].dtype
    return run.assign(step_sizes=pd.Series(step_sizes, dtype=kind if arrow else object))


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize(
    ("step_sizes", "expected"),
    [
        ([[0.1, 0.2, 0.4]] * 3, "at step sizes 0.1, 0.2, 0.4,"),
        ([list(np.arange(1, 9) / 10)] * 3, "at step sizes 0.1, 0.2, …, 0.8,"),
        ([[0.05, 0.2], [0.1, 0.4], [0.15, 0.6]], "at 0.5, 2 times the learning rate,"),
        ([[0.05, 0.2], [0.1, 0.4], [0.15, 0.7]], "at step sizes from 0.05 to 0.7,"),
        ([[0.1, 0.2], [0.1, 0.3], [0.1, 0.2]], "at step sizes from 0.1 to 0.3,"),
        ([[0.1], [0.1, 0.3], [0.05]], "at step sizes from 0.05 to 0.3,"),
    ],
)
def test_step_sizes_are_those_of_the_rows(step_sizes, expected, arrow):
    assert expected in words(with_step_sizes(step_sizes, arrow))


def test_a_warm_up_from_zero_has_multiples_too():
    run = with_step_sizes([[0.0, 0.0], [0.1, 0.4], [0.15, 0.6]]).assign(lr=[0.0, 0.2, 0.3])
    assert "at 0.5, 2 times the learning rate," in words(run)
    run = with_step_sizes([[0.0, 0.1], [0.1, 0.4]]).assign(lr=0.0)
    assert "at step sizes from 0 to 0.4," in words(run)


def test_facts_are_said_if_all_runs_share_them():
    run = frame(steps=2).assign(batch_size=1024, direction="update")
    assert "along the optimizer's update, on the batch of 1,024 samples of each probed update" in words(run)
    runs = pd.concat([run, run.assign(batch_size=512, direction="gradient")])
    assert "along the probed direction, on the batch of each probed update" in words(runs)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (frame(steps=2), "One seed per band."),
        (frame(steps=2).drop(columns=["run", "seed"]), "One run per band."),
        (frames("none", "batch", seeds=(0, 1, 2), steps=2), "3 seeds per band, joined: the band spans all of them"),
        (pd.concat([frames("none", steps=2), frame(steps=2)]), "1 to 2 seeds per band, joined"),
        (frames("none", steps=2).assign(seed=7), "2 runs per band, joined"),
    ],
)
def test_it_says_how_runs_are_joined(runs, expected):
    assert expected in words(runs)


def test_the_mode_is_said_where_it_is_known():
    assert "in training mode (batch statistics)" in words(frame(steps=2).assign(mode="training"))
    assert "in evaluation mode (running statistics)" in words(frame(steps=2).assign(mode="evaluation"))
    assert "mode" not in words(frame(steps=2))


def test_facts_that_make_no_sense_are_passed_over():
    assert "along the probed direction, on the batch of" in words(frame(steps=2).assign(direction="up", batch_size="x"))


def test_it_counts_updates_and_those_that_are_not_finite():
    run = frame(steps=1200)
    assert "Updates probed in each run: 1,200." in words(run, points=1200)
    assert words(run, points=1000).endswith(
        "Updates probed in each run: 1,200, drawn at 1,000 points: the band keeps every extreme and the line is a mean."
    )
    run.loc[[3, 5], "loss_max"] = np.inf
    run.loc[7, "loss"] = np.nan
    assert words(run).endswith(
        "NaN or infinite, so not drawn but marked above the panel (by a cross where a run first is): "
        "BatchNorm first at update 3 (3 of its 1,200)."
    )


def lost(run, *steps):
    """A run whose losses are not finite at some steps."""
    return run.assign(loss_max=run["loss_max"].where(~run["step"].isin(steps), np.inf))


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([lost(frame("none", steps=9), 4)], "No normalization at update 4 (1 of its 9)."),
        ([lost(frame("none", steps=9), 8)], "No normalization at update 8 (1 of its 9)."),
        ([lost(frame("none", steps=9), *range(4, 9))], "No normalization from update 4 on (5 of its 9)."),
        ([lost(frame("none", steps=9), *range(9))], "No normalization from update 0 on (9 of its 9)."),
        ([lost(frame("none", steps=9), 4, 5, 7)], "No normalization first at update 4 (3 of its 9)."),
        (
            [frame("none", 0, steps=9), lost(frame("none", 1, steps=9), 7, 8), lost(frame("none", 2, steps=9), 3)],
            "No normalization in 2 of 3 runs, first at update 3 (3 of its 27).",
        ),
        (
            [lost(frame("batch", steps=9), 1), frame("ghost", steps=9), lost(frame("none", steps=9), 7, 8)],
            "No normalization from update 7 on (2 of its 9), BatchNorm at update 1 (1 of its 9).",
        ),
        ([lost(frame(steps=9).drop(columns=["run", "norm", "seed"]), 4)], ": at update 4 (1 of its 9)."),
    ],
)
def test_it_says_where_runs_leave_the_finite_numbers(runs, expected):
    assert words(pd.concat(runs, ignore_index=True)).endswith(expected)


def test_it_quotes_what_could_not_be_read():
    run = frame(steps=2).assign(band="")
    unread = [f"run/updates-{part}.parquet cannot be read as Parquet (no footer); move it out" for part in range(5)]
    assert caption(run, ["loss"], 1000, unread[:1]).endswith(
        "Left out: run/updates-0.parquet cannot be read as Parquet (no footer)."
    )
    said = caption(run, ["loss"], 1000, unread)
    assert said.endswith("updates-2.parquet cannot be read as Parquet (no footer). And 2 more are left out.")
    assert said.count("Left out: ") == 3


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("loss", ". Band: smallest to largest loss. Line: the loss before the step, at step size 0. One seed"),
        ("predictiveness", "Band with thin edges: smallest to largest l2 distance from the gradient before the step"),
        ("beta", ". Line: largest ratio of the change of the gradient to the distance moved (l2 norms). One seed"),
        ("gap", "Band with thin edges: smallest to largest difference between the loss and its linear prediction"),
        ("curvature", "Band with thin edges: smallest to largest mean curvature of the loss on the way there. One"),
    ],
)
def test_it_says_what_band_and_line_are(measure, expected):
    assert expected in words(frame(steps=2), measure)


def test_several_measures_are_told_apart():
    said = words(frame(steps=2), "loss", "beta")
    assert said.startswith("Measured at step sizes 0.1, 0.2, 0.4, along")
    assert "Loss, band: smallest to largest loss; line: the loss before the step, at step size 0." in said
    assert "Effective β-smoothness, line: largest ratio" in said


@pytest.mark.parametrize(
    ("measures", "joined", "binned"),
    [
        (["loss"], "2 seeds per band, joined: the band spans all of them and the line is their mean.", "and the line"),
        (["gap"], "2 seeds per band, joined: the band spans all of them.", "points: the band keeps every extreme."),
        (["beta"], "2 seeds per line, joined: the line is their mean.", "points: the line is a mean."),
        (
            ["gap", "beta"],
            "2 seeds per band, joined: the band spans all of them and the line is their mean.",
            "and the",
        ),
    ],
)
def test_it_says_how_bands_and_lines_are_made(measures, joined, binned):
    said = words(frames("batch", steps=3), *measures, points=2)
    assert joined in said
    assert binned in said


def test_one_run_without_a_band_is_one_per_line():
    assert "One seed per line." in words(frame(steps=2), "beta")


def test_step_size_zero_is_left_out_only_where_it_says_nothing():
    run = with_step_sizes([[0.0, 0.1, 0.2]] * 3)
    sentence = (
        "Step size 0, which moves nothing, is left out of the effective β-smoothness and the curvature along the ray"
    )
    assert sentence in words(run, "beta", "gap", "curvature")
    assert "moves nothing" not in words(run, "predictiveness", "gap")
    assert "moves nothing" not in words(with_step_sizes([[0.3, 0.1, 0.2]] * 3), "beta")


def test_runs_that_are_left_out_are_named():
    lacking = [
        without(frame("ghost", steps=2), "gradient_distances"),
        without(frame("none", steps=2), "gradient_distances"),
    ]
    runs = pd.concat([*lacking, frame("none", seed=1, steps=2)], ignore_index=True)
    sentence = (
        "Not in the gradient predictiveness and the effective β-smoothness, for want of gradient_distances: "
        "No normalization (1 of 2 runs), GhostNorm."
    )
    assert sentence in words(runs, "loss", "predictiveness", "beta")
    assert "for want of" not in words(runs, "loss", "gap")
    alone = words(runs, "beta")
    assert "One seed per line." in alone
    assert "NaN" not in alone
    nameless = pd.concat([frame("batch", steps=2), lacking[0]], ignore_index=True).drop(columns=["run", "seed"])
    assert "for want of gradient_distances: GhostNorm." in words(nameless, "beta")


def test_values_that_are_not_finite_are_told_of_each_measure():
    run = frame(steps=6)
    run.loc[1, "loss_max"] = np.inf
    run.loc[[1, 2], "direction_norm"] = 0.0
    said = "above the panels (by a cross where a run first is): "
    loss, steep = "BatchNorm at update 1 (1 of its 6)", "BatchNorm first at update 1 (2 of its 6)"
    assert words(run, "loss", "beta", "curvature").endswith(
        f"{said}loss: {loss}; effective β-smoothness and curvature along the ray: {steep}."
    )
    assert words(run, "loss", "gap").endswith(f"{said}loss: {loss}.")
    assert "NaN" not in words(run, "predictiveness")


FACTS = {"model": "resnet56", "dataset": "cifar10", "samples": 12_800, "epochs": 8}


def test_what_was_trained_on_how_much():
    runs = frames("none", "batch").assign(**FACTS)
    assert words(runs).startswith("ResNet-56 on 12,800 samples of CIFAR-10, 8 epochs. Measured")
    assert words(runs.drop(columns="samples")).startswith("Measured")
    assert words(runs.assign(samples=[1] * 80 + [2] * 80)).startswith("Measured")


def test_how_high_the_learning_rate_went():
    runs = pd.concat([frame(norm).assign(lr=lr) for norm, lr in (("none", 0.9951), ("batch", 2.97), ("ghost", 2.96))])
    runs = runs.reset_index(drop=True).assign(**FACTS, schedule="triangle")
    assert "8 epochs at learning rates up to 3 (No normalization: 1). Measured" in words(runs)
    assert "learning rates" not in words(runs.assign(schedule="constant"))
