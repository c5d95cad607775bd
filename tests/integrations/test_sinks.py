"""Rows in dashboards, read back with the dashboards' own readers."""

import json
import sys

import pytest
import torch
from torch import nn

from landscape import LandscapeError, LandscapeProbe
from landscape.errors import MissingExtraError
from landscape.integrations import sinks

NAMES = {f"landscape/{name}" for name in ("loss", "loss_min", "loss_max", "range", "lost_share", "lr", "slope")}


def recorded(*given, updates=4):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, sinks=given) as probe:
        for _ in range(updates):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    return probe.frame()


def ranges(frame):
    return (frame["loss_max"] - frame["loss_min"]).tolist()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "mine") as writer:
        frame = recorded(sinks.TensorBoard(tmp_path / "own"), sinks.TensorBoard(writer))
    for folder in ("own", "mine"):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        assert set(events.Tags()["scalars"]) >= NAMES
        found = events.Scalars("landscape/range")
        assert [event.step for event in found] == [0, 1, 2, 3]
        assert [event.value for event in found] == pytest.approx(ranges(frame))


def test_wandb_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    sink = sinks.WandB(mode="offline", project="landscape", dir=tmp_path)
    try:
        with pytest.raises(LandscapeError, match="project"):
            sinks.WandB(project="other")
        assert sinks.WandB().run is sink.run
        frame = recorded(sink)
        sink.run.log({"mine": 1.0})  # the loop's own values are not refused
        summary = dict(sink.run.summary)
    finally:
        wandb.finish()
    assert summary["landscape/step"] == 3
    assert summary["landscape/range"] == pytest.approx(ranges(frame)[-1])
    assert summary["mine"] == 1.0
    assert set(summary) >= NAMES


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(sinks, "MAX_METRICS", 50)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        sink = sinks.MLflow()
        assert sink.run_id == run.info.run_id
        frame = recorded(sink, updates=9)
    client = mlflow.MlflowClient()
    assert set(client.get_run(run.info.run_id).data.metrics) >= NAMES
    found = client.get_metric_history(run.info.run_id, "landscape/range")
    assert [(metric.step, metric.value) for metric in found] == [*enumerate(ranges(frame))]


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    sink = sinks.Trackio("probed")
    try:
        frame = recorded(sink)
    finally:
        trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("probed", sink.run.name)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert [row["landscape/range"] for row in found] == pytest.approx(ranges(frame))


@pytest.mark.parametrize(
    ("sink", "library", "extra"),
    [
        (sinks.TensorBoard, "torch.utils.tensorboard", "tensorboard"),
        (sinks.WandB, "wandb", "wandb"),
        (sinks.MLflow, "mlflow", "mlflow"),
        (sinks.Trackio, "trackio", "trackio"),
    ],
)
def test_missing_library_is_named(monkeypatch, sink, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"landscape-probe\[{extra}\]"):
        sink()


def test_values_have_the_names_of_dashboards():
    assert json.dumps(sinks._named({"step": 1, "range": 0.5})) == '{"landscape/range": 0.5}'
