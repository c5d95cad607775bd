import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from landscape_cli import main
from traces import rows

from landscape.trace import TraceWriter


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current directory with the traces of two norms and two seeds in ``traces``."""
    monkeypatch.chdir(tmp_path)
    for norm, width in (("none", 2.0), ("ghost", 0.2)):
        for seed in (0, 1):
            with TraceWriter(f"traces/{norm}-{seed}", {"norm": norm, "groups": 16, "seed": seed}) as trace:
                for row in rows(width=width, seed=seed):
                    trace.append(row)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["plot", *arguments])


def test_a_picture_and_the_ranges(folder):
    result = run("traces")
    assert result.exit_code == 0, result.output
    assert (folder / "landscape.png").read_bytes().startswith(b"\x89PNG")
    lines = result.output.splitlines()
    assert lines[0].split()[:3] == ["updates", "not_finite", "mean_range"]
    assert lines[1].startswith("No normalization")
    assert lines[2].startswith("GhostNorm (G=16)")
    assert lines[-1] == "Figure: landscape.png"


def test_options_reach_the_figure(folder):
    options = ["--out", "figures/a.svg", "--x", "epoch", "--scale", "linear", "--layout", "multiples"]
    result = run("traces/none-0", "traces/ghost-1", *options)
    assert result.exit_code == 0, result.output
    assert "\nmean range " in result.output
    drawn = (folder / "figures" / "a.svg").read_text()
    assert "<!-- epoch -->" in drawn
    assert "<!-- update -->" not in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no missing"),
        (["empty"], "No updates are recorded in empty"),
        (["traces", "--out", "figure.jpg"], "ends in .png, .svg, .pdf"),
        (["traces", "--out", "traces/none-0/run.json/figure.png"], "cannot be written"),
        (["traces", "--x", "time"], "x is 'time'; it can be step, epoch"),
        (["corrupt"], "updates-000000000.parquet cannot be read as Parquet"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_no_file(folder, arguments, message):
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    (folder / "corrupt" / "updates-000000000.parquet").write_bytes(b"PAR1")
    before = set(folder.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in result.output.splitlines()[-1]
    assert set(folder.rglob("*")) == before


def test_torch_is_never_imported(folder):
    program = (
        "import sys; from landscape_cli import main; main(['plot', 'traces'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
