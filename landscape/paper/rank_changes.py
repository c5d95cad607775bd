"""Section 2.2: the share of pairs of activations whose order GhostNorm changes."""

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
from landscape.plotting.figure import LandscapeFigure, figure_style, footnote
from landscape.training.experiment import Experiment
from landscape.training.recipe import Recipe

VALUES = 4096
"""Maximum number of values of a channel that are compared; more are sampled at random."""
SMALLEST_GROUP = 4
"""Minimum number of samples in a group: 2 are normalized to +1 and -1, whatever their values."""
CAPTION = (
    "Share of the pairs of a channel's activations whose order GhostNorm changes. Lines: median over the channels of a "
    "layer; bands: first to third quartile. One group is BatchNorm, which preserves the order; for a random order the "
    "share is 50%. The activations are the inputs of the norms of a network with BatchNorm, for a batch of {batch} "
    "training samples, and are compared before scale and shift."
)


def ranking(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> pd.DataFrame:
    """Return rank changes in a model before and after training.

    The inputs of the first, middle and last norm of the model with BatchNorm are normalized by GhostNorm with 1, 2, 4,
    ... groups of at least ``SMALLEST_GROUP`` samples. The batch is of training samples without augmentation.

    Args:
        recipe: Recipe to train; its norm is replaced by BatchNorm.
        data_dir: Folder for files of data sets; see :func:`landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; by default the GPU if there is one.

    Returns:
        Columns ``model``, ``dataset``, ``batch_size``, ``updates`` (0, or the number of updates of the training),
        ``layer`` (such as ``"norm 1 of 2"``), ``groups``, ``channel`` and ``share`` (0 to 1).

    Raises:
        LandscapeError: The recipe, device or data set cannot be used, or an activation is NaN or infinite.
    """
    experiment = Experiment(replace(recipe, norm="batch", ghost_by="layer"), data_dir, device)
    generator = torch.Generator("cpu").manual_seed(0)
    some = torch.randperm(len(experiment.data.train), generator=generator, device="cpu")[: recipe.batch_size]
    inputs = experiment.data.train.inputs[some.to(experiment.device)]
    before = rank_changes_by_layer(experiment.model, inputs).assign(updates=0)
    for _ in range(recipe.epochs):
        for _loss in experiment.epoch():
            pass
    updates = recipe.epochs * experiment.updates
    after = rank_changes_by_layer(experiment.model, inputs).assign(updates=updates)
    facts = {"model": recipe.model, "dataset": recipe.dataset, "batch_size": recipe.batch_size}
    return pd.concat([before, after], ignore_index=True).assign(**facts)


def rank_changes_by_layer(model: nn.Module, inputs: Tensor) -> pd.DataFrame:
    """Return rank changes at first, middle and last norm.

    Args:
        model: Model with BatchNorm.
        inputs: Its input, (M, ...).

    Returns:
        Columns ``channel``, ``groups``, ``share`` and ``layer`` (such as ``"norm 1 of 2"``).

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2), BatchNorm(2), nn.ReLU())
        >>> rank_changes_by_layer(model, torch.randn(8, 3))[["layer", "groups"]].drop_duplicates().values.tolist()
        [['norm 1 of 1', 1], ['norm 1 of 1', 2]]
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, BatchNorm)]
    layers = {norms[index]: f"norm {index + 1} of {len(norms)}" for index in (0, len(norms) // 2, len(norms) - 1)}
    groups = [2**power for power in range((len(inputs) // SMALLEST_GROUP).bit_length())]
    return pd.concat(
        rank_changes_by_groups(values, groups).assign(layer=layers[name])
        for name, values in activations(model, inputs, list(layers)).items()
    )


def activations(model: nn.Module, inputs: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs of layers in training mode.

    The forward pass is that of a copy, so the model and its running statistics do not change.

    Args:
        model: Any model.
        inputs: Its input.
        layers: Names of modules, as in :meth:`torch.nn.Module.named_modules`.

    Returns:
        Inputs of the layers by name.

    Examples:
        >>> activations(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.ones(1, 1, 2), ["1"])
        {'1': tensor([[1., 1.]])}
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0].clone()  # The layer may write into its input.

        return hook

    twin = deepcopy(model).train()
    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        twin(inputs)
    return found


def rank_changes_by_groups(values: Tensor, groups: Sequence[int]) -> pd.DataFrame:
    """Return the share of pairs whose order GhostNorm changes.

    Values are compared before scale and shift. These are equal for all groups of a channel, so they preserve the order
    of all pairs or, if the scale is negative, reverse it.

    Args:
        values: Input of a norm, (M, C) or (M, C, ...).
        groups: Numbers of groups G_M; 1 is BatchNorm.

    Returns:
        Columns ``channel``, ``groups`` and ``share`` (0 to 1). Channels with more than ``VALUES`` values are sampled.

    Examples:
        >>> rank_changes_by_groups(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 9])[:, None], [1, 2])
           channel  groups     share
        0        0       1  0.000000
        1        0       2  0.285714
    """
    values = values.double()  # In float32, rounding could change the order of neighbouring values.
    flat = values.movedim(1, -1).flatten(0, -2)
    some = torch.randperm(len(flat), generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:VALUES].to(
        values.device
    )
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


def rank_changes(before: Tensor, after: Tensor) -> Tensor:
    """Return the share of pairs whose order changes, per channel.

    For the n values ``b`` (before) and ``a`` (after) of a channel, the share is that of the pairs i < j with
    ``(b_i - b_j) (a_i - a_j) < 0``; a pair of equal values does not change. Without equal values it is (1 - tau) / 2,
    with Kendall's rank correlation tau. See Dimitriou & Arandjelovic 2020 (arXiv:2007.08554), section 2.2. The count is
    exact, of inversions between sorted halves (Knight 1966), in O(n log(n)^2) time and O(n) memory.

    Args:
        before: (M, C) or (M, C, ...), finite; n is M times the product of the remaining dimensions.
        after: Same shape and device as ``before``, finite.

    Returns:
        float64, (C,): from 0 (same order) to 1 (reversed order); 0.5 is expected for a random order.

    Raises:
        LandscapeError: The shapes differ, a channel has fewer than 2 values, or a value is NaN or infinite.

    Examples:
        >>> before = torch.tensor([[1.0], [2.0], [3.0]])
        >>> rank_changes(before, torch.tensor([[1.0], [3.0], [2.0]]))  # 1 of 3 pairs
        tensor([0.3333], dtype=torch.float64)
    """
    if before.shape != after.shape or before.dim() < 2 or not before.shape[1] or before.numel() < 2 * before.shape[1]:
        raise LandscapeError(
            f"before and after have shapes {tuple(before.shape)} and {tuple(after.shape)}: must be equal, (M, C) or "
            "(M, C, ...). Use at least 2 values per channel."
        )
    if not (before.isfinite().all() and after.isfinite().all()):
        raise LandscapeError(
            "before and after must be finite, but a value is NaN or infinite. Leave these samples out."
        )
    old, new = (values.movedim(1, 0).flatten(1) for values in (before, after))
    # Among equal values before, the values after are ascending, so that these pairs are no inversions.
    new, by_new = new.sort(stable=True)
    by_old = old.gather(1, by_new).argsort(stable=True)
    count = old.shape[1]
    return _inversions(new.gather(1, by_old)).double() / (count * (count - 1) / 2)


def _inversions(rows: Tensor) -> Tensor:
    """Return the number of descending pairs of each row.

    This is a merge sort of all rows (C, n) at once: at each level, the sorted left and right halves (C, blocks, size)
    are merged, and each right value counts the larger left values. For example, [3, 1 | 2, 0] has 1 + 1 pairs in the
    halves and 3 between [1, 3] and [0, 2].
    """
    length = 1 << (rows.shape[1] - 1).bit_length()
    halves = nn.functional.pad(rows, (0, length - rows.shape[1]), value=torch.inf)[:, :, None]
    found = rows.new_zeros(len(rows), dtype=torch.int64)
    while halves.shape[1] > 1:
        left, right = halves[:, ::2].contiguous(), halves[:, 1::2].contiguous()
        found += (left.shape[2] - torch.searchsorted(left, right, right=True)).sum((1, 2))
        halves, _ = torch.cat([left, right], 2).sort()
    return found


def plot_orders(frame: pd.DataFrame) -> Figure:
    """Draw the share of changed pairs over the groups.

    Args:
        frame: Rows of :func:`ranking`, of one or more recipes.

    Returns:
        A figure, 8 inches wide, with a column for each model; its rows are initial and trained weights.

    Examples:
        >>> frame = pd.DataFrame({"model": "simplenet", "dataset": "digits", "batch_size": 128, "layer": "norm 1 of 1",
        ...                       "channel": 0, "groups": [1, 2] * 2, "updates": [0, 0, 9, 9], "share": [0, 0.1] * 2})
        >>> [axes.get_title("left") for axes in plot_orders(frame).axes]
        ['SimpleNet on digits, initial weights', 'SimpleNet on digits, after 9 updates']
    """
    names = frame["model"].replace(TITLES) + " on " + frame["dataset"].replace(TITLES)
    networks = list(frame.groupby(names, sort=False))
    with figure_style():
        figure = LandscapeFigure(figsize=(8, 6), layout="constrained")
        grid = figure.subplots(2, len(networks), sharex=True, sharey=True, squeeze=False)
        gap = 0.06 * quartiles(frame)["median"].to_numpy().max()  # about the height of a layer's name
        for column, (name, rows) in zip(grid.T, networks, strict=True):
            for axes, (updates, state) in zip(column, rows.groupby("updates"), strict=True):
                _draw_layers(axes, quartiles(state), gap)
                axes.set_title(f"{name}, {f'after {updates:,} updates' if updates else 'initial weights'}", loc="left")
            column[-1].set_xlabel("groups of the batch, G")
        figure.supylabel("pairs in another order", fontsize="medium")
        batch = " or ".join(f"{size:,}" for size in frame["batch_size"].unique())
        footnote(figure, CAPTION.format(batch=batch))
    return figure


def quartiles(frame: pd.DataFrame) -> pd.DataFrame:
    """Return quartiles of the share over channels, in percent.

    Args:
        frame: Rows of :func:`ranking`, of one model before or after training.

    Returns:
        Columns ``low``, ``median`` and ``high``, with the index ``layer`` and ``groups``.
    """
    shares = frame.groupby(["layer", "groups"], sort=False)["share"]
    return pd.DataFrame({"low": shares.quantile(0.25), "median": shares.median(), "high": shares.quantile(0.75)}) * 100


def _draw_layers(axes: Axes, shares: pd.DataFrame, gap: float) -> None:
    """Draw a line and a band per layer, with labels."""
    layers = list(shares.groupby("layer", sort=False))
    colours = sns.color_palette("plasma_r", len(layers) + 1)[1:]
    ends = _spread([of["median"].iloc[-1] for _, of in layers], gap)
    for (layer, of), colour, end in zip(layers, colours, ends, strict=True):
        groups = of.index.get_level_values("groups")
        axes.fill_between(groups, of["low"], of["high"], color=colour, alpha=0.25, linewidth=0)
        axes.plot(groups, of["median"], color=colour, marker=".", linewidth=1.2)
        axes.text(groups[-1] * 1.2, end, str(layer), color=colour, va="center", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups := shares.index.unique("groups"), map(str, groups))
    axes.yaxis.set_major_formatter("{x:g}%")
    sns.despine(ax=axes)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Raise heights until they are a gap apart."""
    raised, below = list(heights), float("-inf")
    for index in sorted(range(len(raised)), key=raised.__getitem__):
        below = raised[index] = max(raised[index], below + gap)
    return raised
