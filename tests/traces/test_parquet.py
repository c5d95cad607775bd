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


def test_part_is_read_by_pandas(tmp_path):
    write(tmp_path / "updates-000000000.parquet", rows(steps=3))
    frame = pd.read_parquet(tmp_path / "updates-000000000.parquet")
    assert list(frame) == [column.name for column in UPDATES]
    assert list(frame["step"]) == [0, 1, 2]
    np.testing.assert_array_equal(frame["losses"][1], rows(steps=3)[1]["losses"])


def test_part_has_version_units_meanings(tmp_path):
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
def test_range_of_losses(losses, smallest, largest):
    row = to_arrow([{"step": 0, "losses": losses}], "updates").to_pylist()[0]
    np.testing.assert_array_equal([row["loss_min"], row["loss_max"]], [smallest, largest])
    np.testing.assert_array_equal(row["losses"], losses)


def test_range_of_row_is_kept():
    row = to_arrow([{"losses": [1.0, 2.0], "loss_min": 0.5, "loss_max": 4.0}], "updates").to_pylist()[0]
    assert (row["loss_min"], row["loss_max"]) == (0.5, 4.0)


def test_newer_format_is_refused(tmp_path):
    newer = to_arrow(rows(steps=1), "updates").replace_schema_metadata({"landscape_version": str(VERSION + 1)})
    pq.write_table(newer, tmp_path / "part")
    with pytest.raises(LandscapeError, match=f"format {VERSION + 1}.*up to {VERSION}"):
        read(tmp_path / "part")


def rewritten(path, version, drop=()):
    """Write a part without the columns ``drop``, with another format version or none."""
    part = to_arrow(rows(steps=3), "updates").drop_columns(list(drop))
    pq.write_table(part.replace_schema_metadata({"landscape_version": version} if version else {}), path)
    return path


NEW = [column.name for column in UPDATES if column.since > 1]


@pytest.mark.parametrize("version", ["1", None])
def test_older_part_lacks_newer_columns(tmp_path, version):
    part = read(rewritten(tmp_path / "part", version, drop=NEW))
    assert part.schema == schema("updates")
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)
    assert part["losses"].to_pylist() == [row["losses"] for row in rows(steps=3)]


def test_older_part_with_foreign_column(tmp_path):
    part = read(rewritten(tmp_path / "part", "1"))
    assert {name: part[name].null_count for name in NEW} == dict.fromkeys(NEW, 3)


@pytest.mark.parametrize("version", ["2", None])
@pytest.mark.parametrize("column", ["slope", "gradient_distances", "losses"])
def test_part_without_column_is_refused(tmp_path, version, column):
    with pytest.raises(LandscapeError, match=f"part.*updates.*no column {column}"):
        read(rewritten(tmp_path / "part", version, drop=[column]))


def test_part_without_version(tmp_path):
    part = read(rewritten(tmp_path / "part", None))
    assert part["slope"].to_pylist() == [row["slope"] for row in rows(steps=3)]


def test_other_table_is_refused(tmp_path):
    write(tmp_path / "part", rows(steps=1))
    with pytest.raises(LandscapeError, match=r"part.*epochs.*no column train_loss"):
        read(tmp_path / "part", "epochs")


def test_foreign_columns_are_left_out(tmp_path):
    part = to_arrow(rows(steps=1), "updates")
    pq.write_table(part.append_column("note", pa.array(["mine"])), tmp_path / "part")
    assert read(tmp_path / "part").schema == schema("updates")


def test_part_of_other_run_is_refused(tmp_path):
    write(tmp_path / "part", rows(steps=2), run="a")
    assert read(tmp_path / "part", run="a").num_rows == 2
    assert read(tmp_path / "part").num_rows == 2
    with pytest.raises(LandscapeError, match="belongs to another run"):
        read(tmp_path / "part", run="b")


@pytest.mark.parametrize("changed", [{b"landscape_version": b"1"}, {b"landscape_run": b"b"}, None])
def test_changed_metadata_or_rows_are_refused(tmp_path, changed):
    """The checksums of pages cover neither the format version nor the number of rows."""
    path = tmp_path / "part"
    write(path, rows(steps=3), run="a")
    part = pq.read_table(path)
    rewritten = part.replace_schema_metadata(part.schema.metadata | changed) if changed else part.slice(0, 2)
    pq.write_table(rewritten, path)
    with pytest.raises(LandscapeError, match=r"part: was changed.*checksum"):
        read(path)


def test_flipped_bits_change_no_value(tmp_path):
    """A part with a flipped bit is refused, or read as it was."""
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


@pytest.mark.parametrize(
    ("step_sizes", "band"), [([-1.0, 1.0, 2.0], (1.0, 2.0)), ([-1.0, -2.0, -3.0], (1.0, 5.0)), (None, (1.0, 5.0))]
)
def test_band_of_descent(step_sizes, band):
    part = to_arrow([{"step": 0, "step_sizes": step_sizes, "losses": [5.0, 1.0, 2.0]}], "updates")
    assert (part["loss_min"][0].as_py(), part["loss_max"][0].as_py()) == band
