import re
import shlex
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from landscape_cli.main import main
from landscape_cli.signals import SIGNALS, SignalGuard

from landscape import RECIPES, read_traces
from landscape.errors import TrainingInterrupted
from landscape.names import NORMS
from landscape.training.recipe import GHOST_BY


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
    options = (
        "--norm ghost --norm batch --norm seq --groups 8 --groups 16 --channel-groups 4 --seed 1 --seed 2 --epochs 1"
    )
    options += " --batch-size 256 --lr 0.1 --probe-lrs 0.05,0.1 --every 2 --out here"
    assert run(*options.split(), cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0
    frame = read_traces(tmp_path / "here")
    assert set(frame.run) == {
        f"digits-{norm}-seed{seed}" for norm in ("ghost8", "ghost16", "batch", "seq4-8", "seq4-16") for seed in (1, 2)
    }
    assert list(frame.step_sizes[0]) == [0.05, 0.1]
    assert set(frame.lr) == {0.1}
    assert set(frame.batch_size) == {256}
    assert set(frame.step) == {0, 2, 4}


def test_a_recorded_run_stops_before_any_training(tmp_path, monkeypatch):
    first = ["--norm", "batch", "--epochs", "1"]
    assert run(*first, cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0
    again = run("--norm", "none", *first, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.exit_code == 2
    assert again.output.splitlines() == [
        "Error: Recorded already: traces/digits-batch-seed0. Give another --out, --resume to go on with what came to "
        "no end, or --overwrite to replace."
    ]
    assert not (tmp_path / "traces/digits-none-seed0").exists()
    assert run(*first, "--overwrite", cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0


def test_resuming_trains_what_is_left(tmp_path, monkeypatch):
    common = ["--norm", "batch", "--epochs", "1", "--resume"]
    first = run(*common, cwd=tmp_path, monkeypatch=monkeypatch)
    assert first.exit_code == 0, first.output
    before = (tmp_path / "traces/digits-batch-seed0/run.json").read_bytes()
    again = run("--norm", "none", *common, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.exit_code == 0, again.output
    lines = again.output.splitlines()
    assert lines[0] == f"{first.output.splitlines()[0]} (recorded before)"
    assert lines[1].startswith("traces/digits-none-seed0: mean range ")
    assert (tmp_path / "traces/digits-batch-seed0/run.json").read_bytes() == before
    other = run(*common, "--lr", "0.1", cwd=tmp_path, monkeypatch=monkeypatch)
    assert other.exit_code == 2
    assert "was recorded with lr=0.4, and asked for is lr=0.1; give another folder" in other.output


def test_a_signal_waits_for_the_update_and_a_second_one_does_not():
    came = []
    before = [signal.signal(number, lambda *told: came.append(told[0])) for number in SIGNALS]
    try:
        with SignalGuard() as interruptions:
            signal.raise_signal(signal.SIGTERM)
            interruptions.between_updates(1)
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            assert came == [signal.SIGTERM, signal.SIGTERM]
            with pytest.raises(TrainingInterrupted, match="SIGINT"):
                interruptions.between_updates(2)
            assert (interruptions.signal, interruptions.step) == (signal.SIGINT, 2)
        with SignalGuard() as interruptions:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            interruptions.between_updates(1)
            signal.raise_signal(signal.SIGINT)
            interruptions.between_updates(2)
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM] * 3
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--norm bath", "norm='bath': unknown norm"),
        ("--recipe cifar", "Unknown recipe 'cifar'; choose one of mnist, digits"),
        ("--norm ghost --groups 300", "groups=300 on a batch of 128 samples"),
        ("--norm group --channel-groups 0", "channel_groups=0"),
        ("--probe-lrs 0.1,x", "'0.1,x' is not a list of numbers"),
        ("--probe-lrs nan", "one finite number or more"),
        ("--epochs 0", "epochs=0 is out of range"),
        ("--batch-size 5000", "more than the 1500 training samples"),
        ("--lr -1", "lr=-1.0 is out of range"),
        ("--norm batch --batch-size 1", "norm 'batch' does not take batches of 1"),
        ("--norm none --norm ghost --groups 128", "single value per channel"),
        ("--norm batch --groups 8", "none of the norms batch takes it"),
        ("--norm ghost --groups 0", "groups=0 is out of range"),
        ("--seed 99999999999999999999", "seed=99999999999999999999 is out of range"),
        ("--device meta", "device 'meta' cannot be used"),
        ("--device abacus", "device 'abacus' cannot be used"),
        ("--recipe mnist --data-dir nowhere/mnist.txt", "mnist"),
        ("--out file.txt", "file.txt"),
        ("--resume --overwrite", "resume goes on with a run, and overwrite starts it anew: choose one of them"),
        ("--checkpoint-seconds -1", "checkpoint_seconds=-1.0 is out of range; give seconds from 0 on"),
        ("--checkpoint-seconds nan", "checkpoint_seconds=nan is out of range"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "nowhere").write_text("a file where a folder is asked for")
    result = run(*arguments.split(), cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
    assert (tmp_path / "file.txt").read_text() == "kept"
    assert not (tmp_path / "traces").exists()


def test_help_names_what_can_be_asked_for(tmp_path, monkeypatch):
    result = run("--help", cwd=tmp_path, monkeypatch=monkeypatch)
    unwrapped = re.sub(r"-\n\s+", "-", result.output)
    words = re.split(r"[\s,.]+", unwrapped)
    assert not {*NORMS, *RECIPES} - {*words}


def test_the_three_implementations_of_ghost_norm_are_one_command(tmp_path):
    """In a process of its own: `ranks` starts others, which are told by the command line what to train."""
    ways = [word for way in GHOST_BY for word in ("--ghost-by", way)]
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
