"""A ray point by point, with all that does not depend on the step size evaluated once."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from landscape.ray.engines.masks import SharedDraws
from landscape.ray.engines.products import SharedProducts
from landscape.ray.objective import LossTerm
from landscape.ray.ray import ParametersAlongRay, Ray


def affine(ray: Ray) -> Tensor:
    """Each point by itself, but what does not depend on eta, or is affine in it, is evaluated once for all points."""
    return _shared(ray, ParametersAlongRay(ray, idle=_idle(ray)))


def channels_last(ray: Ray) -> Tensor:
    """The affine engine, with the weights of convolutions, and so what they give, in channels-last layout."""
    return _shared(ray, ParametersAlongRay(ray, channels_last=True, idle=_idle(ray)))


def _idle(ray: Ray) -> set[str]:
    """Parameters that are not likely to be needed at any point."""
    known = (name for term in ray.objective.terms for base in term.bases for name in base.parameters)
    return ray.objective.loss_module.traits.streamed.union(known)


def _shared(ray: Ray, walk: ParametersAlongRay) -> Tensor:
    # From the nearest point outwards: differences of large products would cancel.
    order = sorted(range(len(ray.step_sizes)), key=lambda k: abs(ray.step_sizes[k]))
    columns = []
    for term in ray.objective.terms:
        losses = _outwards(term, walk, [ray.step_sizes[k] for k in order])
        columns.append(torch.stack([losses[order.index(k)] for k in range(len(order))]))
    return ray.objective.weighted_sum(columns)


def _outwards(term: LossTerm, walk: ParametersAlongRay, step_sizes: Sequence[float]) -> list[Tensor]:
    traits = term.state.loss_module.traits
    products = SharedProducts(walk, term.bases, traits.streamed)
    draws = SharedDraws(walk.channels_last, term.state.random.accelerators)

    def closure(model: nn.Module) -> Tensor:
        # Looking at every function costs a model that shares nothing some percent of its time.
        looking = products if products.idle or not traits.shares_nothing else nullcontext()
        with looking, draws.point():
            return term.closure(model)

    moves = [partial(products.arrive, eta) for eta in step_sizes]
    losses = replace(term, closure=closure).losses(walk.point, moves)
    draws.conclude()
    traits.shared |= products.layers()
    traits.streamed = products.streamed & products.idle
    traits.shares_nothing = products.are_useless()
    return losses
