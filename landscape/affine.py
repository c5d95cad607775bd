"""A ray point by point, with all that does not depend on the step size evaluated once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from landscape.masks import SharedDraws
from landscape.objective import Term
from landscape.products import SharedProducts
from landscape.walk import Ray, Walk


def affine(ray: Ray) -> Tensor:
    """Each point by itself, but what does not depend on eta, or is affine in it, is evaluated once for all points."""
    return _shared(ray, Walk(ray))


def channels_last(ray: Ray) -> Tensor:
    """The affine engine, with the weights of convolutions, and so what they give, in channels-last layout."""
    return _shared(ray, Walk(ray, channels_last=True))


def _shared(ray: Ray, walk: Walk) -> Tensor:
    # From the nearest point outwards: differences of large products would cancel.
    order = sorted(range(len(ray.step_sizes)), key=lambda k: abs(ray.step_sizes[k]))
    columns = []
    for term in ray.objective.terms:
        losses = _outwards(term, walk, [ray.step_sizes[k] for k in order])
        columns.append(torch.stack([losses[order.index(k)] for k in range(len(order))]))
    return ray.objective.total(columns)


def _outwards(term: Term, walk: Walk, step_sizes: Sequence[float]) -> list[Tensor]:
    products, draws = SharedProducts(walk, term.bases), SharedDraws(walk.channels_last)

    def closure(model: nn.Module) -> Tensor:
        with products, draws.point():
            return term.closure(model)

    moves = [partial(products.arrive, eta) for eta in step_sizes]
    losses = replace(term, closure=closure).losses(walk.point, moves)
    term.state.scene.shared |= products.layers()
    return losses
