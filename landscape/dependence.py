"""Which values of a batch a norm normalizes together, found by changing one of them."""

from collections.abc import Callable, Sequence
from itertools import starmap
from math import prod
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from landscape.errors import UserError
from landscape.measures import band_labels
from landscape.norms import MAKERS, make_norm

STEPS = {"seq": ("group", "seq"), "seq-ws": ("group", "seq-ws"), "seq-reversed": ("ghost", "seq-reversed")}
"""Norms of more than one step: the norm that the first step is, then that of all steps."""

FIGURE_1: tuple[tuple[str, dict[str, int]], ...] = (
    ("batch", {}),
    ("layer", {}),
    ("instance", {}),
    ("group", {"channel_groups": 2}),
    ("ghost", {"groups": 3}),
    ("seq", {"channel_groups": 2, "groups": 3}),
)
"""The norms of the paper's figure 1."""
BLOCK = (6, 6, 4)
"""M, C and F in figure 1: small enough to see every value."""


def dependence(norm: Callable[[Tensor], Tensor], shape: Sequence[int], at: Sequence[int]) -> Tensor:
    """Which outputs of a norm change when one value of its input does: those that are normalized together with it.

    These are the slices of Wu & He 2018 (arXiv:1803.08494), figure 2, and of Dimitriou & Arandjelovic 2020
    (arXiv:2007.08554), figure 1, without knowing their equations.

    Args:
        norm: From float64 (M, C, ...) to the same shape, such as a module in training mode and float64. It is called
            twice, so running statistics move.
        shape: Of the input: M samples, C channels, F positions in the remaining dimensions.
        at: Indices of the value that is changed.

    Returns:
        bool, of that shape.

    Raises:
        UserError: There is no such value.
    """
    if len(at) != len(shape) or not all(0 <= index < size for index, size in zip(at, shape, strict=True)):
        raise UserError(f"There is no value at {tuple(at)} in a batch of shape {tuple(shape)}; give an index for each.")
    x = torch.randn(prod(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).reshape(tuple(shape))
    changed = x.clone()
    changed[tuple(at)] += 1
    with torch.no_grad():
        return norm(x) != norm(changed)


def steps_to(norm: str, shape: Sequence[int], at: Sequence[int], **options: Any) -> Tensor:
    """After how many of a norm's steps a change of one value has reached each output.

    Args:
        norm: One of `landscape.vocabulary.NORMS`. All take one step but those in `STEPS`.
        shape: As for `dependence`.
        at: Likewise.
        **options: Keywords of the norm, as for :func:`landscape.make_norm`.

    Returns:
        int64, of that shape; 0 where the change never comes to.

    Raises:
        UserError: As for :func:`landscape.make_norm`, for the norm on such an input and for `dependence`.
    """
    steps = STEPS.get(norm, (norm,))
    reached = torch.zeros(tuple(shape), dtype=torch.int64)
    for number, name in reversed(list(enumerate(steps, 1))):  # the first step last, as it is what counts
        own = {option: value for option, value in options.items() if name == norm or option in MAKERS[name][1]}
        reached[dependence(make_norm(name, **own)(shape[1]).double(), shape, at)] = number
    return reached


def figure1_blocks() -> dict[str, Tensor]:
    """What the paper's figure 1 shows: `steps_to` from the value (0, 0, 0), by the title of each norm."""
    titles = band_labels(pd.DataFrame([{"norm": name, **options} for name, options in FIGURE_1]))
    blocks = starmap(lambda name, options: steps_to(name, BLOCK, (0, 0, 0), **options), FIGURE_1)
    return dict(zip(titles, blocks, strict=True))
