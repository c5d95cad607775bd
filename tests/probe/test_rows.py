"""Rows on their way to the host: read together, without skipped updates, with what shows only there."""

import warnings

import pytest
import torch

from landscape import LandscapeError
from landscape.probe import rows
from landscape.probe.rows import PendingRow, RowQueue, to_host
from landscape.traces.writer import TraceWriter

NAN, INF = float("nan"), float("inf")


def row(step=0, loss=2.0, losses=(1.5, 1.25), slope=1.0, rest=0.0, step_sizes=(0.5, 1.0), kind=torch.float32):
    numbers = {"loss": loss, "losses": list(losses), "slope": slope, "gradient_rest": rest, "grad_norm": 1.0}
    tensors = {name: torch.tensor(value, dtype=kind) for name, value in numbers.items()}
    return {"step": step, "step_sizes": list(step_sizes), **tensors}


def test_to_host_keeps_every_bit():
    exact = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    mixed = {
        "half": torch.tensor(0.1).half(),
        "double": exact,
        "flags": torch.tensor([True, False]),
        "empty": exact[:0],
    }
    (found,) = to_host([mixed | {"text": "x"}])
    assert found == {
        "half": mixed["half"].item(),
        "double": exact.tolist(),
        "flags": [1.0, 0.0],
        "empty": [],
        "text": "x",
    }
    assert to_host([]) == []
    assert to_host([{"step": 1}]) == [{"step": 1}]


def skips(*flags):
    return [None if flag is None else torch.tensor(float(flag)) for flag in flags]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (skips(0, 1, 0), [0, 2]),
        (skips(None, None), [0, 1]),
        (skips(1, 1), []),
        (skips(None, 1, 1), [0]),
        (skips(0, 1, 2), [0]),
    ],
)
def test_skipped_updates_have_no_row(flags, kept):
    queue = RowQueue()
    given = [queue.append(row(step), flag) for step, flag in enumerate(flags)]
    assert [one["step"] for one in queue.resolve(given)] == kept
    assert queue.last().get("step") == (kept[-1] if kept else None)
    assert queue.has_rows


def test_the_flag_is_that_of_the_step():
    """A loss scaler may write to its tensors before rows are read."""
    queue, flag = RowQueue(), torch.tensor(1.0)
    pending = queue.append(row(), flag)
    flag.zero_()
    assert queue.resolve([pending]) == []


def test_last_row_is_found_again():
    queue = RowQueue()
    assert queue.last() == {}
    assert not queue.has_rows
    queue.append(row(0), torch.tensor(0.0))
    queue.append(row(1), torch.tensor(1.0))
    assert queue.last()["step"] == queue.last()["step"] == 0
    queue.append(row(2), torch.tensor(1.0))
    assert queue.last()["step"] == 0
    other = RowQueue()
    other.restore(queue.last())
    assert other.last()["losses"] == [1.5, 1.25]
    other.append(row(5))
    assert other.last()["step"] == 5


def test_few_rows_are_held(monkeypatch):
    monkeypatch.setattr(rows, "MAX_RECENT", 10)
    queue = RowQueue()
    for step in range(25):
        queue.append(row(step), torch.tensor(step > 3))
        assert len(queue._recent) <= 10
    assert queue.last()["step"] == 3
    for step in range(25):
        queue.append(row(step))
        assert len(queue._recent) == 1


def test_a_part_of_skipped_updates_is_not_written(tmp_path):
    queue = RowQueue()
    with TraceWriter(tmp_path, flush_rows=2, resolve=queue.resolve) as trace:
        for step in range(6):
            trace.append(queue.append(row(step), torch.tensor(step in (2, 3, 4))))
            assert len([*tmp_path.glob("updates-*.parquet")]) == (0, 1, 1, 1, 1, 2)[step]
        assert trace.written["updates"] == 3
    assert [*trace.frame()["step"]] == [0, 1, 5]


FINDINGS = {
    "a band": (row(), []),
    "a constant loss": (row(losses=(2.0, 2.0)), ["constant"]),
    "one point": (row(losses=(2.0,), step_sizes=(0.5,)), ["constant"]),
    "a constant loss in half precision": (row(losses=(2.0, 2.0), slope=1.0, kind=torch.bfloat16), ["constant"]),
    "rounding in half precision": (row(losses=(2.0, 2.0), slope=0.1, kind=torch.bfloat16), []),
    "a plateau that begins behind the origin": (row(losses=(1.0, 1.0)), []),
    "a step size of 0": (row(losses=(2.0, 2.0), step_sizes=(0.0, 0.0)), []),
    "a gradient of 0": (row(losses=(2.0, 2.0), slope=0.0), []),
    "a gradient that is not the loss's": (row(losses=(2.0, 2.0), slope=0.0, rest=1.0), []),
    "a gradient of unknown origin": (row(losses=(2.0, 2.0), rest=NAN), ["constant"]),
    "a change below rounding": (row(losses=(2.0, 2.0), slope=1e-4), []),
    "ascent": (row(losses=(2.0, 2.0), slope=-1.0), ["constant"]),
    "an infinite slope": (row(losses=(2.0, 2.0), slope=INF), []),
    "NaN": (row(losses=(NAN, NAN)), ["not a number"]),
    "NaN at one point": (row(losses=(NAN, 2.0)), []),
    "infinity": (row(losses=(INF, INF)), []),
    "a training loss of NaN": (row(losses=(NAN, NAN), loss=NAN), []),
    "both": (row(losses=(NAN, NAN)), ["not a number"]),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings(name):
    given, kinds = FINDINGS[name]
    queue = RowQueue()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        queue.resolve([queue.append(given), queue.append(given)])
        queue.resolve([queue.append(given)])
    assert queue._warned == set(kinds)
    assert len(caught) == len(kinds)


def test_skipped_updates_are_not_warned_of():
    queue = RowQueue()
    bad = [queue.append(row(losses=losses), torch.tensor(1.0)) for losses in ((NAN, NAN), (2.0, 2.0))]
    assert queue.resolve(bad) == []


def test_a_warning_that_is_an_error_loses_no_row():
    queue = RowQueue()
    trace = TraceWriter(None, resolve=queue.resolve)
    trace.append(queue.append(row(losses=(NAN, NAN))))
    with pytest.raises(UserWarning, match="NaN"):
        trace.flush()
    assert len(trace.frame()) == 1


def test_rows_of_other_tables_pass():
    queue, checks = RowQueue(), []
    assert queue.resolve([{"epoch": 1, "train_loss": 0.5}]) == [{"epoch": 1, "train_loss": 0.5}]
    RowQueue(lambda: checks.append(1)).resolve([])
    assert checks == [1]


def test_the_flag_is_no_column():
    trace = TraceWriter(None, resolve=RowQueue().resolve)
    trace.append(PendingRow(row(), torch.tensor(0.0)))
    assert not [name for name in trace.frame().columns if not isinstance(name, str)]
    with pytest.raises(LandscapeError, match="skipped"):
        trace.append({"skipped": 1})
