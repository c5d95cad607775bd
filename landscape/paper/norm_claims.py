"""The paper's claims on the norms themselves, which need no training of their own."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from landscape.data.dataset import load_dataset
from landscape.norms.registry import make_norm
from landscape.paper.claims import AGREES, DIFFERS, Claim, Section
from landscape.paper.figure1 import BLOCK, FIGURE_1, figure1_blocks
from landscape.paper.rank_changes import activations, rank_changes_by_groups
from landscape.training.models import SimpleNet

BATCH, GROUPS = 128, 16
"""Samples and groups of the claims of sections 2.2 and 2.3."""
EQUAL = 1e-9
"""Largest relative difference of gradients that are equal in float64."""


def norm_claims() -> Section:
    """Return the claims that need no recorded runs."""
    runs = f"Computed with the norms of the package and SimpleNet on {BATCH} handwritten digits, in float64."
    return Section("The norms", runs, (*_slices(), _order(1), _order(GROUPS), _accumulation()))


def _slices() -> Iterator[Claim]:
    """Yield the claims of figure 1."""
    sample, channel, place = np.indices(BLOCK)
    of = {
        "batch": channel == 0,
        "layer": sample == 0,
        "instance": (sample == 0) & (channel == 0),
        "group": (sample == 0) & (channel < BLOCK[1] // 2),
        "ghost": (sample < BLOCK[0] // 3) & (channel == 0),
        # A change reaches the channels of its group, and each of them the samples of its group.
        "seq": (sample < BLOCK[0] // 3) & (channel < BLOCK[1] // 2) & (place >= 0),
    }
    for (norm, _), (title, block) in zip(FIGURE_1, figure1_blocks().items(), strict=True):
        other = int(((block.numpy() > 0) != of[norm]).sum())
        yield Claim(
            f"Figure 1: the slice of {title}",
            "values wrongly in or out",
            f"{other} of {block.numel()}",
            DIFFERS if other else AGREES,
        )


def _simplenet(norm: str, **options: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return SimpleNet in float64, with a batch of digits."""
    samples = load_dataset("digits").train[:BATCH]
    torch.manual_seed(0)
    model = SimpleNet(samples.inputs[0].numel(), 10, make_norm(norm, **options)).double()
    return model, samples.inputs.double(), samples.targets


def _order(groups: int) -> Claim:
    """Return a claim on the order of activations."""
    model, inputs, _ = _simplenet("batch")
    layers = [name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__]
    shares = [
        rank_changes_by_groups(values, [groups])["share"] for values in activations(model, inputs, layers).values()
    ]
    changed = float(np.median(np.concatenate(shares)))
    keeps = groups == 1
    name = "BatchNorm keeps" if keeps else f"GhostNorm (G={groups}) does not keep"
    agrees = (changed == 0) == keeps
    return Claim(
        f"2.2: {name} the order of a channel's activations",
        "share of pairs in another order",
        f"{changed:.2%}",
        AGREES if agrees else DIFFERS,
    )


def _accumulation() -> Claim:
    """Return the claim of section 2.3: accumulation is GhostNorm."""
    gradients = []
    for norm, parts in (("ghost", 1), ("batch", GROUPS)):
        model, inputs, targets = _simplenet(norm, **({"groups": GROUPS} if norm == "ghost" else {}))
        for part, labels in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(part), labels) / parts).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    return Claim(
        f"2.3: accumulation over {GROUPS} parts with BatchNorm is GhostNorm",
        "gradients",
        f"relative difference {f'below {EQUAL:.0e}' if difference < EQUAL else f'of {difference:.1e}'}",
        AGREES if difference < EQUAL else DIFFERS,
    )
