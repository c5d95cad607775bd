"""Figures 4 and 5: the runs that they compare, and the table of their roughness."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd

from landscape.analysis.labels import band_labels
from landscape.analysis.summary import summarize
from landscape.training.presets import RECIPES
from landscape.training.recipe import Recipe


def comparison(base: Recipe, groups: Sequence[int], seeds: Iterable[int] = (0,)) -> list[Recipe]:
    """Return recipes without normalization, with BatchNorm and with GhostNorm.

    Args:
        base: Recipe with all other settings.
        groups: Numbers of groups G_M of GhostNorm.
        seeds: Seeds of each norm.

    Examples:
        >>> [recipe.run_name for recipe in comparison(RECIPES["digits"], groups=(16, 32))]
        ['digits-none-seed0', 'digits-batch-seed0', 'digits-ghost16-seed0', 'digits-ghost32-seed0']
    """
    norms = [("none", None), ("batch", None), *(("ghost", number) for number in groups)]
    return [replace(base, norm=norm, groups=number, seed=seed) for norm, number in norms for seed in seeds]


COMPARISONS = {
    # Dimitriou & Arandjelovic 2020, figures 4 and 5. A group has 4 samples if the number of groups is the largest.
    ("4", "paper"): comparison(replace(RECIPES["mnist"], epochs=5, gradients=True), (16, 128), range(5)),
    ("4", "small"): comparison(RECIPES["digits"], (16, 32), range(3)),
    ("5", "paper"): comparison(RECIPES["cifar10"], (16, 128)),
    # A batch of 128 in groups of 32 and of 4 samples, as in the paper.
    ("5", "small"): comparison(RECIPES["cifar10-small"], (4, 32), range(3)),
}
"""Runs by number and scale of the figure."""


def roughness(frame: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return ranges of the loss and test accuracy by band.

    The range of an update is ``max_k L(theta - eta_k g) - min_k L(theta - eta_k g)``, in units of the loss.

    Args:
        frame: Probed updates, as returned by ``read_traces(folder)``.
        epochs: Epochs of the same runs, as returned by ``read_traces(folder, table="epochs")``.

    Returns:
        One column per band. The rows are the mean range in each epoch, mean and median range over all updates, number
        of updates with a NaN or infinite loss, and test accuracy (mean over seeds) after the last epoch.

    Examples:
        >>> frame = pd.DataFrame({"run": "a", "norm": "batch", "step": [0, 1], "epoch": [0.0, 1.0], "loss": 1.0,
        ...                       "loss_min": [1.0, 2.0], "loss_max": [4.0, 3.0], "seconds": 0.1})
        >>> roughness(frame, pd.DataFrame({"run": ["a"], "epoch": [2], "test_accuracy": [0.9]}))
        mean range     BatchNorm
        epoch 1              3.0
        epoch 2              1.0
        all, mean            2.0
        all, median          2.0
        not finite           0.0
        test accuracy        0.9
    """
    frame = frame.assign(band=band_labels(frame))
    each = summarize(frame, by=("epoch", "band")).pivot(index="epoch", columns="band", values="mean_range")
    each.index = pd.Index([f"epoch {number + 1}" for number in each.index])
    whole = summarize(frame, by="band").set_index("band")[["mean_range", "median_range", "not_finite"]].T
    whole.index = pd.Index(["all, mean", "all, median", "not finite"])
    bands = dict(zip(frame["run"].astype(str), frame["band"].astype(str), strict=True))
    last = epochs[epochs["epoch"] == epochs["epoch"].max()]
    accuracy = last.groupby([bands[str(run)] for run in last["run"]])["test_accuracy"].mean()
    tested = pd.DataFrame({"test accuracy": accuracy}).T
    table = pd.concat([part.rename(columns=str) for part in (each, whole, tested)])
    return pd.DataFrame(table[list(map(str, each.columns))]).rename_axis(columns="mean range")
