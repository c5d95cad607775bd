"""The rules of the documentation's language, and its examples."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

from landscape.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("landscape/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("benchmarks/*.py")]
OPENINGS = ["what", "whether", "who", "where", "how", "all", "those", "which"]
WORDS = 10


def first_lines(path):
    """The place and the first line of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node, text.splitlines()[0]


def of_folder(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=of_folder)
def test_docstrings_open_with_a_verb_or_a_noun(path):
    found = [
        f"{place}: {line}"
        for place, _, line in first_lines(path)
        if re.match(r"\w+", line.strip("`*")) and re.match(r"[\w']+", line.strip("`*"))[0].lower() in OPENINGS
    ]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=of_folder)
def test_first_lines_are_short(path):
    found = [
        f"{place}: {len(line.split())} words: {line}"
        for place, node, line in first_lines(path)
        if not isinstance(node, ast.Module) and len(line.split()) > WORDS
    ]
    assert not found


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("landscape/**/*.py")
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    try:
        module = importlib.import_module(name)
        doctest.testmod(module, optionflags=flags, raise_on_error=True)
    except MissingExtraError as error:
        pytest.skip(str(error))
    except doctest.UnexpectedException as failed:
        error = failed.exc_info[1]
        if not isinstance(error, MissingExtraError):
            raise error from failed
        pytest.skip(str(error))
