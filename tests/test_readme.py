"""The README's notebook cell is run as it stands."""

import re
from pathlib import Path

from click.testing import CliRunner
from landscape_cli.main import COMMANDS, main

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_notebook_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = re.search(r"```python\n(import torch.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(cell[1] + "\nfigure = plot_landscape(probe.frame())", names)
    assert len(names["probe"].frame()) == 80
    names["figure"].savefig("landscape.png")


def test_every_option_that_is_named_is_there():
    helps = "".join(CliRunner().invoke(main, [name, "--help"]).output for name in COMMANDS)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"pip install.*", "", README))) - {
        "--help",
        "--index-url",
    }
    assert options
    assert not {option for option in options if option not in helps}
