from dataclasses import replace

import pandas as pd
import pytest

from landscape import RECIPES, LandscapeError, read_traces, train
from landscape.paper.figures4_5 import COMPARISONS, comparison, pending, roughness

SHORT = replace(RECIPES["digits"], norm="none", epochs=1, train_samples=256)
RUNS = comparison(replace(RECIPES["digits"], epochs=2), (16,), (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces")
    for run in RUNS:
        train(run, out, device="cpu")
    return out


def test_the_papers_figures():
    figure4, figure5 = COMPARISONS["4", "paper"], COMPARISONS["5", "paper"]
    assert [(run.norm, run.norm_options.get("groups")) for run in figure5] == [
        ("none", None),
        ("batch", None),
        ("ghost", 16),
        ("ghost", 128),
    ]
    assert {(run.dataset, run.model, run.batch_size) for run in figure5} == {("cifar10", "resnet56", 512)}
    assert {(run.dataset, run.model) for run in figure4} == {("mnist", "simplenet")}
    assert len({run.run_name for run in figure4}) == 12
    for runs in COMPARISONS.values():
        least = min(run.batch_size // (run.norm_options.get("groups") or 1) for run in runs)
        assert least == 4  # samples in a group


def test_nothing_is_missing_of_what_was_recorded(folder):
    assert pending(RUNS, folder) == []
    assert pending(RUNS, folder / "elsewhere") == RUNS
    more = comparison(replace(RECIPES["digits"], epochs=2), (16, 32), (0, 1))
    assert pending(more, folder) == [run for run in more if run.norm == "ghost" and run.groups == 32]


def test_a_run_that_came_to_no_end_is_missing(tmp_path):
    def stop(probe):
        if probe.step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RUNS[0], tmp_path, device="cpu", on_update=stop)
    assert len(read_traces(tmp_path)) == 15
    assert pending(RUNS[:1], tmp_path) == RUNS[:1]


@pytest.mark.parametrize(("change", "message"), [({"epochs": 3}, "epochs=2, and asked"), ({"lr": 0.1}, "lr=0.4, and")])
def test_a_run_with_other_settings_is_not_taken(folder, change, message):
    with pytest.raises(LandscapeError, match=f"digits-none-seed0 was recorded with {message}.*another folder"):
        pending([replace(run, **change) for run in RUNS], folder)


def test_roughness_by_hand(folder):
    frame, epochs = read_traces(folder), read_traces(folder, table="epochs")
    table = roughness(frame, epochs)
    assert list(table.columns) == ["No normalization", "BatchNorm", "GhostNorm (G=16)"]
    assert list(table.index) == ["epoch 1", "epoch 2", "all, mean", "all, median", "not finite", "test accuracy"]
    own = frame[frame["norm"] == "ghost"]
    ranges = own["loss_max"] - own["loss_min"]
    expected = pd.Series(
        {
            "epoch 1": ranges[own["epoch"] < 1].mean(),
            "epoch 2": ranges[own["epoch"] >= 1].mean(),
            "all, mean": ranges.mean(),
            "all, median": ranges.median(),
            "not finite": 0.0,
            "test accuracy": epochs.query("norm == 'ghost' and epoch == 2")["test_accuracy"].mean(),
        }
    )
    pd.testing.assert_series_equal(table["GhostNorm (G=16)"], expected, check_names=False)


def test_other_step_sizes_are_another_run(tmp_path):
    train(replace(SHORT, probe_lrs=(0.1, 0.2)), tmp_path, device="cpu")
    with pytest.raises(LandscapeError, match="probe_lrs"):
        pending([SHORT], tmp_path)


def test_a_run_that_is_something_else_is_not_taken_for_one_that_came_to_no_end(tmp_path):
    path = train(replace(SHORT, lr=0.123), tmp_path, device="cpu")
    next(path.glob("epochs-*")).unlink()
    with pytest.raises(LandscapeError, match="lr="):
        pending([SHORT], tmp_path)


def test_a_run_without_its_updates_is_missing(tmp_path):
    path = train(SHORT, tmp_path, device="cpu")
    next(path.glob("updates-*")).unlink()
    assert pending([SHORT], tmp_path) == [SHORT]


def test_a_run_that_does_not_say_what_it_is_is_refused(tmp_path):
    (train(SHORT, tmp_path, device="cpu") / "run.json").unlink()
    with pytest.raises(LandscapeError, match=r"run\.json"):
        pending([SHORT], tmp_path)
