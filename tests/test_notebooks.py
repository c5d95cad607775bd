"""The notebooks run, and their committed outputs are those of a run without times and paths.

This makes the outputs::

    python -c "import nbclient, nbformat; name = 'notebooks/quickstart.ipynb'; notebook = nbformat.read(name, 4)
    nbclient.NotebookClient(notebook, record_timing=False).execute(); nbformat.write(notebook, name)"
"""

import json
import warnings
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def kinds(cells):
    """Return the kinds of outputs of each code cell."""
    return [
        [sorted(output["data"]) if "data" in output else output["name"] for output in cell["outputs"]]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    committed = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter, about itself
        run = nbclient.NotebookClient(
            nbformat.read(path, as_version=4), timeout=300, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    assert kinds(run.cells) == kinds(committed.cells)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_one_whole_run(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert kinds(cells)[-1] == ["stdout"]
    assert not any(cell["metadata"] for cell in cells)
    assert "/home/" not in path.read_text()
    assert "site-packages" not in path.read_text()
    assert path.stat().st_size < 400_000
