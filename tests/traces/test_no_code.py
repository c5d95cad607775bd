"""No code from data: nothing is unpickled, and files that need it are refused."""

import ast
import io
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from landscape_cli.main import main
from recordings import rows

import landscape
from landscape.data.dataset import load_dataset
from landscape.errors import LandscapeError
from landscape.traces.reader import read_traces
from landscape.traces.writer import TraceWriter

PACKAGES = [Path(landscape.__file__).parent, Path(__import__("landscape_cli").__file__).parent]
FILES = sorted(path for package in PACKAGES for path in package.glob("*.py"))
RUNS_CODE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "extract",
    "extractall",
    "unpack_archive",
    "read_pickle",
    "unsafe_load",
}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "code", "runpy"}
BETWEEN_RANKS = {"broadcast_object_list"}
"""Unpickles messages of other processes of the same training, but no file."""


def unsafe(tree):
    """Yield imports and calls in a file that may run code from their input."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from MODULES & {name.split(".")[0] for name in names}
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            own = isinstance(node.func, ast.Name) or ast.unparse(node.func) in ("builtins.eval", "builtins.exec")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (name in ("eval", "exec", "compile") and own) or name in RUNS_CODE - {"eval", "exec", "compile"}:
                yield name
            if "_object" in name and name not in BETWEEN_RANKS:
                yield name
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if ast.unparse(node.func) == "np.load" and given.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_package_runs_no_input(path):
    assert list(unsafe(ast.parse(path.read_text()))) == []


UNSAFE = """import pickle
from pickle import loads
import yaml
eval(x)
tar.extractall()
np.load(f)
torch.load(f)
torch.load(f, weights_only=False)
pd.read_pickle(f)
dist.all_gather_object(x, y)"""


@pytest.mark.parametrize("line", UNSAFE.splitlines())
def test_unsafe_is_found(line):
    assert list(unsafe(ast.parse(line)))


class Touch:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def planted(tmp_path):
    """A pickle that writes ``ran`` when loaded, which is checked first."""
    content = pickle.dumps(Touch(tmp_path / "ran"))
    pickle.loads(content)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    yield content
    assert not (tmp_path / "ran").exists()


def saved(path):
    file = io.BytesIO()
    torch.save({"version": 1, "recipe": Touch(path)}, file)
    return file.getvalue()


PROBE = "probe --norm batch --epochs 2 --every 100 --train-samples 256 --out"


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_checkpoint_runs_no_code(planted, tmp_path, kind):
    arguments = [*PROBE.split(), str(tmp_path / "traces"), "--checkpoint-seconds", "0"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    checkpoint = tmp_path / "traces" / "digits-batch-seed0" / "checkpoint.pt"
    checkpoint.write_bytes(planted if kind == "pickle" else saved(tmp_path / "ran"))
    result = CliRunner().invoke(main, [*arguments, "--resume"])
    assert result.exit_code == 2
    assert "checkpoint.pt: cannot be loaded" in result.stderr


def record(folder):
    with TraceWriter(folder, flush_rows=2) as trace:
        for row in rows(steps=4):
            trace.append(row)


def test_traces_run_no_code(planted, tmp_path):
    record(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(planted)
    (tmp_path / "run" / "updates-000000000.parquet").write_bytes(planted)
    with pytest.warns(UserWarning, match=r"run\.json: cannot be read as JSON.*cannot be read as Parquet"):
        assert list(read_traces(tmp_path / "run").step) == [2, 3]


def test_arrow_extension_types_run_no_code(planted, tmp_path):
    record(tmp_path / "run")
    path = tmp_path / "run" / "updates-000000000.parquet"
    part = pq.read_table(path)
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": planted}
    fields = [field.with_metadata(extension) for field in part.schema]
    pq.write_table(pa.table(part.columns, pa.schema(fields, {"pandas": planted, **part.schema.metadata})), path)
    assert len(read_traces(tmp_path)) == 4


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_data_files_run_no_code(planted, tmp_path, monkeypatch, name):
    for scheme in ("HTTP", "HTTPS", "http", "https"):
        monkeypatch.setenv(f"{scheme}_PROXY" if scheme.isupper() else f"{scheme}_proxy", "http://127.0.0.1:9")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = len(planted)
        archive.addfile(info, io.BytesIO(planted))
    for file in ("train.bin", "test.bin", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz", "digits.npz"):
        (tmp_path / file).write_bytes(planted)
    with pytest.raises(LandscapeError, match=r"damaged|missing"):
        load_dataset(name, tmp_path)
