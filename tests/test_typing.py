"""A user's script passes strict type checkers, and its two deliberate mistakes are found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/typing/user.py"


def check(*command, module, folder):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; it is in the extra dev")
    found = subprocess.run([sys.executable, "-m", module, *command], capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_pyright_accepts_the_script(tmp_path):
    settings = {
        "include": [str(SCRIPT)],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": "none",  # of other libraries
        "reportUnnecessaryTypeIgnoreComment": "error",
        "enableTypeIgnoreComments": False,  # those are of mypy
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    check("--pythonpath", sys.executable, module="pyright", folder=tmp_path)


@pytest.mark.slow
def test_mypy_accepts_the_script(tmp_path):
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nignore_missing_imports = true\nmypy_path = {ROOT}\n"
        # Only the script is judged: pyright judges the package.
        "[mypy-landscape.*]\nfollow_imports = silent\n"
    )
    check(str(SCRIPT), module="mypy", folder=tmp_path)
