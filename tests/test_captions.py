import numpy as np
import pandas as pd
import pytest
from traces import frame, frames

from landscape.captions import caption
from landscape.measures import band_labels


def words(runs, points=1000):
    return caption(runs.assign(band=band_labels(runs)), points)


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
        ([[0.1, 0.2], [0.1, 0.3], [0.1, 0.2]], "at step sizes from 0.1 to 0.3,"),
        ([[0.1], [0.1, 0.3], [0.05]], "at step sizes from 0.05 to 0.3,"),
    ],
)
def test_step_sizes_are_those_of_the_rows(step_sizes, expected, arrow):
    assert expected in words(with_step_sizes(step_sizes, arrow))


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
        "Updates probed in each run: 1,200, drawn at 1,000 points that keep every extreme."
    )
    run.loc[[3, 5], "loss_max"] = np.inf
    run.loc[7, "loss"] = np.nan
    assert words(run).endswith("At 3 updates a loss was NaN or infinite, and the drawing has a gap.")
