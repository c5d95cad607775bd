"""What figures 4 and 5 of the paper compare: the runs of each, and which of them are still to be trained."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from landscape.analysis.labels import band_labels
from landscape.analysis.summary import summarize
from landscape.training.completed import is_recorded
from landscape.training.presets import RECIPES
from landscape.training.recipe import Recipe


def comparison(base: Recipe, groups: Sequence[int], seeds: Iterable[int] = (0,)) -> list[Recipe]:
    """No normalization, BatchNorm, and GhostNorm with several numbers of groups, with each seed."""
    norms = [("none", None), ("batch", None), *(("ghost", number) for number in groups)]
    return [replace(base, norm=norm, groups=number, seed=seed) for norm, number in norms for seed in seeds]


COMPARISONS = {
    # Dimitriou & Arandjelovic 2020, figures 4 and 5. The largest number of groups leaves four samples in each.
    ("4", "paper"): comparison(replace(RECIPES["mnist"], epochs=5, gradients=True), (16, 128), range(3)),
    ("4", "small"): comparison(RECIPES["digits"], (16, 32), range(3)),
    ("5", "paper"): comparison(RECIPES["cifar10"], (16, 128)),
    ("5", "small"): comparison(RECIPES["cifar10-small"], (16, 128)),
}
"""The runs by figure and scale."""


def pending(runs: Sequence[Recipe], folder: Path) -> list[Recipe]:
    """The runs that are not recorded to their end in a folder of traces.

    Raises:
        LandscapeError: One was recorded with other settings.
    """
    return [run for run in runs if not is_recorded(run, folder / run.run_name)]


def roughness(frame: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """How wide the bands of the loss are, and how well the models classify in the end.

    Args:
        frame: Probed updates, as ``read_traces`` gives them.
        epochs: The table ``epochs`` of the same runs.

    Returns:
        A column for each band; rows for the mean range in every epoch, mean and median over all updates, the number of
        updates with a loss that is not finite, and the test accuracy, a mean over seeds.
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
