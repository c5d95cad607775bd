import pytest
from click.testing import CliRunner
from landscape_cli.main import main
from recordings import rows

from landscape.traces.writer import TraceWriter


def record(folder, facts, steps=10):
    with TraceWriter(folder, facts, flush_rows=4) as trace:
        for row in rows(steps=steps):
            trace.append(row)


def listed(*arguments):
    return CliRunner().invoke(main, ["list", *map(str, arguments)])


def test_list_columns(tmp_path):
    record(tmp_path / "a", {"norm": "ghost", "groups": 16, "seed": 1})
    record(tmp_path / "b", {"norm": "batch", "groups": None, "seed": 2}, steps=3)
    (tmp_path / "b" / "checkpoint.pt").write_bytes(b"")
    result = listed(tmp_path)
    assert result.exit_code == 0, result.output
    head, *lines = [line.split() for line in result.output.splitlines()]
    assert head == ["run", "updates", "norm", "groups", "seed", "started", "ended"]
    assert [line[:5] for line in lines] == [["a", "10", "ghost", "16", "1"], ["b", "3", "batch", "-", "2"]]
    assert (lines[0][-1] == "-", lines[1][-1] == "-") == (False, True)


def test_list_damaged_run(tmp_path):
    record(tmp_path / "a", {"norm": "ghost"})
    (tmp_path / "a" / "run.json").write_text("{")
    result = listed(tmp_path)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: ")
    assert len(result.stderr.splitlines()) == 1
    assert "run.json" in result.stderr


@pytest.mark.parametrize("path", ["nothing", "empty", "x://y"])
def test_usage_error_is_one_line(tmp_path, monkeypatch, path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = listed(path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert path in result.stderr
    assert len(result.stderr.splitlines()) == 1
