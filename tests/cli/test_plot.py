import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from landscape_cli.main import main
from landscape_cli.plot import command
from recordings import rows

from landscape.names import MEASURES
from landscape.plotting.landscape import LAYOUTS, SCALES, X_LABELS
from landscape.traces.writer import TraceWriter

FIRST_FORMAT = str(Path(__file__).parents[1] / "traces" / "version1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Current directory with the traces of two norms and two seeds in ``traces``."""
    monkeypatch.chdir(tmp_path)
    for norm, width in (("none", 2.0), ("ghost", 0.2)):
        for seed in (0, 1):
            with TraceWriter(f"traces/{norm}-{seed}", {"norm": norm, "groups": 16, "seed": seed}) as trace:
                for row in rows(width=width, seed=seed):
                    trace.append(row)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["plot", *arguments])


def test_plot_default(folder):
    result = run("traces")
    assert result.exit_code == 0, result.output
    assert (folder / "landscape.png").read_bytes().startswith(b"\x89PNG")
    lines = result.output.splitlines()
    assert lines[0].split()[-2:] == ["median_range", "mean_range"]
    assert lines[1].startswith("No normalization")
    assert lines[2].startswith("GhostNorm (G=16)")
    assert lines[-1] == "Figure: landscape.png"


def test_plot_options(folder):
    options = ["--out", "figures/a.svg", "--x", "epoch", "--scale", "linear", "--layout", "multiples"]
    result = run("traces/none-0", "traces/ghost-1", *options)
    assert result.exit_code == 0, result.output
    assert "\nmean range " in result.output
    drawn = (folder / "figures" / "a.svg").read_text()
    assert "<!-- epoch -->" in drawn
    assert "<!-- update -->" not in drawn


def test_plot_measures(folder):
    result = run("traces", "--measure", "loss", "--measure", "beta", "--measure", "beta", "--out", "a.svg")
    assert result.exit_code == 0, result.output
    tables = [line.split()[-1] for line in result.output.splitlines() if line.split()[:1] == ["updates"]]
    assert tables == ["mean_range", "mean_beta"]
    drawn = (folder / "a.svg").read_text()
    assert "<!-- loss (heights are ratios) -->" in drawn
    assert "<!-- effective β-smoothness" in drawn


def test_plot_measure_by_epoch(folder):
    result = run("traces", "--measure", "gap", "--x", "epoch")
    assert result.exit_code == 0, result.output
    assert "\nmean gap " in result.output


def diverging(folder, run, lost):
    """Add a run whose losses are not finite at some steps."""
    with TraceWriter(folder / "traces" / run, {"norm": "batch", "seed": 0}) as trace:
        for row in rows():
            trace.append({**row, "losses": [float("nan")] * 3} if row["step"] in lost else row)


def test_plot_tables_count_non_finite(folder):
    assert "first_not_finite" not in run("traces").output
    diverging(folder, "batch-0", range(12, 40))
    result = run("traces", "--x", "epoch")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    batch = dict(zip(lines[0], lines[2][1:], strict=True))
    assert [batch[name] for name in ("updates", "not_finite", "first_not_finite")] == ["40", "28", "12"]
    counts = lines.index(["not", "finite", "No", "normalization", "BatchNorm", "GhostNorm", "(G=16)"])
    assert [line[1:] for line in lines[counts + 2 : counts + 6]] == [
        ["0", number, "0"] for number in ("0", "8", "10", "10")
    ]


def test_plot_warns_of_damaged_part(folder):
    diverging(folder, "batch-0", ())
    (folder / "traces" / "batch-0" / "updates-000000040.parquet").write_bytes(b"PAR1")
    result = run("traces", "--out", "a.svg")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("updates-000000040.parquet") == 1
    assert "UserWarning" not in result.stderr
    assert "<!-- " in (folder / "a.svg").read_text()


def test_help_lists_measures():
    shown = run("--help").output
    assert not [name for name in MEASURES if f"\n  {name} " not in shown]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["empty"], "empty"),
        (["traces", "--out", "figure.jpg"], "ends in .png, .svg, .pdf"),
        (["traces", "--out", "traces/none-0/run.json/figure.png"], "cannot be written"),
        (["traces", "--x", "time"], "'time' is not one of"),
        (["traces", "--measure", "width"], "'width' is not one of"),
        ([FIRST_FORMAT, "--measure", "gap"], "requires slope"),
        ([FIRST_FORMAT, "--measure", "loss", "--measure", "beta"], "Record with `landscape probe --gradients`"),
        (["corrupt"], "updates-000000000.parquet"),
        ([], "Missing argument"),
    ],
)
def test_usage_error_is_one_line(folder, arguments, message):
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    (folder / "corrupt" / "updates-000000000.parquet").write_bytes(b"PAR1")
    before = set(folder.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in result.output.splitlines()[-1]
    assert set(folder.rglob("*")) == before


def test_choices_are_those_of_the_library():
    choices = {option.name: option.type.choices for option in command.params if isinstance(option.type, click.Choice)}
    expected = {"measures": MEASURES, "x": X_LABELS, "scale": SCALES, "layout": LAYOUTS}
    assert choices == {name: type(choices[name])(values) for name, values in expected.items()}


def test_plot_never_imports_torch(folder):
    program = (
        "import sys; from landscape_cli.main import main; main(['plot', 'traces'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)


def test_plot_warns_of_rates_beyond_the_step_sizes(folder):
    with TraceWriter(folder / "traces" / "batch-0", {"norm": "batch", "seed": 0}) as trace:
        for row in rows():
            trace.append({**row, "lr": 10.0})
    result = run("traces", "--out", "a.svg")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("Warning: ") and "learning rate" in line]
    assert "Warning" not in run("traces", "--measure", "beta", "--out", "a.svg").stderr
