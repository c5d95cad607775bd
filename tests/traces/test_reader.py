import os
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from recordings import rows

from landscape.errors import LandscapeError
from landscape.storage.address import inside
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.schema import EPOCHS, UPDATES, VERSION
from landscape.traces.writer import TraceWriter


def record(folder, facts=None, steps=10, **options):
    with TraceWriter(folder, facts, **options) as trace:
        for row in rows(steps=steps):
            trace.append(row)


def test_read_at_any_depth(tmp_path):
    for name in ("a/0", "a/1", "b"):
        record(tmp_path / name, {"seed": 0} if name == "a/0" else {}, steps=2)
    frame = read_traces(tmp_path)
    assert list(frame["run"].unique()) == ["a/0", "a/1", "b"]
    assert frame["run"].dtype == "category"
    assert frame["seed"].isna().sum() == 4
    assert len(frame) == 6
    assert list(read_traces([tmp_path / "a" / "0", tmp_path / "b"])["run"].unique()) == ["0", "b"]
    assert len(read_traces([tmp_path, tmp_path / "a", tmp_path / "b"])) == 6


def test_read_runs_of_same_name(tmp_path):
    paths = [tmp_path / "mnist" / "ghost", tmp_path / "digits" / "ghost"]
    for path in paths:
        record(path, steps=2)
    assert list(read_traces(paths)["run"].unique()) == [path.as_posix() for path in paths]


def test_read_single_part(tmp_path):
    record(tmp_path / "run", {"norm": "seq"}, flush_rows=4)
    frame = read_traces(str(tmp_path / "run" / "updates-000000004.parquet"))
    assert list(frame["step"]) == [4, 5, 6, 7]
    assert (set(frame["run"]), set(frame["norm"])) == ({"run"}, {"seq"})
    assert len(read_traces((tmp_path / "run").glob("*.parquet"))) == 10


def test_types_of_facts(tmp_path):
    facts = {"seed": 1, "norm": "batch", "dropout": 0.5, "relative": True, "lr": 99.0, "options": {"a": 1}, "run": "x"}
    record(tmp_path / "full", facts)
    record(tmp_path / "bare")
    frame = read_traces(tmp_path)
    types = {"seed": "Int64", "norm": "category", "dropout": "float64", "relative": "boolean"}
    assert frame[list(types)].dtypes.astype(str).to_dict() == types
    assert set(frame["lr"]) == {0.4}  # The column of the rows replaces the fact.
    assert "options" not in frame
    assert list(frame["run"].unique()) == ["bare", "full"]


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_read_every_format(version):
    """Each folder was recorded by the last commit that wrote this format."""
    folder = Path(__file__).parent / f"version{version}"
    updates, epochs = read_traces(folder), read_traces(folder, "epochs")
    for frame, columns in ((updates, UPDATES), (epochs, EPOCHS)):
        assert {column.name for column in columns} <= set(frame)
        for column in columns:
            assert frame[column.name].isna().all() == (column.since > version)
        assert frame.attrs["left_out"] == []
    assert list(updates.step) == list(range(len(updates)))
    np.testing.assert_array_equal(updates.loss_max, [np.max(losses) for losses in updates.losses])


def test_read_name_like_hive_partition(tmp_path):
    record(tmp_path / "step=7")
    assert list(read_traces(tmp_path)["step"]) == list(range(10))


def test_read_missing_path(tmp_path):
    with pytest.raises(LandscapeError, match="missing: does not exist"):
        read_traces(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no trace")
    with pytest.raises(LandscapeError, match=r"notes\.txt: cannot be read as Parquet"):
        read_traces(tmp_path / "notes.txt")


def part(first):
    return f"updates-{first:09d}.parquet"


def truncate(folder):
    (folder / part(4)).write_bytes((folder / part(4)).read_bytes()[:-100])


def empty(folder):
    (folder / part(4)).write_bytes(b"")


def flip(folder):
    content = bytearray((folder / part(4)).read_bytes())
    names = pq.read_schema(folder / part(4)).names
    column = pq.read_metadata(folder / part(4)).row_group(0).column(names.index("loss"))
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1  # the last byte of its values
    (folder / part(4)).write_bytes(content)


def foreign(folder):
    pd.DataFrame({"step": [1], "losses": ["none"]}).to_parquet(folder / part(4))


def of_another_run(folder):
    record(folder / "other", flush_rows=4)
    (folder / "other" / part(4)).replace(folder / part(4))
    for path in (folder / "other").iterdir():
        path.unlink()


def newer(folder):
    table = pq.read_table(folder / part(4))
    pq.write_table(table.replace_schema_metadata({"landscape_version": str(VERSION + 1)}), folder / part(4))


def folder_instead(folder):
    (folder / part(4)).unlink()
    (folder / part(4)).mkdir()


def remove(folder):
    (folder / part(4)).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "updates-000000004.parquet: cannot be read as Parquet"),
        (empty, "updates-000000004.parquet: cannot be read as Parquet"),
        (flip, "updates-000000004.parquet: cannot be read as Parquet"),
        (foreign, "updates-000000004.parquet: is no part of the table updates"),
        (of_another_run, "updates-000000004.parquet: belongs to another run"),
        (newer, f"trace format {VERSION + 1}, but"),
        (folder_instead, "lacks the updates in rows 4 to 7"),
        (remove, "lacks the updates in rows 4 to 7"),
    ],
)
def test_damaged_part_is_left_out(tmp_path, spoil, reason):
    record(tmp_path / "run", {"norm": "ghost"}, flush_rows=4)
    record(tmp_path / "healthy", flush_rows=4)
    spoil(tmp_path / "run")
    with pytest.warns(UserWarning, match="Left out: .*" + reason):
        frame = read_traces(tmp_path)
    assert any(reason in sentence for sentence in frame.attrs["left_out"])
    assert list(frame.step[frame.run == "run"]) == [0, 1, 2, 3, 8, 9]
    assert list(frame.step[frame.run == "healthy"]) == list(range(10))
    kept = [rows(steps=10)[step]["loss"] for step in (0, 1, 2, 3, 8, 9)]
    np.testing.assert_array_equal(frame.loss[frame.run == "run"], kept)


def test_repeated_rows_are_left_out(tmp_path):
    record(tmp_path, flush_rows=4)
    pd.read_parquet(tmp_path / part(0)).to_parquet(tmp_path / part(2))  # As a tool does that drops the metadata.
    with pytest.warns(UserWarning, match="updates-000000002.parquet: repeats rows"):
        assert list(read_traces(tmp_path).step) == list(range(10))


def test_renamed_part_is_refused(tmp_path):
    record(tmp_path, flush_rows=4)
    (tmp_path / part(0)).write_bytes((tmp_path / part(4)).read_bytes())
    with pytest.warns(UserWarning, match="was written as updates-000000004.parquet"):
        assert list(read_traces(tmp_path).step) == list(range(4, 10))
    (tmp_path / part(0)).rename(tmp_path / "copy")
    assert list(read_traces(tmp_path / "copy").step) == list(range(4, 8))


def test_missing_last_rows_are_named(tmp_path):
    record(tmp_path, flush_rows=4)
    (tmp_path / part(8)).unlink()
    with pytest.warns(UserWarning, match="lacks the last 2 of its updates"):
        assert list(read_traces(tmp_path).step) == list(range(8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"norm": ', "run.json: cannot be read as JSON"),
        (b"[1, 2]", "run.json: cannot be read as JSON"),
        (b"\xff\xfe", "run.json: cannot be read as JSON"),
        (b"[" * 100_000, "run.json: cannot be read as JSON"),
        (b'{"version": 99}', "run.json: has trace format 99"),
        (b'{"version": "two"}', "has trace format 'two'"),
    ],
)
def test_damaged_metadata_is_left_out(tmp_path, content, reason):
    record(tmp_path, {"norm": "ghost"})
    (tmp_path / "run.json").write_bytes(content)
    with pytest.warns(UserWarning, match=reason):
        frame = read_traces(tmp_path)
    assert len(frame) == 10
    assert "norm" not in frame


def test_read_nothing_readable(tmp_path):
    record(tmp_path)
    (tmp_path / part(0)).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(LandscapeError, match=r"Nothing can be read: .*updates-000000000.parquet: cannot"):
        read_traces(tmp_path)
    (tmp_path / part(0)).unlink()
    with pytest.raises(LandscapeError, match=r"No updates are recorded in .*landscape probe"):
        read_traces(tmp_path)


def test_list_runs(tmp_path):
    record(tmp_path / "a", {"norm": "ghost", "groups": 16}, flush_rows=4)
    record(tmp_path / "b", {"norm": "batch"}, steps=3)
    trace = TraceWriter(tmp_path / "c", {"norm": "none"}, flush_rows=4)
    for row in rows(steps=6):
        trace.append(row)
    for name in ("a", "b"):  # Only the last part is read.
        for path in sorted((tmp_path / name).glob("updates-*"))[:-1]:
            path.write_bytes(b"")
    runs = list_runs(tmp_path)
    assert list(runs.run) == ["a", "b", "c"]
    assert list(runs.updates) == [10, 3, 4]
    assert list(runs.norm) == ["ghost", "batch", "none"]
    assert list(runs.ended.isna()) == [False, False, True]
    assert list(runs.writer.isna()) == [True, True, False]
    assert runs.writer[2] == f"process {os.getpid()} on host {platform.node()}"
    trace.write_file("checkpoint.pt", b"")
    trace.close()  # A run with a checkpoint is unfinished.
    assert list(list_runs(tmp_path).ended.isna()) == [False, False, True]


def test_links_are_followed_once(tmp_path):
    record(tmp_path / "elsewhere" / "run", steps=3)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "traces" / "round").symlink_to(tmp_path / "traces")
    assert list(list_runs(tmp_path / "traces").run) == ["linked"]
    assert len(read_traces(tmp_path / "traces")) == 3


def test_file_url(tmp_path):
    record((tmp_path / "a run").as_uri(), steps=3)
    assert len(read_traces(tmp_path / "a run")) == len(read_traces((tmp_path / "a run").as_uri())) == 3


def test_inside_without_bucket():
    assert inside("s3://bucket/", "run") == "s3://bucket/run"
    with pytest.raises(LandscapeError, match="s3://: names no bucket"):
        inside("s3://", "run")


def test_list_run_with_damaged_part(tmp_path):
    record(tmp_path, flush_rows=4)
    (tmp_path / part(8)).write_bytes(b"")
    with pytest.warns(UserWarning, match="updates-000000008.parquet: cannot be read"):
        assert list(list_runs(tmp_path).updates) == [8]
