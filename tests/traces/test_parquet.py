import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import rows

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Folder
from landscape.traces.parquet import read_part, schema, to_arrow, to_parquet
from landscape.traces.schema import UPDATES, VERSION


def write(path, rows, run=None):
    path.write_bytes(to_parquet(to_arrow(rows, "updates"), path.name, run))


def read(path, table="updates", run=None):
    return read_part(Folder(path.parent), path.name, table, run)


def test_pandas_reads_a_part_without_this_package(tmp_path):
    write(tmp_path / "updates-000000000.parquet", rows(steps=3))
    frame = pd.read_parquet(tmp_path / "updates-000000000.parquet")
    assert list(frame) == [column.name for column in UPDATES]
    assert list(frame["step"]) == [0, 1, 2]
    np.testing.assert_array_equal(frame["losses"][1], rows(steps=3)[1]["losses"])


def test_a_part_says_its_version_units_and_meanings(tmp_path):
    write(tmp_path / "part", rows(steps=1))
    found = pq.read_schema(tmp_path / "part")
    assert found.metadata[b"landscape_version"] == str(VERSION).encode()
    for column in UPDATES:
        metadata = found.field(column.name).metadata
        assert (metadata[b"unit"].decode(), metadata[b"meaning"].decode()) == (column.unit, column.meaning)


@pytest.mark.parametrize(
    ("losses", "smallest", "largest"),
    [([3.0, 1.0, 2.0], 1.0, 3.0), ([1.0, np.nan], np.nan, np.nan), ([1.0, np.inf], 1.0, np.inf)],
)
def test_extremes_are_those_of_the_losses(losses, smallest, largest):
    row = to_arrow([{"step": 0, "losses": losses}], "updates").to_pylist()[0]
    np.testing.assert_array_equal([row["loss_min"], row["loss_max"]], [smallest, largest])
    np.testing.assert_array_equal(row["losses"], losses)


def test_extremes_that_a_row_gives_are_kept():
    row = to_arrow([{"losses": [1.0, 2.0], "loss_min": 0.5, "loss_max": 4.0}], "updates").to_pylist()[0]
    assert (row["loss_min"], row["loss_max"]) == (0.5, 4.0)


def test_a_newer_format_is_refused(tmp_path):
    newer = to_arrow(rows(steps=1), "updates").replace_schema_metadata({"landscape_version": str(VERSION + 1)})
    pq.write_table(newer, tmp_path / "part")
    with pytest.raises(LandscapeError, match=f"format {VERSION + 1}, and only {VERSION} is known"):
        read(tmp_path / "part")


def rewritten(path, version, drop=()):
    """A part whose columns ``drop`` are gone, and which says another version of the format, or none."""
    part = to_arrow(rows(steps=3), "updates").drop_columns(list(drop))
    pq.write_table(part.replace_schema_metadata({"landscape_version": version} if version else {}), path)
    return path


NEW = [column.name for column in UPDATES if column.since == 2]


@pytest.mark.parametrize("version", ["1", None])
def test_columns_that_came_later_are_missing_in_an_older_part(tmp_path, version):
    part = read(rewritten(tmp_path / "part", version, drop=NEW))
    assert part.schema == schema("updates")
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)
    assert part["losses"].to_pylist() == [row["losses"] for row in rows(steps=3)]


def test_a_column_that_others_added_is_not_taken_for_one_that_came_later(tmp_path):
    part = read(rewritten(tmp_path / "part", "1"))
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)


@pytest.mark.parametrize("version", ["2", None])
@pytest.mark.parametrize("column", ["slope", "gradient_distances", "losses"])
def test_a_part_without_a_column_of_its_version_is_refused(tmp_path, version, column):
    with pytest.raises(LandscapeError, match=f"no part of the table updates: it has no column {column}"):
        read(rewritten(tmp_path / "part", version, drop=[column]))


def test_a_part_that_has_lost_its_version_is_read_whole(tmp_path):
    part = read(rewritten(tmp_path / "part", None))
    assert part["slope"].to_pylist() == [row["slope"] for row in rows(steps=3)]


def test_another_table_is_refused(tmp_path):
    write(tmp_path / "part", rows(steps=1))
    with pytest.raises(LandscapeError, match="no part of the table epochs: it has no column train_loss"):
        read(tmp_path / "part", "epochs")


def test_columns_that_others_added_are_left_out(tmp_path):
    part = to_arrow(rows(steps=1), "updates")
    pq.write_table(part.append_column("note", pa.array(["mine"])), tmp_path / "part")
    assert read(tmp_path / "part").schema == schema("updates")


def test_a_part_knows_its_run(tmp_path):
    write(tmp_path / "part", rows(steps=2), run="a")
    assert read(tmp_path / "part", run="a").num_rows == 2
    assert read(tmp_path / "part").num_rows == 2
    with pytest.raises(LandscapeError, match="belongs to another run"):
        read(tmp_path / "part", run="b")


def test_no_flipped_bit_is_read_as_a_number(tmp_path):
    """Every part with one bit flipped is refused, or read as it was."""
    part = to_arrow(rows(steps=20), "updates")
    content, random = bytearray(to_parquet(part, "part", "a")), np.random.default_rng(0)
    refused = 0
    for bit in random.choice(8 * len(content), 400, replace=False):
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "part").write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            assert read(tmp_path / "part", run="a").equals(part.cast(schema("updates")))
        except LandscapeError:
            refused += 1
    assert refused > 100
