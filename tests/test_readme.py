"""The code of the README and the documentation runs, and the names in it exist."""

import functools
import importlib
import re
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from landscape_cli.main import COMMANDS, main

from landscape.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
RECIPES = ROOT / "docs" / "recipes"  # run by tests/field/test_recipes.py, which compares their rows with moved copies
WITH_CODE = [
    path
    for path in PAGES
    if path.parent != RECIPES and re.search(r"^```(python|\{code-cell\})", path.read_text(), re.MULTILINE)
]


def of_root(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path == README else pytest.mark.slow, id=of_root(path)) for path in WITH_CODE],
)
def test_python_blocks_run_in_order(path, tmp_path, monkeypatch):
    """A page is pasted into one notebook, block by block, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(?:python|\{code-cell\}.*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks, start=1):
        try:
            exec(compile(block, f"{of_root(path)}, block {number}", "exec"), names)
        except MissingExtraError as error:
            pytest.skip(f"block {number} and later ones: {error}")


def test_readme_has_two_install_commands():
    """.ci/run runs these two lines, word for word."""
    assert len(re.findall(r"^pip install -c constraints.txt .*&&", README.read_text(), re.MULTILINE)) == 2


@functools.cache
def helps():
    return "".join(CliRunner().invoke(main, [name, "--help"]).output for name in COMMANDS)


@pytest.mark.parametrize("path", PAGES, ids=of_root)
def test_named_options_exist(path):
    text = re.sub(r"(pip install|python -m|pytest|sphinx-build).*", "", path.read_text())
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert not {option for option in options - {"--help", "--index-url"} if option not in helps()}


@pytest.mark.parametrize("path", PAGES, ids=of_root)
def test_named_files_exist(path):
    named = re.findall(r"`((?:tests|landscape|benchmarks|figures)/[\w/.]*|[a-z]+/[\w/]*(?:\.py|/))`", path.read_text())
    assert not [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "landscape"))]


@pytest.mark.parametrize("path", PAGES, ids=of_root)
def test_named_objects_exist(path):
    for name in set(re.findall(r"`~?(landscape(?:\.[A-Za-z]\w*)+)`", path.read_text())) - {"landscape.png"}:
        parts = name.split(".")
        found = importlib.import_module(parts[0])
        with suppress(MissingExtraError):  # CI installs all extras
            for part in parts[1:]:
                found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")


@pytest.mark.parametrize("path", PAGES, ids=of_root)
def test_relative_links_lead_to_files(path):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
