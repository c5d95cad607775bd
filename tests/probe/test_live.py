"""The live figure, in a real notebook kernel."""

import base64
import warnings

import pytest
import torch

from landscape import LandscapeProbe
from landscape.errors import LandscapeError
from landscape.probe.live import joined

CODE = """
import time, torch
from landscape import LandscapeProbe

torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with LandscapeProbe(model, optimizer).live() as probe:
    for update in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        optimizer.step()
        time.sleep(0.06)
print(len(probe.frame()))
"""


@pytest.mark.slow
def test_live_figure_in_a_notebook():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter, about itself
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
        (cell,) = nbclient.NotebookClient(notebook, timeout=120).execute().cells
    pictures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
    assert [output["text"] for output in cell["outputs"] if output["output_type"] == "stream"] == ["25\n"]
    (picture,) = pictures  # redrawn in its place
    png = base64.b64decode(picture["data"]["image/png"])
    assert png.startswith(b"\x89PNG")
    assert len(png) > 4000  # not the empty one of the start


def test_live_outside_of_a_notebook():
    model = torch.nn.Linear(4, 3)
    with pytest.raises(LandscapeError, match="requires a notebook"):
        LandscapeProbe(model, torch.optim.SGD(model.parameters(), lr=0.1)).live()


def test_joined_keeps_extremes():
    steps, losses = joined(
        list(range(5)), [(1.0, 2.0, 3.0), (0.0, 4.0, 9.0), (5.0, 5.0, 5.0), (1.0, 1.0, 7.0), (2.0,) * 3]
    )
    assert steps == [0, 2, 4]
    assert losses == [(0.0, 3.0, 9.0), (1.0, 3.0, 7.0), (2.0, 2.0, 2.0)]
