"""Timing that can be trusted on a noisy machine: candidates take turns, and ratios are taken within a round."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, synchronize: Callable[[], object] | None = None
) -> pd.DataFrame:
    """Seconds of each candidate (columns) in each round (rows), after one round that is not counted.

    ``synchronize`` waits for the device, where one computes while Python runs on: ``torch.cuda.synchronize``.
    """
    rows = [{name: _seconds(run, synchronize) for name, run in candidates.items()} for _ in range(rounds + 1)]
    return pd.DataFrame(rows[1:])


def _seconds(candidate: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    wait = synchronize or (lambda: None)
    wait()
    started = time.perf_counter()
    candidate()
    wait()
    return time.perf_counter() - started


def against(seconds: pd.DataFrame, base: str) -> pd.DataFrame:
    """Median milliseconds of each candidate, and median and quartiles of its ratio to ``base`` in the same round."""
    ratios = seconds.div(seconds[base], axis=0)
    columns = {"ms": seconds.median() * 1e3, "ratio": ratios.median(), "from": ratios.quantile(0.25)}
    return pd.DataFrame(columns | {"to": ratios.quantile(0.75)})


def keep_memory() -> None:
    """Let the allocator of glibc keep what is freed, as it does once a tensor of this size has come and gone.

    Until then it returns memory to the system after some passes and not after others, and its first use costs more
    than the arithmetic on it.
    """
    torch.zeros(30_000_000, dtype=torch.uint8)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def write_json(path: Path | None, table: pd.DataFrame) -> None:
    """Write the table and the machine it was measured on, if there is a path."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": table.reset_index().to_dict("records")}, indent=1))
