"""What an import costs; which folder may import which is import-linter's (``lint-imports``)."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from landscape_cli.main import COMMANDS

import landscape

ROOT = Path(__file__).parents[1]


def test_every_folder_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("landscape/**/__init__.py")}
    assert {*settings["tool"]["setuptools"]["packages"]} == {*folders, "landscape_cli"}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from landscape_cli.main import main
try:
    main({arguments})
finally:
    print([name for name in ("torch", "pandas", "numpy", "matplotlib") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_every_public_name_can_be_imported():
    for name in landscape.__all__:
        assert getattr(landscape, name) is not None
    assert set(landscape.__all__) <= set(dir(landscape))


def test_version_names_torch_and_device():
    """A report of a fault needs them."""
    code = "from landscape_cli.main import main; main(['--version'])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in answer for name in (landscape.__version__, "torch 2", "device "))
