from click.testing import CliRunner
from landscape_cli.main import main
from recordings import rows

from landscape.traces.writer import TraceWriter


def watched(*arguments, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["watch", *map(str, arguments)])


def record(folder, steps=10):
    trace = TraceWriter(folder, {"norm": "ghost"}, flush_rows=4)
    for row in rows(steps=steps):
        trace.append(row)
    return trace


def test_finished_runs_are_printed_and_it_ends(tmp_path):
    for name in ("a", "b"):
        record(tmp_path / name).close()
    result = watched(tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[:3] for line in lines] == [["a", "step", "9"], ["b", "step", "9"]]
    assert all(len(line) <= 80 and "▁" in line and "█" in line for line in lines)


def test_running_run_is_read_while_it_is_written(tmp_path):
    trace = record(tmp_path / "a")
    result = watched(tmp_path, "--text", "--once")
    assert (result.exit_code, result.output.split()[:3]) == (0, ["a", "step", "7"]), result.output
    assert result.stderr == ""
    trace.close()


def test_run_without_rows(tmp_path):
    with TraceWriter(tmp_path / "a", {}):
        result = watched(tmp_path, "--text", "--once")
    assert (result.exit_code, result.output) == (0, "1 runs, no rows yet\n")


def test_absent_folder_is_one_line(tmp_path):
    result = watched(tmp_path / "nothing")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
