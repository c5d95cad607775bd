"""Runs from a formula, for tests without training."""

import numpy as np
import pandas as pd

from landscape.traces.writer import TraceWriter

STEP_SIZES = [0.1, 0.2, 0.4]


def rows(steps=40, width=0.5, seed=0):
    """Return updates whose loss falls from 2 to 0.1, with a band of ``width`` times the loss above it."""
    noise = np.random.default_rng(seed).uniform(0.5, 1.5, steps)
    loss = 0.1 + 1.9 * np.exp(-np.arange(steps) / (steps / 5))
    return [
        {
            "step": step,
            "epoch": step / 10,
            "lr": 0.4,
            "loss": loss[step],
            "grad_norm": 1.0,
            "slope": 0.5 * loss[step],
            "direction_norm": 2.0,
            "step_sizes": STEP_SIZES,
            "losses": [loss[step] * (1 + share * width * noise[step]) for share in (0.0, 0.2, 1.0)],
            "gradient_distances": [eta * loss[step] * (1 + width * noise[step]) for eta in STEP_SIZES],
            "gradient_cosines": [1 - eta * width * noise[step] / 2 for eta in STEP_SIZES],
            "seconds": 0.01,
        }
        for step in range(steps)
    ]


def frame(norm="batch", seed=0, **options):
    """Return one run as ``read_traces`` does."""
    with TraceWriter(None) as trace:
        for row in rows(seed=seed, **options):
            trace.append(row)
    return trace.frame().assign(run=f"{norm}-{seed}", norm=norm, seed=seed)


def without(run, *columns):
    """Return a frame with missing values in some columns, as if recorded without them."""
    return run.assign(**{name: pd.Series(None, run.index, dtype=run[name].dtype) for name in columns})


def uphill(run):
    """Return a frame whose first step size is negative."""
    return run.assign(step_sizes=[[-0.1, 0.2, 0.4]] * len(run))


def frames(*norms, seeds=(0, 1), **options):
    """Return several runs in one frame."""
    return pd.concat([frame(norm, seed, **options) for norm in norms for seed in seeds], ignore_index=True)
