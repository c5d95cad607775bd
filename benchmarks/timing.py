"""Timing that can be trusted on a noisy machine: candidates take turns, and ratios are taken within a round."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Seconds of each candidate (columns) in each round (rows), after one round that is not counted."""
    rows = [{name: _seconds(candidate) for name, candidate in candidates.items()} for _ in range(rounds + 1)]
    return pd.DataFrame(rows[1:])


def _seconds(candidate: Callable[[], object]) -> float:
    started = time.perf_counter()
    candidate()
    return time.perf_counter() - started


def against(seconds: pd.DataFrame, base: str) -> pd.DataFrame:
    """Median milliseconds of each candidate, and median and quartiles of its ratio to ``base`` in the same round."""
    ratios = seconds.div(seconds[base], axis=0)
    columns = {"ms": seconds.median() * 1e3, "ratio": ratios.median(), "from": ratios.quantile(0.25)}
    return pd.DataFrame(columns | {"to": ratios.quantile(0.75)})


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def write_json(path: Path | None, table: pd.DataFrame) -> None:
    """Write the table and the machine it was measured on, if there is a path."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": table.reset_index().to_dict("records")}, indent=1))
