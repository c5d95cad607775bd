from dataclasses import replace

import pytest
import torch

from landscape import RECIPES, LandscapeError, read_traces, train
from landscape.training.train import classify

SHORT = replace(RECIPES["digits"], epochs=2)


def rows(folder):
    return read_traces(folder).drop(columns=["seconds", "run", "started", "ended"]).astype(str)


def test_train_records_run(tmp_path):
    seen = []
    folder = train(replace(SHORT, norm="ghost", every=3), tmp_path, on_update=lambda probe: seen.append(probe.step))
    assert folder == tmp_path / "digits-ghost16-seed0"
    frame, epochs = read_traces(tmp_path), read_traces(tmp_path, table="epochs")
    assert seen == list(range(1, 23))
    assert list(frame.step) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert frame.epoch.iloc[-1] == pytest.approx(21 / 11)
    assert set(frame.norm) == {"ghost"}
    assert set(frame.groups) == {16}
    assert list(epochs.step) == [11, 22]
    assert epochs.train_loss.is_monotonic_decreasing
    assert (epochs.test_accuracy > 0.8).all()


def test_train_is_reproducible(tmp_path):
    first, second = train(SHORT, tmp_path / "1"), train(SHORT, tmp_path / "2")
    assert rows(first).equals(rows(second))
    third = train(replace(SHORT, seed=1), tmp_path / "1")
    assert not rows(first).loss.equals(rows(third).loss)


def test_every_changes_no_loss(tmp_path):
    often, seldom = train(SHORT, tmp_path / "1"), train(replace(SHORT, every=5), tmp_path / "2")
    kept = read_traces(often).query("step % 5 == 0")
    assert list(kept.loss) == list(read_traces(seldom).loss)


def test_norms_start_at_equal_weights(tmp_path):
    torch.manual_seed(123)
    a = read_traces(train(replace(SHORT, norm="ghost", groups=1, epochs=1), tmp_path))
    b = read_traces(train(replace(SHORT, norm="batch", epochs=1), tmp_path))
    assert a.loss[0] == pytest.approx(b.loss[0], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"batch_size": 1501}, {}, "batch_size=1501: .*1500 training samples"),
        ({"norm": "ghost", "groups": 200}, {}, "groups=200 on a batch of 128"),
        ({"norm": "ghost", "groups": 128}, {}, "single value per channel"),
        ({"norm": "group", "channel_groups": 7}, {}, "channel_groups=7 on 512 channels"),
        ({"dataset": "cats"}, {}, "'cats': unknown data set"),
        ({}, {"device": "abacus"}, "device='abacus'"),
        ({"step_sizes": ()}, {}, "one finite number or more"),
    ],
)
def test_error_leaves_no_trace(tmp_path, change, options, message):
    with pytest.raises(LandscapeError, match=message):
        train(replace(SHORT, **change), tmp_path / "traces", **options)
    assert not (tmp_path / "traces").exists()


def test_overwrite(tmp_path):
    train(replace(SHORT, epochs=1), tmp_path)
    with pytest.raises(LandscapeError, match="digits-batch-seed0"):
        train(SHORT, tmp_path)
    train(SHORT, tmp_path, overwrite=True)
    assert len(read_traces(tmp_path)) == 22


def test_validation_is_evaluated(tmp_path):
    epochs = read_traces(train(replace(SHORT, validation=300), tmp_path), table="epochs")
    assert (epochs.validation_accuracy > 0.8).all()
    assert epochs.test_accuracy.notna().all()
    nothing = read_traces(train(SHORT, tmp_path / "all"), table="epochs")
    assert nothing.validation_accuracy.isna().all()


def test_classify_equals_train(tmp_path):
    recipe = replace(SHORT, validation=300)
    rows = []
    last = classify(recipe, on_epoch=rows.append)
    traced = read_traces(train(recipe, tmp_path), table="epochs")
    for row, (_, expected) in zip(rows, traced.iterrows(), strict=True):
        names = [name for name in row if name != "seconds" and (row is last or not name.startswith("test"))]
        assert {name: row[name] for name in names} == {name: expected[name] for name in names}
    assert rows[0]["test_accuracy"] != rows[0]["test_accuracy"]
    assert last is rows[-1]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]


def test_relative_step_sizes(tmp_path):
    recipe = replace(SHORT, relative=True, step_sizes=(0.5, 2.0), schedule="cosine", rise=0.2, engine="loop")
    frame = read_traces(train(recipe, tmp_path))
    assert frame.lr.nunique() > 15
    for _, row in frame.iterrows():
        assert list(row.step_sizes) == [0.5 * row.lr, 2.0 * row.lr]
