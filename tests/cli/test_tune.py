import signal
import subprocess
import sys

import pandas as pd
import pytest
from click.testing import CliRunner
from landscape_cli.main import main
from real_data import REAL_DATA

SHORT = ["--epochs=1", "--norm=batch", "--norm=seq", "--groups=2", "--groups=128", "--channel-groups=4"]


def run(*arguments, cwd, monkeypatch, command="tune"):
    monkeypatch.chdir(cwd)
    return CliRunner().invoke(main, [command, *arguments])


def test_a_table_is_printed_and_written(tmp_path, monkeypatch):
    result = run(*SHORT, cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("Left out: SeqNorm (G_C=4, G_M=128): groups=128 on a batch of 128")
    assert lines[1] == "6 trainings to choose by, then 4 on the whole training set for the test accuracy."
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


def test_a_plan_trains_and_writes_nothing(tmp_path, monkeypatch):
    result = run(*SHORT, "--plan", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2:5] == ["  BatchNorm, 2 seeds", "  GhostNorm (G=2), 2 seeds", "  SeqNorm (G_C=4, G_M=2), 2 seeds"]
    assert "Told from a few updates on this device, a training takes 0." in lines[-1]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_trained_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "landscape_cli", "tune", *SHORT, "--epochs=4"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = [process.stdout.readline() for _ in range(4)][2:]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[0] == (
        "Interrupted. What has been trained is kept; the same command goes on from there."
    )
    assert "Traceback" not in errors
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    seeds = [line for line in [*first, *rest.splitlines(), *again.stdout.splitlines()] if ", seed " in line]
    assert len(seeds) == 10
    assert not {line.strip() for line in first} & set(again.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--norm bath", "norm='bath': unknown norm"),
        ("--recipe digits", "'digits' is not one of"),
        ("--norm ghost --groups 300", "groups=300 on a batch of 128 samples"),
        ("--runs 0", "runs=0: must be"),
        ("--epochs 0", "epochs=0 is out of range"),
        ("--tolerance 2", "tolerance=2.0: must be"),
        ("--norm batch --jobs 0", "jobs=0: must be"),
        ("--norm batch --storage here.db", "storage='here.db': must be"),
        ("--device abacus", "device 'abacus' cannot be used"),
        ("--norm batch --out file.txt/here", "file.txt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file.txt").write_text("kept")
    result = run(*arguments.split(), cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.strip().splitlines()[-1].startswith("Error: ")


def test_without_optuna_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['optuna'] = None; from landscape_cli.main import main; main(['tune', '--norm=batch'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "pip install 'landscape-probe[tune]'" in answer.stderr


@pytest.mark.parametrize("command", ["tune", "table"])
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from landscape_cli.main import main
try:
    main(["{command}", "--help"])
finally:
    print([name for name in ("torch", "pandas", "numpy", "optuna", "sqlalchemy") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_table_of_the_paper_is_planned(tmp_path, monkeypatch):
    if not (REAL_DATA / "mnist").is_dir():
        pytest.skip(f"no folder mnist in {REAL_DATA}: name its parent in LANDSCAPE_DATA_DIR")
    result = run(
        "1",
        "--scale",
        "small",
        "--plan",
        "--data-dir",
        str(REAL_DATA),
        cwd=tmp_path,
        monkeypatch=monkeypatch,
        command="table",
    )
    assert result.exit_code == 0, result.output
    assert "18 trainings to choose by, then 8 on the whole training set" in result.output
    assert not list(tmp_path.iterdir())
