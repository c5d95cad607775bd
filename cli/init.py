"""``landscape init``: a starting file for a model of your own."""

from pathlib import Path

import click

from landscape.errors import LandscapeError

from .output import echo, report
from .params import Command, LocalPath

STARTING_FILE = '''"""A model and data of my own, for `landscape probe`."""

import torch
from torch import nn


def build():
    """Return a new model; it is called without arguments, after the seed is set."""
    return nn.Sequential(
        nn.Linear(20, 64),
        nn.BatchNorm1d(64),  # --norm replaces nn.BatchNorm1d, 2d and 3d. Omit --norm to keep them.
        nn.ReLU(),
        nn.Linear(64, 3),  # a score per class; for a regression, the numbers to predict (--loss mse)
    )


def load():
    """Return x_train, y_train, x_test, y_test: tensors or arrays; the test set may be omitted.

    Inputs are floats, or integers for an embedding. Targets are classes 0, 1, ... as integers, or floats for --loss
    mse. Nothing is normalized for you. The random numbers are the same in each run.
    """
    x = torch.randn(1200, 20)
    y = (x[:, :3] + x[:, 3:6] * x[:, 6:9]).argmax(1)  # replace these two lines by your data
    return x[:1000], y[:1000], x[1000:], y[1000:]
'''


@click.command("init", cls=Command)
@click.argument("file", type=LocalPath(), default=Path("my_model.py"))
def command(file: Path) -> None:
    """Write a commented file with a model and data.

    FILE is my_model.py by default; a file that exists is kept. The command that trains it is printed.
    """
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise LandscapeError(f"{file}: must be the name of a Python module, such as my_model.py.")
    try:
        with file.open("x") as text:
            text.write(STARTING_FILE)
    except FileExistsError as error:
        raise LandscapeError(f"{file}: exists, and is kept. Use another name.") from error
    name = file.stem
    report(f"Written: {file}. Train it as it is, and with two other norms, then draw the landscapes:")
    folder = f"cd {file.parent} && " if file.parent != Path() else ""
    echo(f"{folder}landscape probe --model {name}:build --data {name}:load --norm batch --norm ghost --norm none")
