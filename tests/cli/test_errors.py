"""Every exception that is no bug of the package is one line."""

import errno
import os
import subprocess
import sys

import click
import matplotlib.units
import optuna
import pyarrow as pa
import pytest
import sqlalchemy.exc
import torch
from click.testing import CliRunner
from landscape_cli.errors import usage_error
from landscape_cli.main import main
from matplotlib.figure import Figure
from recordings import rows

from landscape.errors import LandscapeError
from landscape.text import short
from landscape.traces.writer import TraceWriter


def subclasses(*bases):
    return [each for base in bases for each in (base, *subclasses(*base.__subclasses__()))]


OF_ARROW = {
    each
    for each in vars(pa.lib).values()
    if isinstance(each, type) and issubclass(each, Exception) and each.__module__.startswith("pyarrow")
}
CLASSES = [
    *sorted(OF_ARROW, key=lambda each: each.__name__),
    *subclasses(optuna.exceptions.OptunaError, LandscapeError),
    *(each for each in subclasses(OSError) if each.__module__ == "builtins"),
    *(
        MemoryError,
        torch.OutOfMemoryError,
        matplotlib.units.ConversionError,
        sqlalchemy.exc.SQLAlchemyError,
        sqlalchemy.exc.ArgumentError,
    ),
]


@pytest.mark.parametrize("kind", dict.fromkeys(CLASSES), ids=lambda kind: kind.__name__)
def test_class_is_one_line(kind):
    arguments = {"MissingExtraError": ("Tuning", "tune")}.get(kind.__name__, ("first\nsecond",))
    line = usage_error(kind(*arguments))
    assert isinstance(line, click.UsageError)
    assert "\n" not in line.format_message()


def raised(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("call", "arguments", "name"),
    [
        (Figure().savefig, ("figure.nope",), "matplotlib"),
        (Figure, ((float("nan"), 1),), "matplotlib"),
        (pa.array, ([1, "a"],), "pyarrow"),
        (lambda url: optuna.create_study(storage=url), ("no database",), "SQLAlchemy"),
    ],
)
def test_builtin_exception_of_a_library(call, arguments, name):
    assert usage_error(raised(call, *arguments)).format_message().startswith(f"{name}: ")


def test_bug_keeps_its_traceback():
    assert usage_error(raised(short, 3)) is None
    assert usage_error(ValueError("of nobody")) is None


def test_secret_is_hidden():
    error = sqlalchemy.exc.DBAPIError("SELECT 1", None, OSError("postgresql://me:hidden@host/name: no route"))
    assert "hidden" not in usage_error(error).format_message()
    error = OSError(errno.EIO, "s3://bucket/x?access_token=hidden is unreachable", "file")
    assert "hidden" not in usage_error(error).format_message()


@pytest.fixture
def run_folder(tmp_path):
    with TraceWriter(tmp_path / "run", {"norm": "batch"}) as trace:
        for row in rows(steps=3):
            trace.append(row)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--traceback"]])
def test_error_of_a_library_on_the_command_line(run_folder, more):
    """A matplotlibrc with text.usetex, and no LaTeX; or whatever else matplotlib refuses."""
    (run_folder / "matplotlibrc").write_text("text.usetex: True\n")
    environment = {"MATPLOTLIBRC": str(run_folder / "matplotlibrc"), "PATH": str(run_folder)}
    words = [sys.executable, "-m", "landscape_cli", "plot", "run", *more]
    result = subprocess.run(words, cwd=run_folder, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode:
        assert result.returncode == 2
        *before, last = result.stderr.splitlines()
        assert last.startswith("Error: ")
        assert bool(before) == bool(more)
        assert ("Traceback" in result.stderr) == bool(more)


def test_traceback_of_a_mistake():
    result = CliRunner().invoke(main, ["list", "missing", "--traceback"])
    assert result.exit_code == 2
    assert "reader.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: missing: ")
    without = CliRunner().invoke(main, ["list", "missing"])
    assert without.stderr.splitlines() == result.stderr.splitlines()[-1:]
