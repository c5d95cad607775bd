import pytest

from landscape.storage.filesystem import Memory
from landscape.traces.folder import TraceFolder
from landscape.traces.writer import NullWriter

PARTS = ["updates-000000000.parquet", "updates-000001000.parquet", "epochs-000000000.parquet"]


def folder(*names):
    return TraceFolder(Memory(dict.fromkeys(names, b"")))


def test_parts_are_sorted_by_row():
    assert folder(*PARTS[::-1]).parts("updates") == PARTS[:2]
    assert [TraceFolder.first_row(part) for part in PARTS] == [0, 1000, 0]
    assert TraceFolder.part_name("updates", 1000) == PARTS[1]


@pytest.mark.parametrize("name", ["run.json", "updates-0.csv", "updates-x.parquet", ".updates-000000000.parquet.tmp"])
def test_other_files_are_no_rows(name):
    assert TraceFolder.first_row(name) is None
    assert not folder(name).has_rows
    assert folder(name, PARTS[2]).has_rows


def test_has_checkpoint():
    assert folder("checkpoint.pt").has_checkpoint
    assert not folder("run.json", ".checkpoint.pt.tmp").has_checkpoint


def test_leftovers_are_temporary_files_of_the_run():
    temporary = [f".{name}.tmp" for name in ("checkpoint.pt", "run.json", PARTS[1])]
    assert folder(*temporary, ".notes.txt.tmp", ".lock", *PARTS).leftovers() == temporary


def test_metadata_without_file():
    assert folder().metadata() == {}


def test_null_writer_drops_everything():
    with NullWriter() as trace:
        trace.append({"step": 0})
        trace.update_metadata(norm="ghost")
        trace.truncate({"updates": 3})
        assert (trace.flush(), trace.written) == (True, {"updates": 0, "epochs": 0})
    assert trace.location is None
    assert trace.frame().empty
    assert "norm" not in trace.frame()
