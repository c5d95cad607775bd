import re
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner
from landscape_cli import main

from landscape import RECIPES, read_traces
from landscape.recipes import GHOST_BY
from landscape.vocabulary import NORMS


def run(*arguments, cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    return CliRunner().invoke(main, ["probe", *arguments])


def test_defaults_are_the_papers_comparison(tmp_path, monkeypatch):
    result = run("--epochs", "1", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    frame = read_traces(tmp_path / "traces")
    assert list(frame.run.unique()) == ["digits-batch-seed0", "digits-ghost16-seed0", "digits-none-seed0"]
    assert result.output.count("mean range") == 3
    assert "landscape plot traces" in result.output


def test_every_combination_is_a_run_once(tmp_path, monkeypatch):
    settings = "--norm ghost --groups 2 --precision float64 --epochs 1 --probe-lrs 0.2,0.4 --every 3 --device cpu"
    command = [sys.executable, "-m", "landscape_cli", "probe", *shlex.split(settings), *ways, "--out", "three"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    frames = [read_traces(tmp_path / "three" / f"digits-ghost2{way}-seed0") for way in ("", "-accumulation", "-ranks")]
    assert list(frames[0].step) == [0, 3, 6, 9]
    assert [frame.ranks[0] for frame in frames] == [1, 1, 2]
    for frame in frames[1:]:
        for name in ("loss", "loss_min", "loss_max", "grad_norm", "slope"):
            assert list(frame[name]) == pytest.approx(list(frames[0][name]), rel=1e-9)
    lines = answer.stdout.splitlines()
    assert len({line.split(":")[1].split(";")[0] for line in lines[:3]}) == 1
    assert lines[3] == "Draw them: landscape plot three"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ghost-by", "ranks", "--norm", "batch"], "ghost_by is given, but none of the norms batch takes it"),
        (["--ghost-by", "magic"], "Unknown ghost_by 'magic'; choose one of layer, accumulation, ranks."),
        (["--precision", "fp8"], "Unknown precision 'fp8'"),
        (["--train-samples", "64"], "batch_size=128 is more than the 64 training samples"),
    ],
)
def test_mistakes_with_what_recipes_can_do_now(arguments, message, tmp_path, monkeypatch):
    result = run(*arguments, "--device", "cpu", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())
