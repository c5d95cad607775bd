import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from traces import rows

from landscape.columns import UPDATES, VERSION
from landscape.errors import UserError
from landscape.parts import read_part, schema, to_arrow, write_part


def write(path, rows):
    with path.open("wb") as file:
        write_part(to_arrow(rows, "updates"), file)


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
    with pytest.raises(UserError, match=f"format {VERSION + 1}, and only {VERSION} is known"):
        read_part(tmp_path / "part", "updates")


def rewritten(path, version, drop=()):
    """A part whose columns ``drop`` are gone, and which says another version of the format, or none."""
    part = to_arrow(rows(steps=3), "updates").drop_columns(list(drop))
    pq.write_table(part.replace_schema_metadata({"landscape_version": version} if version else {}), path)
    return path


NEW = [column.name for column in UPDATES if column.since == 2]


@pytest.mark.parametrize("version", ["1", None])
def test_columns_that_came_later_are_missing_in_an_older_part(tmp_path, version):
    part = read_part(rewritten(tmp_path / "part", version, drop=NEW), "updates")
    assert part.schema == schema("updates")
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)
    assert part["losses"].to_pylist() == [row["losses"] for row in rows(steps=3)]


def test_a_column_that_others_added_is_not_taken_for_one_that_came_later(tmp_path):
    part = read_part(rewritten(tmp_path / "part", "1"), "updates")
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)


@pytest.mark.parametrize("version", ["2", None])
@pytest.mark.parametrize("column", ["slope", "gradient_distances", "losses"])
def test_a_part_without_a_column_of_its_version_is_refused(tmp_path, version, column):
    with pytest.raises(UserError, match=f"no part of the table updates: it has no column {column}"):
        read_part(rewritten(tmp_path / "part", version, drop=[column]), "updates")


def test_a_part_that_has_lost_its_version_is_read_whole(tmp_path):
    part = read_part(rewritten(tmp_path / "part", None), "updates")
    assert part["slope"].to_pylist() == [row["slope"] for row in rows(steps=3)]


def test_another_table_is_refused(tmp_path):
    write(tmp_path / "part", rows(steps=1))
    with pytest.raises(UserError, match="no part of the table epochs: it has no column train_loss"):
        read_part(tmp_path / "part", "epochs")


def test_columns_that_others_added_are_left_out(tmp_path):
    part = to_arrow(rows(steps=1), "updates")
    pq.write_table(part.append_column("note", pa.array(["mine"])), tmp_path / "part")
    assert read_part(tmp_path / "part", "updates").schema == schema("updates")
