"""Captions: the facts that they must state."""

import re

import numpy as np
import pandas as pd
import pytest
from recordings import frame, frames, without

from landscape.analysis.labels import band_labels
from landscape.analysis.measures import measured
from landscape.plotting.caption import caption


def text_of(runs, *measures, points=1000):
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
        ([[0.1, 0.2, 0.4]] * 3, "at step sizes 0.1, 0.2, 0.4 along"),
        ([list(np.arange(1, 9) / 10)] * 3, "at step sizes 0.1, 0.2, …, 0.8 along"),
        ([[0.05, 0.2], [0.1, 0.4], [0.15, 0.6]], "at 0.5, 2 times the learning rate along"),
        ([[0.05, 0.2], [0.1, 0.4], [0.15, 0.7]], "at step sizes from 0.05 to 0.7 along"),
        ([[0.1, 0.2], [0.1, 0.3], [0.1, 0.2]], "at step sizes from 0.1 to 0.3 along"),
        ([[0.1], [0.1, 0.3], [0.05]], "at step sizes from 0.05 to 0.3 along"),
    ],
)
def test_caption_step_sizes(step_sizes, expected, arrow):
    assert expected in text_of(with_step_sizes(step_sizes, arrow))


def test_caption_step_sizes_warm_up():
    run = with_step_sizes([[0.0, 0.0], [0.1, 0.4], [0.15, 0.6]]).assign(lr=[0.0, 0.2, 0.3])
    assert "at 0.5, 2 times the learning rate along" in text_of(run)
    run = with_step_sizes([[0.0, 0.1], [0.1, 0.4]]).assign(lr=0.0)
    assert "at step sizes from 0 to 0.4 along" in text_of(run)


def test_caption_common_metadata():
    run = frame(steps=2).assign(batch_size=1024, direction="update")
    assert "along the optimizer's update, on the batch of 1,024 samples of each update" in text_of(run)
    runs = pd.concat([run, run.assign(batch_size=512, direction="gradient")])
    assert "along the probed direction, on the batch of each update" in text_of(runs)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (frame(steps=2), "One seed per band."),
        (frame(steps=2).drop(columns=["run", "seed"]), "One run per band."),
        (frames("none", "batch", seeds=(0, 1, 2), steps=2), "3 seeds per band: the band covers all of them"),
        (pd.concat([frames("none", steps=2), frame(steps=2)]), "1 to 2 seeds per band:"),
        (frames("none", steps=2).assign(seed=7), "2 runs per band:"),
    ],
)
def test_caption_seeds(runs, expected):
    assert expected in text_of(runs)


def test_caption_mode():
    assert "in training mode (batch statistics)" in text_of(frame(steps=2).assign(mode="training"))
    assert "in evaluation mode (running statistics)" in text_of(frame(steps=2).assign(mode="evaluation"))
    assert "mode" not in text_of(frame(steps=2))


def test_caption_invalid_metadata():
    assert "along the probed direction, on the batch of" in text_of(
        frame(steps=2).assign(direction="up", batch_size="x")
    )


def test_caption_updates():
    run = frame(steps=1200)
    assert "1,200 probed updates per run." in text_of(run, points=1200)
    assert "1,200 probed updates per run, drawn at 1,000 points: the band keeps every minimum" in text_of(
        run, points=1000
    )
    run.loc[[3, 5], "loss_max"] = np.inf
    run.loc[7, "loss"] = np.nan
    assert re.search(r"NaN or infinite.* not drawn.*: BatchNorm first at update 3 \(3 of 1,200\)\.$", text_of(run))


def lost(run, *steps):
    """Return the run with infinite losses at some steps."""
    return run.assign(loss_max=run["loss_max"].where(~run["step"].isin(steps), np.inf))


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([lost(frame("none", steps=9), 4)], "No normalization at update 4 (1 of 9)."),
        ([lost(frame("none", steps=9), 8)], "No normalization at update 8 (1 of 9)."),
        ([lost(frame("none", steps=9), *range(4, 9))], "No normalization from update 4 on (5 of 9)."),
        ([lost(frame("none", steps=9), *range(9))], "No normalization from update 0 on (9 of 9)."),
        ([lost(frame("none", steps=9), 4, 5, 7)], "No normalization first at update 4 (3 of 9)."),
        (
            [frame("none", 0, steps=9), lost(frame("none", 1, steps=9), 7, 8), lost(frame("none", 2, steps=9), 3)],
            "No normalization in 2 of 3 runs, first at update 3 (3 of 27).",
        ),
        (
            [lost(frame("batch", steps=9), 1), frame("ghost", steps=9), lost(frame("none", steps=9), 7, 8)],
            "No normalization from update 7 on (2 of 9), BatchNorm at update 1 (1 of 9).",
        ),
        ([lost(frame(steps=9).drop(columns=["run", "norm", "seed"]), 4)], ": at update 4 (1 of 9)."),
    ],
)
def test_caption_non_finite(runs, expected):
    assert text_of(pd.concat(runs, ignore_index=True)).endswith(expected)


def test_caption_unread():
    run = frame(steps=2).assign(band="")
    unread = [f"run/updates-{part}.parquet cannot be read as Parquet (no footer); move it out" for part in range(5)]
    assert caption(run, ["loss"], 1000, unread[:1]).endswith(
        "Left out: run/updates-0.parquet cannot be read as Parquet (no footer)."
    )
    text = caption(run, ["loss"], 1000, unread)
    assert text.endswith("updates-2.parquet cannot be read as Parquet (no footer). And 2 more are left out.")
    assert text.count("Left out: ") == 3


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("loss", ". Band: smallest to largest loss. Line: the loss before the step, at step size 0. One seed"),
        (
            "predictiveness",
            "Band with thin edges: smallest to largest l2 distance between the gradients before and after",
        ),
        ("beta", ". Line: largest ratio of the change of the gradient to the distance moved (l2 norms). One seed"),
        ("gap", "Band with thin edges: smallest to largest difference between the loss and its linear prediction"),
        ("curvature", "Band with thin edges: smallest to largest mean curvature of the loss along the step. One"),
    ],
)
def test_caption_measure(measure, expected):
    assert expected in text_of(frame(steps=2), measure)


def test_caption_several_measures():
    text = text_of(frame(steps=2), "loss", "beta")
    assert text.startswith("Measured at step sizes 0.1, 0.2, 0.4 along")
    assert "Loss, band: smallest to largest loss; line: the loss before the step, at step size 0." in text
    assert "Effective β-smoothness, line: largest ratio" in text


@pytest.mark.parametrize(
    ("measures", "joined", "binned"),
    [
        (
            ["loss"],
            "2 seeds per band: the band covers all of them, the line is their mean.",
            "maximum, the line is a mean.",
        ),
        (["gap"], "2 seeds per band: the band covers all of them.", "the band keeps every minimum and maximum."),
        (["beta"], "2 seeds per line: the line is their mean.", "points: the line is a mean."),
        (
            ["gap", "beta"],
            "2 seeds per band: the band covers all of them, the line is their mean.",
            "the line is a mean.",
        ),
    ],
)
def test_caption_statistics(measures, joined, binned):
    text = text_of(frames("batch", steps=3), *measures, points=2)
    assert joined in text
    assert binned in text


def test_caption_one_line():
    assert "One seed per line." in text_of(frame(steps=2), "beta")


def test_caption_step_size_zero():
    run = with_step_sizes([[0.0, 0.1, 0.2]] * 3)
    sentence = "Step size 0 is left out of the effective β-smoothness and the curvature along the ray"
    assert sentence in text_of(run, "beta", "gap", "curvature")
    assert "left out" not in text_of(run, "predictiveness", "gap")
    assert "left out" not in text_of(with_step_sizes([[0.3, 0.1, 0.2]] * 3), "beta")


def test_caption_left_out():
    lacking = [
        without(frame("ghost", steps=2), "gradient_distances"),
        without(frame("none", steps=2), "gradient_distances"),
    ]
    runs = pd.concat([*lacking, frame("none", seed=1, steps=2)], ignore_index=True)
    sentence = (
        "Left out of the gradient predictiveness and the effective β-smoothness (gradient_distances not recorded): "
        "No normalization (1 of 2 runs), GhostNorm."
    )
    assert sentence in text_of(runs, "loss", "predictiveness", "beta")
    assert "Left out" not in text_of(runs, "loss", "gap")
    alone = text_of(runs, "beta")
    assert "One seed per line." in alone
    assert "NaN" not in alone
    nameless = pd.concat([frame("batch", steps=2), lacking[0]], ignore_index=True).drop(columns=["run", "seed"])
    assert "(gradient_distances not recorded): GhostNorm." in text_of(nameless, "beta")


def test_caption_non_finite_measures():
    run = frame(steps=6)
    run.loc[1, "loss_max"] = np.inf
    run.loc[[1, 2], "direction_norm"] = 0.0
    text = "above the panels (cross: first of a run): "
    loss, steep = "BatchNorm at update 1 (1 of 6)", "BatchNorm first at update 1 (2 of 6)"
    assert text_of(run, "loss", "beta", "curvature").endswith(
        f"{text}loss: {loss}; effective β-smoothness and curvature along the ray: {steep}."
    )
    assert text_of(run, "loss", "gap").endswith(f"{text}loss: {loss}.")
    assert "NaN" not in text_of(run, "predictiveness")


FACTS = {"model": "resnet56", "dataset": "cifar10", "samples": 12_800, "epochs": 8}


def test_caption_training():
    runs = frames("none", "batch").assign(**FACTS)
    assert text_of(runs).startswith("ResNet-56 on 12,800 samples of CIFAR-10, 8 epochs. Measured")
    assert text_of(runs.drop(columns="samples")).startswith("Measured")
    assert text_of(runs.assign(samples=[1] * 80 + [2] * 80)).startswith("Measured")


def test_caption_learning_rate():
    runs = pd.concat([frame(norm).assign(lr=lr) for norm, lr in (("none", 0.9951), ("batch", 2.97), ("ghost", 2.96))])
    runs = runs.reset_index(drop=True).assign(**FACTS, schedule="triangle")
    assert "8 epochs at learning rates up to 3 (No normalization: 1). Measured" in text_of(runs)
    assert "learning rates" not in text_of(runs.assign(schedule="constant"))


@pytest.mark.parametrize(("rest", "expected"), [([0.0] * 3, None), ([np.nan] * 3, None), ([0.2, np.nan, 0.4], "30%")])
def test_caption_states_a_changed_gradient(rest, expected):
    text = text_of(frame(steps=3).assign(gradient_rest=rest))
    assert ("optimizer's gradient" in text) == (expected is not None)
    assert expected is None or expected in text


def test_caption_seed_that_was_run_twice():
    runs = pd.concat([frame("batch", seed=seed).assign(run=run) for run, seed in (("a", 0), ("b", 0), ("c", 1))])
    assert "more than once: BatchNorm (seed 0)." in text_of(runs.reset_index(drop=True))
    assert "more than once" not in text_of(pd.concat([frame("batch", seed=seed) for seed in (0, 1)], ignore_index=True))


def test_caption_learning_rate_beyond_the_step_sizes():
    run = with_step_sizes([[0.1, 0.2]] * 4)  # at learning rates of 0.1 to 0.4
    assert "At 50% of the updates the learning rate is beyond" in text_of(run)
    assert "is beyond" not in text_of(run.assign(lr=0.2))


def test_caption_few_updates_that_rule_the_range():
    run = frame("batch", steps=100)
    run = run.assign(loss_min=0.0, loss_max=np.r_[np.ones(98), 100.0, 200.0])
    assert "half of the sum of the ranges: BatchNorm 1 of 100." in text_of(run)
    assert "half of the sum" not in text_of(run.assign(loss_max=1.0))
