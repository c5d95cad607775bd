import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from command_line import check_usage_error
from landscape_cli.main import main

from landscape import read_traces
from landscape.traces.folder import TraceFolder

NETS = """
import torch
from torch import nn

def regression():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

def three():
    return nn.Linear(6, 3)

def nothing():
    return nn.ReLU()

def broken():
    raise KeyError("weights")

def text():
    return "model"

instance = three()

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(20, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(4)

    def forward(self, tokens):
        return self.last(self.norm(self.embed(tokens).flatten(1)))

def tokens():
    x = torch.randint(20, (128, 5))
    return {"x_train": x, "y_train": x.sum(1) % 4}

def three_parts():
    return 1, 2, 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with modules and files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("nets", "my_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "empty.py").write_text("import landscape_has_no_such_module\n")
    (tmp_path / "syntax.py").write_text("def build(:\n")
    random = np.random.default_rng(0)
    x = random.normal(size=(160, 6))
    parts = {"x_train": x[:128], "x_test": x[128:]}
    np.savez("numbers.npz", **parts, y_train=x[:128, 0], y_test=x[128:, 0])
    np.savez("labels.npz", x_train=x, y_train=np.arange(160) % 7)
    np.savez("negative.npz", x_train=x, y_train=np.arange(160) % 3 - 1)
    np.savez("lengths.npz", x_train=x, y_train=x[:3, 0])
    np.savez("keys.npz", x=x, y=x)
    np.savez("objects.npz", x_train=np.array([{}, 1], dtype=object), y_train=x)
    np.savez("nan.npz", x_train=np.where(x == x[7, 1], np.nan, x), y_train=x[:, 0])
    Path("text.npz").write_text("no zip file")
    return tmp_path


def probe(arguments):
    return CliRunner().invoke(main, ["probe", *shlex.split(arguments), "--epochs", "1", "--device", "cpu"])


def test_init_writes_a_file_that_trains(folder):
    written = CliRunner().invoke(main, ["init"])
    assert written.exit_code == 0, written.output
    command = shlex.split(written.output.splitlines()[-1])
    assert command[:2] == ["landscape", "probe"]
    result = CliRunner().invoke(main, [*command[1:], "--epochs", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.output.count("1 BatchNorm of my_model:build converted") == 3
    assert set(read_traces("traces").run) == {f"my_model-{norm}-seed0" for norm in ("batch", "ghost16", "none")}
    before = Path("my_model.py").read_bytes()
    check_usage_error(CliRunner().invoke(main, ["init"]), "my_model.py: exists")
    check_usage_error(CliRunner().invoke(main, ["init", "my-model.txt"]), "Python module")
    assert Path("my_model.py").read_bytes() == before


def test_regression_with_adam_along_its_update(folder):
    options = "--model nets:regression --data numbers.npz --loss mse --optimizer adam --direction update"
    result = probe(f"{options} --format json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["run"] == "nets-regression-unchanged-seed0"
    assert row["test_loss"] > 0
    assert "test_accuracy" not in row
    assert "accuracy" not in result.stderr
    facts = TraceFolder(folder / "traces/nets-regression-unchanged-seed0").metadata()
    wanted = {"optimizer": "Adam", "direction": "update", "criterion": "MSELoss()", "loss": "mse", "base_lr": 0.001}
    assert {name: facts[name] for name in wanted} == wanted
    other = probe(f"{options.replace('adam', 'sgd')} --name other")
    assert other.exit_code == 0, other.output
    result = CliRunner().invoke(main, ["summarize", "traces", "--by", "band", "--format", "csv"])
    assert len(result.output.splitlines()) == 3, "two optimizers are two bands"


def test_tokens_for_an_embedding(folder):
    result = probe("--model nets:Tokens --data nets:tokens --norm ghost --groups 4 --precision float64")
    assert result.exit_code == 0, result.output
    assert "no test set" in result.output


def test_own_model_on_data_of_a_recipe_and_reverse(folder):
    Path("wide.py").write_text("from torch import nn\nbuild = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    result = probe("--recipe digits --model wide:build --train-samples 256 --norm unchanged")
    assert result.exit_code == 0, result.output
    assert "digits-wide-unchanged-seed0" in result.output
    reverse = probe("--data labels.npz --norm batch")
    assert reverse.exit_code == 0, reverse.output
    assert set(read_traces("traces/labels-batch-seed0").model) == {"simplenet"}


def test_resume_refuses_other_data(folder):
    options = "--model nets:regression --data numbers.npz --loss mse --epochs 2"
    assert probe(options).exit_code == 0
    run = folder / "traces/nets-regression-unchanged-seed0"
    for path in run.glob("epochs-*"):
        path.unlink()
    np.savez("numbers.npz", x_train=np.ones((128, 6)), y_train=np.ones(128))
    check_usage_error(probe(f"{options} --resume"), "other samples")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nowhere:build --data numbers.npz --loss mse", "no module nowhere"),
        (
            "--model empty:build --data numbers.npz --loss mse",
            r"ModuleNotFoundError: .*landscape_has_no_such_module.*empty\.py, line 1",
        ),
        ("--model nets:missing --data numbers.npz --loss mse", "no 'missing'"),
        ("--model nets: --data numbers.npz --loss mse", "package.module:function"),
        ("--model nets.py --data numbers.npz --loss mse", "my_model:build"),
        ("--model nets:broken --data numbers.npz --loss mse", r"KeyError: 'weights' \(nets\.py, line 15\)"),
        ("--model nets:text --data numbers.npz --loss mse", "torch.nn.Module, got str"),
        ("--model nets:instance --data numbers.npz --loss mse", "function or a class, got Linear"),
        ("--model nets:nothing --data numbers.npz --loss mse", "no parameters to train"),
        ("--model nets:three --data numbers.npz --loss mse", r"\(64, 3\).*\(64,\)"),
        ("--model nets:three --data numbers.npz", "y_train has floats"),
        ("--model nets:three --data labels.npz", "3 logits.*class 6"),
        ("--model nets:three --data labels.npz --norm ghost", "no BatchNorm"),
        ("--model nets:three --data labels.npz --batch-size 500", "at most the 160"),
        ("--model nets:three --data negative.npz", "class -1"),
        ("--model nets:three --data lengths.npz", "160 samples, y_train 3"),
        ("--model nets:three --data keys.npz", "lacks x_train and y_train, has x, y"),
        ("--model nets:three --data objects.npz", "Python objects"),
        ("--model nets:three --data nan.npz --loss mse", "1 of 160 samples, the first is 7"),
        ("--model nets:three --data text.npz", "no readable .npz"),
        ("--model nets:three --data absent.npz", "no such file"),
        ("--model nets:three --data nets:three_parts", "tuple of 3"),
        ("--recipe cifar10-small --data labels.npz --model nets:three --train-samples 128", "requires images"),
        ("--model resnet20 --data labels.npz", r"samples of shape \(6,\)"),
        ("--data labels.csv", r"labels\.csv.*data\.npz, .*my_data:load"),
        ("--model syntax:build --data labels.npz", r"SyntaxError: [^(]*\(syntax\.py, line 1\)"),
        ("--norm unchanged", "requires a model of your own"),
        ("--optimizer adam --momentum 0.9", "requires optimizer='SGD'"),
    ],
)
def test_mistake_is_one_line(folder, arguments, message):
    result = probe(arguments)
    check_usage_error(result, "Error: ")
    assert re.search(message, result.output), result.output
    assert not (folder / "traces").exists()


def test_recipes_and_norms_have_a_line_each():
    from landscape.names import NORMS
    from landscape.training.presets import RECIPES

    for command, names in (("recipes", RECIPES), ("norms", NORMS)):
        lines = CliRunner().invoke(main, [command]).output.splitlines()[1:]
        assert [line.split()[0] for line in lines] == [*names]
