import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from recordings import rows

from landscape.errors import LandscapeError
from landscape.traces import buffer
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.schema import EPOCHS, UPDATES, VERSION
from landscape.traces.writer import TraceWriter

EPOCH = {
    "epoch": 1,
    "step": 40,
    "train_loss": 0.5,
    "validation_loss": 0.55,
    "validation_accuracy": 0.91,
    "test_loss": 0.6,
    "test_accuracy": 0.9,
}


def record(folder, facts=None, steps=10, **options):
    with TraceWriter(folder, facts, **options) as trace:
        for row in rows(steps=steps):
            trace.append(row)
    return trace


def files(folder):
    """Return all files but the lock, which stays, because removing it would allow two locks."""
    return sorted(set(os.listdir(folder)) - {".lock"})


def parts(folder):
    return sorted(path.name for path in Path(folder).glob("*.parquet"))


def test_round_trip(tmp_path):
    trace = record(tmp_path / "run", {"norm": "ghost", "groups": 16}, flush_rows=4)
    assert parts(tmp_path / "run") == [f"updates-{first:09d}.parquet" for first in (0, 4, 8)]
    frame = read_traces(tmp_path / "run")
    assert {column.name for column in UPDATES} <= set(frame)
    assert list(frame)[:5] == ["run", "step", "loss", "loss_min", "loss_max"]
    assert set(frame["run"]) == {"run"}
    assert (set(frame["norm"]), set(frame["groups"])) == ({"ghost"}, {16})
    for name, values in pd.DataFrame(rows(steps=10)).items():
        np.testing.assert_array_equal(np.array(frame[name].to_list()), np.array(values.to_list()))
    pd.testing.assert_frame_equal(trace.frame(), frame.drop(columns="run"))


def test_non_finite_values(tmp_path):
    with TraceWriter(tmp_path) as trace:
        trace.append({"step": 0, "loss": np.nan, "losses": [1.0, np.nan, np.inf]})
        trace.append({"step": 1, "loss": -np.inf, "losses": [1.0, np.inf]})
    frame = read_traces(tmp_path)
    np.testing.assert_array_equal(frame["loss"], [np.nan, -np.inf])
    np.testing.assert_array_equal(frame["losses"][0], [1.0, np.nan, np.inf])
    np.testing.assert_array_equal(frame["loss_max"], [np.nan, np.inf])


def test_rows_in_memory():
    with TraceWriter(None, flush_rows=3) as trace:
        assert trace.frame().empty
        for row in rows(steps=8):
            trace.append(row)
        assert list(trace.frame()["step"]) == list(range(8))
    assert list(trace.frame()["step"]) == list(range(8))


def test_frame_has_pending_rows(tmp_path):
    with TraceWriter(tmp_path, flush_rows=4) as trace:
        for row in rows(steps=6):
            trace.append(row)
        assert list(trace.frame()["step"]) == list(range(6))


def test_reading_a_closed_trace_leaves_it_to_other_writers(tmp_path):
    first = record(tmp_path)
    assert len(first.frame()) == 10
    first.flush()
    assert len(record(tmp_path, steps=3, overwrite=True).frame()) == 3


def test_rows_are_flushed_after_seconds(tmp_path, monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(buffer, "time", SimpleNamespace(monotonic=lambda: seconds))
    trace = TraceWriter(tmp_path, flush_seconds=30)
    first, second, third = rows(steps=3)
    trace.append(first)
    assert parts(tmp_path) == []
    seconds = 31.0
    trace.append(second)
    trace.append(third)
    assert parts(tmp_path) == ["updates-000000000.parquet"]
    assert len(read_traces(tmp_path)) == 2
    trace.close()


def test_epochs_table(tmp_path):
    with TraceWriter(tmp_path, {"seed": 3}) as trace:
        trace.append(rows()[0])
        trace.append(EPOCH, "epochs")
    frame = read_traces(tmp_path, "epochs")
    assert frame[[column.name for column in EPOCHS]].to_dict("records") == [EPOCH]
    assert list(frame["seed"]) == [3]
    assert len(read_traces(tmp_path)) == 1


def test_resolve_is_called_once_per_part(tmp_path):
    calls = []

    def resolve(pending):
        calls.append(len(pending))
        return [{**row, "loss": row["loss"]()} for row in pending]

    with TraceWriter(tmp_path, flush_rows=3, resolve=resolve) as trace:
        for step in range(5):
            trace.append({"step": step, "loss": lambda step=step: step / 2})
    assert calls == [3, 2]
    assert list(read_traces(tmp_path)["loss"]) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_failed_resolve_keeps_rows(tmp_path):
    def resolve(pending):
        if not ready:
            raise RuntimeError("the device is busy")
        return pending

    ready = []
    trace = TraceWriter(tmp_path, resolve=resolve)
    trace.append(rows()[0])
    with pytest.raises(RuntimeError):
        trace.flush()
    ready.append(True)
    trace.close()
    assert len(read_traces(tmp_path)) == 1


def test_metadata_of_run(tmp_path):
    trace = TraceWriter(tmp_path, {"recipe": {"layers": (512, 300)}, "data": Path("digits.npz")})
    trace.update_metadata(engine="affine", data="mnist")
    facts = json.loads((tmp_path / "run.json").read_text())
    assert "ended" not in facts
    trace.close()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert next(iter(facts.items())) == ("version", VERSION)
    assert facts["recipe"] == {"layers": [512, 300]}
    assert (facts["engine"], facts["data"]) == ("affine", "mnist")
    assert facts["environment"]["versions"]["numpy"] == np.__version__
    assert facts["started"] <= facts["ended"]


def test_overwrite(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    record(tmp_path, flush_rows=2, steps=10)
    with pytest.raises(LandscapeError, match=r"holds a run .*overwrite=True.*resume=True"):
        TraceWriter(tmp_path)
    assert len(read_traces(tmp_path)) == 10
    record(tmp_path, steps=3, overwrite=True)
    assert len(read_traces(tmp_path)) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unsupported_fact_removes_nothing(tmp_path):
    record(tmp_path)
    with pytest.raises(LandscapeError, match=r"model: .*object"):
        TraceWriter(tmp_path, {"model": object()}, overwrite=True)
    assert len(read_traces(tmp_path)) == 10


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(LandscapeError, match=r"file.*: cannot hold a trace"):
            TraceWriter(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(LandscapeError, match="Permission denied"):
            TraceWriter(folder)


def test_unknown_table_and_column(tmp_path):
    trace = TraceWriter(None)
    with pytest.raises(LandscapeError, match=r"accuracy: no column of table updates.*step, epoch"):
        trace.append({"step": 0, "accuracy": 1.0})
    with pytest.raises(LandscapeError, match=r"batches.*updates, epochs"):
        trace.append({"step": 0}, "batches")
    with pytest.raises(LandscapeError, match=r"batches.*updates, epochs"):
        read_traces(tmp_path, "batches")


WRITE_FOREVER = """
import itertools, sys
from landscape.traces.writer import TraceWriter
from recordings import rows
trace = TraceWriter(sys.argv[1], {"norm": "ghost"}, flush_rows=3)
print("ready", flush=True)
for step, row in enumerate(itertools.cycle(rows())):
    trace.append({**row, "step": step})
    trace.update_metadata(step=step)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("seed", range(3))
def test_killed_writer_leaves_readable_files(tmp_path, seed):
    command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        while len(parts(tmp_path)) < 2:
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.05))
        process.kill()
    with pytest.warns(UserWarning, match="killed"):
        steps = read_traces(tmp_path)["step"]
    assert list(steps) == list(range(len(steps)))
    assert json.loads((tmp_path / "run.json").read_text())["norm"] == "ghost"
    record(tmp_path, steps=2, overwrite=True)
    assert files(tmp_path) == ["run.json", "updates-000000000.parquet"]


def test_leftovers_are_removed(tmp_path):
    for name in (".run.json.tmp", ".updates-000000000.parquet.tmp", ".updates-000000004.parquet.tmp"):
        (tmp_path / name).write_bytes(b"half a file")
    record(tmp_path, flush_rows=10)
    assert files(tmp_path) == ["run.json", "updates-000000000.parquet"]
    assert len(read_traces(tmp_path)) == 10


def test_a_run_goes_on_behind_its_rows(tmp_path):
    record(tmp_path, {"norm": "ghost", "engine": "loop"}, flush_rows=4)
    before = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / ".updates-000000012.parquet.tmp").write_bytes(b"half a file")
    trace = TraceWriter(tmp_path, {"norm": "ghost", "device": "cpu"}, resume=True)
    assert trace.written == {"updates": 10, "epochs": 0}
    for row in rows(steps=15)[10:]:
        trace.append(row)
    trace.close()
    assert files(tmp_path) == ["run.json", *(f"updates-{first:09d}.parquet" for first in (0, 4, 8, 10))]
    assert list(read_traces(tmp_path).step) == list(range(15))
    facts = json.loads((tmp_path / "run.json").read_text())
    assert [facts[name] for name in ("id", "started", "engine")] == [
        before[name] for name in ("id", "started", "engine")
    ]
    assert facts["device"] == "cpu"
    assert len(facts["resumed"]) == 1
    TraceWriter(tmp_path, resume=True).close()
    assert len(json.loads((tmp_path / "run.json").read_text())["resumed"]) == 2


def test_resume_with_checkpoint_only(tmp_path):
    with TraceWriter(tmp_path) as trace:
        trace.write_file("checkpoint.pt", b"state")
    (tmp_path / ".checkpoint.pt.tmp").write_bytes(b"half a file")
    with TraceWriter(tmp_path, resume=True) as trace:
        assert trace.read_file("checkpoint.pt") == b"state"
        assert trace.read_file(".checkpoint.pt.tmp") is None


def test_resume_without_run(tmp_path):
    trace = record(tmp_path / "run", resume=True)
    assert "resumed" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(trace.frame()) == 10


@pytest.mark.parametrize("kept", range(11))
def test_truncate(tmp_path, kept):
    record(tmp_path, flush_rows=4)
    trace = TraceWriter(tmp_path, resume=True)
    for row in rows(steps=12)[10:]:
        trace.append(row)
    trace.truncate({"updates": kept})
    assert trace.written["updates"] == kept
    for row in rows(steps=14)[kept:]:
        trace.append(row)
    trace.close()
    frame = read_traces(tmp_path)
    assert list(frame.step) == list(range(14))
    expected = rows(steps=10)[:kept] + rows(steps=14)[kept:]
    np.testing.assert_array_equal(frame.loss, [row["loss"] for row in expected])


def test_resumed_run_has_not_ended(tmp_path):
    """Not even with the rows that it had at an earlier close."""
    record(tmp_path, flush_rows=4)
    trace = TraceWriter(tmp_path, resume=True)
    trace.truncate({"updates": 4})
    facts = json.loads((tmp_path / "run.json").read_text())
    assert not {"ended", "rows"} & set(facts)
    assert list(read_traces(tmp_path).step) == list(range(4))
    trace.close()


@pytest.mark.parametrize("written", [{"updates": -1}, {"update": 3}, {"updates": "3"}])
def test_truncate_rejects_invalid_value(tmp_path, written):
    record(tmp_path)
    with (
        TraceWriter(tmp_path, resume=True) as trace,
        pytest.raises(LandscapeError, match=r"written=.*TraceWriter\.written"),
    ):
        trace.truncate(written)
    assert len(read_traces(tmp_path)) == 10


def test_truncate_rejects_gap(tmp_path):
    record(tmp_path, flush_rows=4)
    (tmp_path / "updates-000000000.parquet").unlink()
    with TraceWriter(tmp_path, resume=True) as trace, pytest.raises(LandscapeError, match="has 0 rows of updates"):
        trace.truncate({"updates": 9})


def test_failed_run_has_not_ended(tmp_path):
    with pytest.raises(ZeroDivisionError), TraceWriter(tmp_path):
        raise ZeroDivisionError
    assert "ended" not in json.loads((tmp_path / "run.json").read_text())


def test_overwrite_with_resume(tmp_path):
    with pytest.raises(LandscapeError, match="overwrite=True with resume=True"):
        TraceWriter(tmp_path, overwrite=True, resume=True)


def test_overwrite_removes_checkpoint(tmp_path):
    with TraceWriter(tmp_path) as trace:
        trace.append(rows()[0])
        trace.write_file("checkpoint.pt", b"of the earlier run")
    TraceWriter(tmp_path, overwrite=True).close()
    assert files(tmp_path) == ["run.json"]


def test_truncate_in_memory():
    trace = TraceWriter(None)
    for row in rows(steps=5):
        trace.append(row)
    trace.truncate({"updates": 3})
    assert list(trace.frame().step) == [0, 1, 2]


def test_truncate_rejects_missing_rows(tmp_path):
    record(tmp_path, flush_rows=4)
    (tmp_path / "updates-000000008.parquet").unlink()
    with (
        TraceWriter(tmp_path, resume=True) as trace,
        pytest.raises(LandscapeError, match=r"has 8 rows of updates.* 10"),
    ):
        trace.truncate({"updates": 10})


def test_other_files(tmp_path):
    with TraceWriter(tmp_path) as trace:
        assert trace.read_file("checkpoint.pt") is None
        trace.write_file("checkpoint.pt", b"state")
        assert trace.read_file("checkpoint.pt") == b"state"
        trace.delete_file("checkpoint.pt")
        assert files(tmp_path) == [".owner.json", "run.json"]
    with pytest.raises(OSError, match="directory"):
        trace.write_file("no/such/folder", b"")


UNCLOSED = """
import os, sys
from landscape import TraceWriter

trace = TraceWriter(sys.argv[1])
for step in range(3):
    trace.append({"step": step, "losses": [1.0]})
"""
ENDS = {"end": "", "sys.exit": "sys.exit(3)", "error": "1 / 0", "fork": "os.fork() and os.wait()"}


@pytest.mark.parametrize("end", ENDS)
def test_rows_of_an_unclosed_trace_are_written_at_the_end_of_the_process(end, tmp_path):
    place = str(tmp_path / "run")
    words = [sys.executable, "-W", "error", "-c", UNCLOSED + ENDS[end], place]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == {"sys.exit": 3, "error": 1}.get(end, 0)
    assert ("Traceback" in process.stderr) == (end == "error")
    assert list(read_traces(place).step) == [0, 1, 2]
    assert list_runs(place).ended.isna().tolist() == [end == "error"]


def test_a_run_that_was_killed_has_no_end(tmp_path):
    place = str(tmp_path / "run")
    subprocess.run([sys.executable, "-c", UNCLOSED + "trace.flush(); os._exit(0)", place], check=True)
    assert list_runs(place).ended.isna().all()
    with pytest.warns(UserWarning, match="run"):
        assert len(read_traces(place)) == 3
    with TraceWriter(place, resume=True):
        pass
    assert len(read_traces(place)) == 3
