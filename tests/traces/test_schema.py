import pytest

from landscape.traces.schema import TABLES, VERSION


@pytest.mark.parametrize("table", TABLES)
def test_columns_are_complete(table):
    names = [column.name for column in TABLES[table]]
    assert len(names) == len(set(names))
    for column in TABLES[table]:
        assert column.type in {"int64", "float64", "list<float64>"}
        assert column.since in range(1, VERSION + 1)
        assert column.unit
        assert column.meaning
