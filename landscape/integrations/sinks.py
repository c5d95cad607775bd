"""Sinks for dashboards: ``LandscapeProbe(..., sinks=[TensorBoard()])``; each imports its library when it is made."""

import importlib
import math
import threading
import time
from typing import Any

from landscape.errors import LandscapeError, MissingExtraError

PREFIX = "landscape/"
"""Beginning of the names that dashboards show, as in ``landscape/range``."""
MAX_METRICS = 1000
"""Most values in one request to MLflow."""


def _library(name: str, extra: str, sink: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"landscape.integrations.sinks.{sink}", extra) from error


def _named(row: dict[str, Any]) -> dict[str, float]:
    """Return the scalars by their names in dashboards."""
    return {f"{PREFIX}{name}": value for name, value in row.items() if name != "step"}


class TensorBoard:
    """Writes rows for TensorBoard.

    Args:
        target: Folder of the event files, or a ``SummaryWriter`` that the loop uses, too.

    Raises:
        MissingExtraError: tensorboard is not installed.

    Examples:
        >>> sink = TensorBoard("runs/digits")
        >>> sink({"step": 0, "loss": 2.0, "range": 0.5})  # landscape/loss, landscape/range
        >>> sink.flush()
    """

    def __init__(self, target: Any = "runs/landscape") -> None:
        tensorboard = _library("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self.writer = target if hasattr(target, "add_scalar") else tensorboard.SummaryWriter(target)

    def __call__(self, row: dict[str, Any]) -> None:
        """Write a row."""
        for name, value in _named(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Write to the disk."""
        self.writer.flush()


class WandB:
    """Logs rows to Weights & Biases, over ``landscape/step``.

    W&B drops values whose step is behind the last one. So rows have no step of W&B, but a horizontal axis of their own.
    A loop that calls ``run.log(..., step=...)`` must use another run.

    Args:
        run: The run; the default is the active one, or else a new one.
        options: Options of ``wandb.init`` for a new run, such as ``project`` and ``mode="offline"``.

    Raises:
        MissingExtraError: wandb is not installed.
        LandscapeError: There are options, and a run that is active.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        wandb = _library("wandb", "wandb", "WandB")
        run = run or wandb.run
        if run is not None and options:
            raise LandscapeError(f"{', '.join(options)}: must be given to wandb.init, as a run is active. Omit them.")
        self.run = run or wandb.init(**options)
        self.run.define_metric(f"{PREFIX}step")
        self.run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def __call__(self, row: dict[str, Any]) -> None:
        """Log a row."""
        self.run.log({f"{PREFIX}step": row["step"], **_named(row)})


class MLflow:
    """Logs rows as metrics of an MLflow run, in batches.

    Args:
        run_id: Identity of the run; the default is the active one, or else a new one.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(self, run_id: str | None = None) -> None:
        mlflow = _library("mlflow", "mlflow", "MLflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        self.run_id = run_id or (mlflow.active_run() or mlflow.start_run()).info.run_id
        self._client, self._waiting = mlflow.MlflowClient(), list[Any]()
        self._lock = threading.Lock()  # for several probes that share it

    def __call__(self, row: dict[str, Any]) -> None:
        """Add a row to the batch."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, row["step"]) for name, value in _named(row).items()]
        with self._lock:
            self._waiting += metrics
        if len(self._waiting) > MAX_METRICS - 4 * len(row):
            self.flush()

    def flush(self) -> None:
        """Log the batch."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        if batch:
            self._client.log_batch(self.run_id, metrics=batch)


class Trackio:
    """Logs rows to Trackio.

    Args:
        project: Name of the project of a new run.
        options: Other options of ``trackio.init``.

    Raises:
        MissingExtraError: trackio is not installed.
    """

    def __init__(self, project: str = "landscape", **options: Any) -> None:
        self.run = _library("trackio", "trackio", "Trackio").init(project=project, **options)

    def __call__(self, row: dict[str, Any]) -> None:
        """Log a row."""
        finite = {name: value for name, value in _named(row).items() if math.isfinite(value)}
        self.run.log(finite, step=row["step"])
