import os

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


@pytest.mark.parametrize("named", [[], ["a"], ["a", "b"]])
def test_list_run_without_rows(tmp_path, named):
    record(tmp_path / "a", {"norm": "ghost", "seed": 1})
    with TraceWriter(tmp_path / "b", {"norm": "batch", "seed": 2}):
        result = listed(*[tmp_path / name for name in named] or [tmp_path])
        alone = listed(tmp_path / "b")
    assert (result.exit_code, alone.exit_code) == (0, 0), result.output
    lines = [line.split() for line in result.output.splitlines()[1:]]
    assert [line[:4] for line in lines] == [["a", "10", "ghost", "1"], ["b", "0", "batch", "2"]][: len(named) or 2]
    head, line = (line.split() for line in alone.output.splitlines())
    assert dict(zip(head, [*line[:2]], strict=False)) == {"run": "b", "updates": "0"}
    assert {"norm", "writer", "started", "ended"} <= {*head}
    assert line[-1] == "-"
    assert str(os.getpid()) in line


def test_list_file_that_is_no_run(tmp_path):
    (tmp_path / "run.json").write_text("[")
    result = listed(tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
