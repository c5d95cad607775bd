"""Runs that are recorded completely, and those that are pending."""

from dataclasses import replace

import pytest

from landscape import RECIPES, LandscapeError, read_traces, train
from landscape.training.completed import pending

SHORT = replace(RECIPES["digits"], norm="none", epochs=1, train_samples=256)


def test_pending_runs(tmp_path):
    train(SHORT, tmp_path, device="cpu")
    other = replace(SHORT, norm="batch")
    assert pending([SHORT, other], tmp_path) == [other]
    assert pending([SHORT, other], tmp_path / "missing") == [SHORT, other]


def test_pending_interrupted(tmp_path):
    def stop(probe):
        if probe.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SHORT, tmp_path, device="cpu", on_update=stop)
    assert len(read_traces(tmp_path)) == 1
    assert pending([SHORT], tmp_path) == [SHORT]


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"lr": 0.1}, {"step_sizes": (0.1, 0.2)}], ids=lambda change: [*change]
)
def test_pending_other_settings(tmp_path, change):
    train(SHORT, tmp_path, device="cpu")
    with pytest.raises(LandscapeError, match=rf"{next(iter(change))}=.*{SHORT.run_name}"):
        pending([replace(SHORT, **change)], tmp_path)


def test_pending_other_settings_and_missing_part(tmp_path):
    path = train(replace(SHORT, lr=0.123), tmp_path, device="cpu")
    next(path.glob("epochs-*")).unlink()
    with pytest.raises(LandscapeError, match="lr="):
        pending([SHORT], tmp_path)


def test_pending_missing_part(tmp_path):
    path = train(SHORT, tmp_path, device="cpu")
    next(path.glob("updates-*")).unlink()
    assert pending([SHORT], tmp_path) == [SHORT]


def test_pending_missing_metadata(tmp_path):
    (train(SHORT, tmp_path, device="cpu") / "run.json").unlink()
    with pytest.raises(LandscapeError, match=r"run\.json"):
        pending([SHORT], tmp_path)
