import re
import shlex
import signal
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner
from command_line import check_usage_error
from landscape_cli.main import main
from landscape_cli.runner import _arguments
from landscape_cli.signals import SIGNALS, SignalGuard
from processes import PATIENCE, landscape

from landscape import RECIPES, read_traces
from landscape.errors import TrainingInterrupted
from landscape.names import NORMS
from landscape.training.recipe import GHOST_BY
from landscape.training.target import TraceTarget


def run(*arguments, cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    return CliRunner().invoke(main, ["probe", *arguments])


def test_probe_defaults(tmp_path, monkeypatch):
    result = run("--epochs", "1", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    frame = read_traces(tmp_path / "traces")
    assert list(frame.run.unique()) == ["digits-batch-seed0", "digits-ghost16-seed0", "digits-none-seed0"]
    assert result.output.count("mean range") == 3
    assert "landscape plot traces" in result.output


def test_probe_trains_each_combination_once(tmp_path, monkeypatch):
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


def test_probe_keeps_existing_run(tmp_path, monkeypatch):
    first = ["--norm", "batch", "--epochs", "1"]
    assert run(*first, cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0
    again = run("--norm", "none", *first, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.exit_code == 2
    assert re.fullmatch("Error: .*exist.*traces/digits-batch-seed0.*--resume.*--overwrite.*\n", again.output)
    assert not (tmp_path / "traces/digits-none-seed0").exists()
    assert run(*first, "--overwrite", cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device abacus", "abacus"),
        ("--batch-size 5000", "batch_size=5000"),
        ("--norm ghost --groups 300", "groups=300"),
    ],
)
def test_existing_run_hides_no_mistake(tmp_path, monkeypatch, arguments, message):
    first = ["--norm", "batch", "--epochs", "1"]
    assert run(*first, cwd=tmp_path, monkeypatch=monkeypatch).exit_code == 0
    result = run(*first, *arguments.split(), cwd=tmp_path, monkeypatch=monkeypatch)
    check_usage_error(result, message)
    assert "exist" not in result.output


def test_share_that_pays_for_too_few_probes(tmp_path, monkeypatch):
    result = run("--norm", "batch", "--epochs", "3", "--overhead", "0.001%", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    assert re.match(r"Warning: .*digits-batch-seed0.*0\.001%.* 1 of 33 .*--overhead \d+% .* 30", result.stderr)
    enough = re.search(r"--overhead (\d+%) pays", result.stderr)[1]
    more = ["--norm", "batch", "--epochs", "3", "--overhead", f"{10 * int(enough[:-1])}%", "--overwrite"]
    again = run(*more, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.stderr == ""
    assert len(read_traces(tmp_path / "traces")) >= 30


def test_arguments_for_torchrun_are_read_back(tmp_path):
    recipe = replace(RECIPES["digits"], norm="ghost", groups=2, ghost_by="ranks").resolve()
    options = {
        "overhead": 0.07,
        "lr": 0.1,
        "step_sizes": (0.1, 0.2),
        "gradients": True,
        "critical": True,
        "epochs": None,
    }
    words = _arguments(recipe, TraceTarget(tmp_path, device="cpu", resume=True), options)
    context = main.get_command(click.Context(main), "probe").make_context("probe", words[1:])
    assert context.params["overhead"] == 0.07
    assert context.params["step_sizes"] == (0.1, 0.2)
    assert context.params["critical"]
    assert (context.params["gradients"], context.params["resume"], context.params["epochs"]) == (True, True, None)


def test_resume_trains_unfinished_runs(tmp_path, monkeypatch):
    common = ["--norm", "batch", "--epochs", "1", "--resume"]
    first = run(*common, cwd=tmp_path, monkeypatch=monkeypatch)
    assert first.exit_code == 0, first.output
    previous = (tmp_path / "traces/digits-batch-seed0/run.json").read_bytes()
    again = run("--norm", "none", *common, cwd=tmp_path, monkeypatch=monkeypatch)
    assert again.exit_code == 0, again.output
    lines = again.output.splitlines()
    assert lines[0] == f"{first.output.splitlines()[0]} (already recorded)"
    assert lines[1].startswith("traces/digits-none-seed0: mean range ")
    assert (tmp_path / "traces/digits-batch-seed0/run.json").read_bytes() == previous
    other = run(*common, "--lr", "0.1", cwd=tmp_path, monkeypatch=monkeypatch)
    assert other.exit_code == 2
    assert "lr=0.1: must be 0.4" in other.output


def test_signal_guard_defers_first_signal():
    received = []
    previous = [signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS]
    try:
        with SignalGuard() as guard:
            signal.raise_signal(signal.SIGTERM)
            guard.between_updates(1)
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM, signal.SIGTERM]
            with pytest.raises(TrainingInterrupted, match="SIGINT"):
                guard.between_updates(2)
            assert (guard.signal, guard.step) == (signal.SIGINT, 2)
        with SignalGuard() as guard:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            guard.between_updates(1)
            signal.raise_signal(signal.SIGINT)
            guard.between_updates(2)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 3
    finally:
        for number, handler in zip(SIGNALS, previous, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--norm bath", "'bath' is not one of"),
        ("--recipe cifar", "'cifar' is not one of 'mnist', 'digits'"),
        ("--norm ghost --groups 300", "groups=300 on a batch of 128 samples"),
        ("--norm group --channel-groups 0", "channel_groups=0"),
        ("--step-sizes 0.1,x", "'0.1,x': must be numbers"),
        ("--probe-lrs 0.1,x", "'--step-sizes': '0.1,x': must be numbers"),
        ("--step-sizes nan", "one finite number or more"),
        ("--overhead 0", "'0': must be a positive share"),
        ("--overhead 20", "20%"),
        ("--epochs 0", "epochs=0: must be"),
        ("--batch-size 5000", "batch_size=5000: must be at most the 1500"),
        ("--lr -1", "lr=-1.0: must be"),
        ("--norm batch --batch-size 1", "norm='batch': cannot normalize batches of 1 "),
        ("--norm none --norm ghost --groups 128", "single value per channel"),
        ("--norm batch --groups 8", "--groups: none of the norms batch has this option"),
        ("--norm ghost --groups 0", "groups=0: must be"),
        ("--seed 99999999999999999999", "seed=99999999999999999999: must be"),
        ("--device meta", "device='meta'"),
        ("--device abacus", "device='abacus'"),
        ("--recipe mnist --data-dir nowhere/mnist.txt", "mnist"),
        ("--out file.txt", "file.txt"),
        ("--resume --overwrite", "resume=True with overwrite=True: must not"),
        ("--checkpoint-seconds -1", "checkpoint_seconds=-1.0: must be"),
        ("--checkpoint-seconds nan", "checkpoint_seconds=nan: must be"),
    ],
)
def test_usage_error_is_one_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "nowhere").write_text("a file where a folder is asked for")
    result = run(*arguments.split(), cwd=tmp_path, monkeypatch=monkeypatch)
    check_usage_error(result, message)
    assert (tmp_path / "file.txt").read_text() == "kept"
    assert not (tmp_path / "traces").exists()


def test_help_lists_norms_and_recipes(tmp_path, monkeypatch):
    result = run("--help", cwd=tmp_path, monkeypatch=monkeypatch)
    unwrapped = re.sub(r"-\n\s+", "-", result.output)
    words = re.split(r"[\s,.]+", unwrapped)
    assert not {*NORMS, *RECIPES} - {*words}


@pytest.mark.multiprocess
def test_ghost_by_implementations_agree(tmp_path):
    """The command runs in a process, because ``ranks`` starts further ones."""
    ways = [word for way in GHOST_BY for word in ("--ghost-by", way)]
    settings = "--norm ghost --groups 2 --precision float64 --epochs 1 --step-sizes 0.2,0.4 --every 3 --device cpu"
    started = landscape("probe", *shlex.split(settings), *ways, "--out", "three", cwd=tmp_path)
    output, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode == 0, errors
    frames = [read_traces(tmp_path / "three" / f"digits-ghost2{way}-seed0") for way in ("", "-accumulation", "-ranks")]
    assert list(frames[0].step) == [0, 3, 6, 9]
    assert [frame.ranks[0] for frame in frames] == [1, 1, 2]
    for frame in frames[1:]:
        for name in ("loss", "loss_min", "loss_max", "grad_norm", "slope"):
            assert list(frame[name]) == pytest.approx(list(frames[0][name]), rel=1e-9)
    lines = output.splitlines()
    assert len({line.split(":")[1].split(";")[0] for line in lines[:3]}) == 1
    assert lines[3] == "Draw them: landscape plot three"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ghost-by", "ranks", "--norm", "batch"], "--ghost-by: none of the norms batch has this option"),
        (["--ghost-by", "magic"], "'magic' is not one of 'layer', 'accumulation', 'ranks'"),
        (["--precision", "fp8"], "'fp8' is not one of 'float32'"),
        (["--train-samples", "64"], "batch_size=128: must be at most the 64"),
    ],
)
def test_usage_error_writes_nothing(arguments, message, tmp_path, monkeypatch):
    result = run(*arguments, "--device", "cpu", cwd=tmp_path, monkeypatch=monkeypatch)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())
