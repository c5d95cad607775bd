"""What an import may import: rooms only look down, and the table side never waits for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from landscape_cli import COMMANDS

import landscape

LEVELS = [
    {"errors", "columns", "printing", "files", "standardize", "masks", "meter", "schedule"},
    {"ranks"},
    {"sharded", "processes"},
    {"state"},
    {"stores", "vocabulary", "objective", "sources", "ghost", "weights", "storages"},
    {
        "facts",
        "locks",
        "parts",
        "mnist",
        "cifar",
        "variants",
        "models",
        "recipes",
        "smoothness",
        "walk",
        "layers",
        "calls",
        "passes",
        "strategies",
    },
    {
        "plans",
        "studies",
        "norm_layers",
        "data",
        "augment",
        "measures",
        "outbox",
        "runs",
        "products",
        "stacked",
        "gradients",
        "capture",
    },
    {"update", "trace", "notrace", "tables", "norms", "affine", "bands", "captions", "recorded"},
    {"compiled", "checks", "experiment", "comparisons", "checkpoints"},
    {"engines", "rehearsal"},
    {"ray", "choice"},
    {"plots", "arguments"},
    {"probe"},
    {"training"},
    {"tuning"},
    {"dependence", "blocks", "ranking", "orders"},
]
TABLE_SIDE = {
    "printing",
    "errors",
    "columns",
    "vocabulary",
    "files",
    "stores",
    "locks",
    "outbox",
    "runs",
    "notrace",
    "recorded",
    "facts",
    "parts",
    "trace",
    "smoothness",
    "measures",
    "bands",
    "captions",
    "plots",
    "recipes",
    "strategies",
    "storages",
    "plans",
    "studies",
    "tables",
    "blocks",
    "orders",
}
ROOT = Path(landscape.__file__).parent


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("landscape."):
            names.add(node.module.removeprefix("landscape."))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
    return names


def level_of(module: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if module in rooms)


@pytest.mark.parametrize("module", sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__"))
def test_imports_go_down(module):
    rooms = set().union(*LEVELS)
    assert module in rooms, "a new room: give it a level here and a line in the README"
    above = {name for name in imported(module) & rooms if level_of(name) >= level_of(module)}
    assert not above


@pytest.mark.parametrize("module", sorted(TABLE_SIDE))
def test_the_table_side_does_not_know_torch(module):
    assert not {name for name in imported(module) if name and name.split(".")[0] == "torch"}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from landscape_cli import main
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
