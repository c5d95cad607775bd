"""How many pairs of activations change their order when a batch is normalized by groups."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from landscape.errors import LandscapeError
from landscape.names import TITLES
from landscape.norms.functional import ghost_norm
from landscape.norms.layers import BatchNorm
from landscape.plotting.figure import LandscapeFigure, footnote
from landscape.training.experiment import Experiment
from landscape.training.recipe import Recipe

VALUES = 4096
"""Values of a channel that are compared; of larger channels so many are drawn at random."""
SMALLEST_GROUP = 4
"""Samples in a group, at least: two are normalized to +1 and -1, whatever they were."""


def rank_changes(before: Tensor, after: Tensor) -> Tensor:
    """The share of pairs of values that are in another order after than before, for each channel.

    Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.2. Where no two values are equal: (1 - tau) / 2, tau
    being Kendall's rank correlation; a pair that is equal before or after has not changed its order. All pairs are
    counted, as inversions between sorted halves (Knight 1966): for the n = M F values of a channel in some n log(n)^2
    operations and in memory for n.

    Args:
        before: (M, C) or (M, C, ...), finite.
        after: The same shape, on the same device.

    Returns:
        (C,), float64, from 0 (the same order) to 1 (reversed); a random order has 0.5.

    Raises:
        LandscapeError: The shapes differ, there is only one value in a channel, or one is NaN or infinite.
    """
    if before.shape != after.shape or before.dim() < 2 or not before.shape[1] or before.numel() < 2 * before.shape[1]:
        raise LandscapeError(
            f"Order changes between {tuple(before.shape)} and {tuple(after.shape)}: both are to have the same shape, "
            "(M, C) or (M, C, ...), with two values or more in a channel."
        )
    if not (before.isfinite().all() and after.isfinite().all()):
        raise LandscapeError("Some values are NaN or infinite, and have no place in an order; leave these samples out.")
    old, new = (values.movedim(1, 0).flatten(1) for values in (before, after))
    new, by_new = new.sort(stable=True)  # of values that are equal before, the smaller after comes first: no inversion
    by_old = old.gather(1, by_new).argsort(stable=True)
    count = old.shape[1]
    return _inversions(new.gather(1, by_old)).double() / (count * (count - 1) / 2)


def _inversions(rows: Tensor) -> Tensor:
    """How many pairs of each row (C, n) stand in descending order."""
    length = 1 << (rows.shape[1] - 1).bit_length()
    halves = nn.functional.pad(rows, (0, length - rows.shape[1]), value=torch.inf)[:, :, None]
    found = rows.new_zeros(len(rows), dtype=torch.int64)
    while halves.shape[1] > 1:
        left, right = halves[:, ::2].contiguous(), halves[:, 1::2].contiguous()
        found += (left.shape[2] - torch.searchsorted(left, right, right=True)).sum((1, 2))
        halves, _ = torch.cat([left, right], 2).sort()
    return found


def activations(model: nn.Module, inputs: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What goes into some layers of a model in training mode, by the names of the layers; the model stays as it is.

    Args:
        model: Any model.
        inputs: Its input.
        layers: Names of modules, as of :meth:`torch.nn.Module.named_modules`.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0].clone()  # the layer may write into it

        return hook

    twin = deepcopy(model).train()  # its running statistics move
    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        twin(inputs)
    return found


def rank_changes_by_groups(values: Tensor, groups: Sequence[int]) -> pd.DataFrame:
    """The share of pairs whose order GhostNorm changes, by number of groups and channel.

    Compared is what is normalized, before scale and shift: these are the same for all groups of a channel, and keep or
    (where a scale is negative) reverse the order of all pairs alike.

    Args:
        values: (M, C) or (M, C, ...), the input of a norm.
        groups: Numbers of groups G_M; 1 is BatchNorm.

    Returns:
        Columns ``channel``, ``groups`` and ``share``. Of channels with more than ``VALUES`` values, that many are
        compared.
    """
    values = values.double()  # rounding is not to change an order that float32 tells apart
    flat = values.movedim(1, -1).flatten(0, -2)
    some = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:VALUES].to(values.device)
    shares = {}
    for number in groups:
        after = ghost_norm(values, number).movedim(1, -1).flatten(0, -2)
        shares[number] = rank_changes(flat[some], after[some]).tolist()
    return (
        pd.DataFrame(shares)
        .melt(var_name="groups", value_name="share", ignore_index=False)
        .rename_axis("channel")
        .reset_index()
    )


def ranking(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> pd.DataFrame:
    """The order changes among a model's activations: with its initial weights, and once the recipe has trained it.

    Measured before the first, the middle and the last norm of the model with BatchNorm, on one batch of training
    samples as they are, with 1, 2, 4, ... groups of at least ``SMALLEST_GROUP`` samples.

    Args:
        recipe: What is trained; its norm does not matter.
        data_dir: Where the files of the data set are, or are put; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; by default the GPU where there is one.

    Returns:
        Columns ``model``, ``dataset``, ``batch_size``, ``updates`` (so far), ``layer`` (such as ``norm 1 of 2``), and
        those of `rank_changes_by_groups`.

    Raises:
        LandscapeError: A recipe, device or data set that cannot be used, or activations that are not finite.
    """
    experiment = Experiment(replace(recipe, norm="batch", ghost_by="layer"), data_dir, device)
    some = torch.randperm(len(experiment.data.train), generator=torch.Generator().manual_seed(0))[: recipe.batch_size]
    inputs = experiment.data.train.inputs[some.to(experiment.device)]
    before = _changes(experiment.model, inputs).assign(updates=0)
    for _ in range(recipe.epochs):
        for _loss in experiment.epoch():
            pass
    after = _changes(experiment.model, inputs).assign(updates=recipe.epochs * experiment.updates)
    facts = {"model": recipe.model, "dataset": recipe.dataset, "batch_size": recipe.batch_size}
    return pd.concat([before, after], ignore_index=True).assign(**facts)


def _changes(model: nn.Module, inputs: Tensor) -> pd.DataFrame:
    """The order changes before the first, the middle and the last norm."""
    norms = [name for name, module in model.named_modules() if isinstance(module, BatchNorm)]
    chosen = {norms[place]: place + 1 for place in (0, len(norms) // 2, len(norms) - 1)}
    groups = [2**power for power in range((len(inputs) // SMALLEST_GROUP).bit_length())]
    return pd.concat(
        rank_changes_by_groups(values, groups).assign(layer=f"norm {chosen[name]} of {len(norms)}")
        for name, values in activations(model, inputs, list(chosen)).items()
    )


CAPTION = (
    "Share of the pairs of a channel's activations that GhostNorm puts in another order. Lines: median over the "
    "channels of a layer; bands: from quartile to quartile. One group is BatchNorm, which changes no order; a random "
    "order would be 50%. The activations are what goes into the norms of a network with BatchNorm, for a batch of "
    "{batch} training samples; they are compared before scale and shift."
)


def plot_orders(frame: pd.DataFrame) -> Figure:
    """Draw the share of pairs that change their order over the number of groups (arXiv:2007.08554, section 2.2).

    Args:
        frame: Rows of :func:`landscape.paper.rank_changes.ranking`, of one recipe or several.

    Returns:
        A figure, 8 inches wide: a column for each model, a row for its initial and one for its trained weights.
    """
    names = frame["model"].replace(TITLES) + " on " + frame["dataset"].replace(TITLES)
    networks = list(frame.groupby(names, sort=False))
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure = LandscapeFigure(figsize=(8, 6), layout="constrained")
        grid = figure.subplots(2, len(networks), sharex=True, sharey=True, squeeze=False)
        gap = 0.06 * quartiles(frame)["median"].to_numpy().max()  # about the height of a name
        for column, (name, rows) in zip(grid.T, networks, strict=True):
            for axes, (updates, state) in zip(column, rows.groupby("updates"), strict=True):
                _draw(axes, quartiles(state), gap)
                axes.set_title(f"{name}, {f'after {updates:,} updates' if updates else 'initial weights'}", loc="left")
            column[-1].set_xlabel("groups of the batch, G")
        figure.supylabel("pairs in another order", fontsize="medium")
        batch = " or ".join(f"{size:,}" for size in frame["batch_size"].unique())
        footnote(figure, CAPTION.format(batch=batch))
    return figure


def quartiles(frame: pd.DataFrame) -> pd.DataFrame:
    """Quartiles over channels, in percent: columns ``low``, ``median`` and ``high`` by ``layer`` and ``groups``."""
    shares = frame.groupby(["layer", "groups"], sort=False)["share"]
    return pd.DataFrame({"low": shares.quantile(0.25), "median": shares.median(), "high": shares.quantile(0.75)}) * 100


def _draw(axes: Axes, shares: pd.DataFrame, gap: float) -> None:
    """A line and a band for each layer, with its name at the end of the line."""
    layers = list(shares.groupby("layer", sort=False))
    colours = sns.color_palette("plasma_r", len(layers) + 1)[1:]
    ends = _apart([of["median"].iloc[-1] for _, of in layers], gap)
    for (layer, of), colour, end in zip(layers, colours, ends, strict=True):
        groups = of.index.get_level_values("groups")
        axes.fill_between(groups, of["low"], of["high"], color=colour, alpha=0.25, linewidth=0)
        axes.plot(groups, of["median"], color=colour, marker=".", linewidth=1.2)
        axes.text(groups[-1] * 1.2, end, str(layer), color=colour, va="center", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups := shares.index.unique("groups"), map(str, groups))
    axes.yaxis.set_major_formatter("{x:g}%")
    sns.despine(ax=axes)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, raised where they are closer than the gap to the next one below."""
    raised, below = list(heights), float("-inf")
    for place in sorted(range(len(raised)), key=raised.__getitem__):
        below = raised[place] = max(raised[place], below + gap)
    return raised
