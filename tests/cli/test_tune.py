import re
import signal
import subprocess
import sys

import pandas as pd
import pytest
from click.testing import CliRunner
from command_line import check_usage_error
from landscape_cli.main import main
from processes import PATIENCE, landscape
from real_data import REAL_DATA

SHORT = ["--epochs=1", "--norm=batch", "--norm=seq", "--groups=2", "--groups=128", "--channel-groups=4"]


def run(*arguments, cwd, monkeypatch, command="tune"):
    monkeypatch.chdir(cwd)
    return CliRunner().invoke(main, [command, *arguments])


def test_tune_prints_and_writes_table(tmp_path, monkeypatch):
    result = run(*SHORT, cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("Left out: SeqNorm (G_C=4, G_M=128): groups=128 on a batch of 128")
    assert lines[1] == "6 trainings to select groups, then 4 on the whole training set for the test accuracy."
    assert [line.split(":")[0] for line in lines[2:12]] == [
        f"{name}, seed {seed}"
        for name in ("BatchNorm", "GhostNorm (G=2)", "SeqNorm (G_C=4, G_M=2)", "BatchNorm", "SeqNorm (G_C=4, G_M=2)")
        for seed in (0, 1)
    ]
    text = (tmp_path / "tuning/table.md").read_text()
    assert text in result.output
    assert "Left out: SeqNorm (G_C=4, G_M=128): " in text
    table = pd.read_parquet(tmp_path / "tuning/table.parquet")
    assert list(table.configuration) == ["BatchNorm", "SeqNorm (G_C=4, G_M=2)"]
    assert len(pd.read_parquet(tmp_path / "tuning/trials.parquet")) == 10
    again = run(*SHORT, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.exit_code == 0
    assert "seed 0:" not in again.output
    assert (tmp_path / "tuning/table.md").read_text() == text


def test_plan_writes_nothing(tmp_path, monkeypatch):
    result = run(*SHORT, "--plan", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2:5] == ["  BatchNorm, 2 seeds", "  GhostNorm (G=2), 2 seeds", "  SeqNorm (G_C=4, G_M=2), 2 seeds"]
    assert re.search("Estimated time .* per training, .* in sequence", lines[-1])
    assert not list(tmp_path.iterdir())


def test_tune_continues_after_sigint(tmp_path):
    command = ["tune", *SHORT, "--epochs=4"]
    process = landscape(*command, cwd=tmp_path)
    first = [process.stdout.readline() for _ in range(4)][2:]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.match("Interrupted.*same command", errors.splitlines()[0])
    assert "Traceback" not in errors
    again, errors = landscape(*command, cwd=tmp_path).communicate(timeout=PATIENCE)
    seeds = [line for line in [*first, *rest.splitlines(), *again.splitlines()] if ", seed " in line]
    assert len(seeds) == 10, errors
    assert not {line.strip() for line in first} & set(again.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--norm bath", "'bath' is not one of"),
        ("--recipe digits", "'digits' is not one of"),
        ("--norm ghost --groups 300", "groups=300 on a batch of 128 samples"),
        ("--runs 0", "runs=0: must be"),
        ("--epochs 0", "epochs=0: must be"),
        ("--tolerance 2", "tolerance=2.0: must be"),
        ("--norm batch --jobs 0", "jobs=0: must be"),
        ("--norm batch --storage here.db", "storage='here.db': must be"),
        ("--device abacus", "device='abacus'"),
        ("--norm batch --out file.txt/here", "file.txt"),
    ],
)
def test_usage_error_is_one_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file.txt").write_text("kept")
    result = run(*arguments.split(), cwd=tmp_path, monkeypatch=monkeypatch)
    check_usage_error(result, message)


def test_missing_optuna_names_extra(tmp_path):
    code = (
        "import sys; sys.modules['optuna'] = None; from landscape_cli.main import main; main(['tune', '--norm=batch'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "pip install 'landscape-probe[tune]'" in answer.stderr


def test_table_plan(tmp_path, monkeypatch):
    if not (REAL_DATA / "mnist").is_dir():
        pytest.skip(f"no folder mnist in {REAL_DATA}: name its parent in LANDSCAPE_DATA_DIR")
    arguments = ["1", "--scale", "small", "--plan", "--data-dir", str(REAL_DATA)]
    result = run(*arguments, cwd=tmp_path, monkeypatch=monkeypatch, command="table")
    assert result.exit_code == 0, result.output
    assert "45 trainings to select groups, then 12 on the whole training set" in result.output
    assert not list(tmp_path.iterdir())
