"""Timing on a noisy machine: candidates take turns, and ratios are computed within a round."""

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
    """Time candidates in turns; return seconds (rounds, candidates).

    Args:
        candidates: Functions to time, by name.
        rounds: Number of rounds; one more round before them is not counted.
        synchronize: Blocks until an asynchronous device is idle, such as ``torch.cuda.synchronize``.
    """
    rows = [{name: _seconds(run, synchronize) for name, run in candidates.items()} for _ in range(rounds + 1)]
    return pd.DataFrame(rows[1:])


def _seconds(candidate: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    synchronize = synchronize or (lambda: None)
    synchronize()
    start = time.perf_counter()
    candidate()
    synchronize()
    return time.perf_counter() - start


def compare(seconds: pd.DataFrame, base: str) -> pd.DataFrame:
    """Return median times and ratios to a base.

    The columns are ``ms``, the median time in milliseconds, and ``ratio``, ``from`` and ``to``, the median and the
    quartiles of the ratio to the candidate ``base`` in the same round.
    """
    ratios = seconds.div(seconds[base], axis=0)
    columns = {"ms": seconds.median() * 1e3, "ratio": ratios.median(), "from": ratios.quantile(0.25)}
    return pd.DataFrame(columns | {"to": ratios.quantile(0.75)})


def keep_memory() -> None:
    """Make the allocator of glibc retain freed memory.

    Freeing one large tensor raises its threshold for returning memory to the system. Without it, some passes return
    memory and others do not, and the first use of new memory costs more than the arithmetic on it.
    """
    torch.zeros(30_000_000, dtype=torch.uint8)


def machine() -> dict[str, Any]:
    """Return the hardware and software that timings depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    """Return the name of the processor, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def write_json(path: Path | None, table: pd.DataFrame) -> None:
    """Write table and machine as JSON, given a path."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": table.reset_index().to_dict("records")}, indent=1))
