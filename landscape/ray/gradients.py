"""Gradients along a ray: how far they are from the one at its origin."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape.distributed.fsdp import ShardedParameters
from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.ray.objective import Objective
from landscape.ray.ray import ParametersAlongRay, Ray
from landscape.ray.snapshot import Parameters


class RayGradients(NamedTuple):
    """What a ray says of the gradient ``g`` of the loss ``L``; tensors on the device of the loss.

    Attributes:
        losses: (K,), ``L(theta - eta_k d)``.
        distances: (K,), ``|g(theta) - g(theta - eta_k d)|``, l2 norms over the parameters that the ray moves; their
            range is the gradient predictiveness of Santurkar et al. (2018), section 3.1.
        slope: (), the inner product of ``g(theta)`` and ``d``.
    """

    losses: Tensor
    distances: Tensor
    slope: Tensor


def gradients_along(ray: Ray, ranks: RankGroup = SINGLE_PROCESS) -> RayGradients:
    """Losses and gradients at every point of a ray, by K + 1 forward and backward passes.

    The gradient at theta is evaluated too, because the optimizer's may have been clipped. Each point has the same
    buffers, random numbers, train flags and autocast state, and nothing is left changed. Where several ``ranks``
    train the model, all are of the mean over them of their objectives.

    Raises:
        RuntimeError: The loss cannot be differentiated this way.
    """
    walk = ParametersAlongRay(ray)
    leaves = {name: tensor.requires_grad_() for name, tensor in walk.point.items()}
    losses, distances, shards = [], [], ray.objective.shards
    with ray.objective.rng_restored():
        _, start = _differentiated(ray.objective, walk, leaves, 0.0, ranks)
        for eta in ray.step_sizes:
            loss, gradient = _differentiated(ray.objective, walk, leaves, eta, ranks)
            distances.append(norm({name: there - start[name] for name, there in gradient.items()}, shards))
            losses.append(loss)
    slope = inner(start, ray.direction, shards)
    return RayGradients(torch.stack(losses), torch.stack(distances), slope)


def gradient(objective: Objective, parameters: Parameters) -> Parameters:
    """The gradient of the objective with respect to ``parameters`` where they are.

    Raises:
        RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
    """
    # Copies, because a model may write to its parameters.
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    with objective.rng_restored():
        return _gradient(objective, leaves)[1]


def _differentiated(
    objective: Objective, walk: ParametersAlongRay, leaves: Parameters, eta: float, ranks: RankGroup
) -> tuple[Tensor, Parameters]:
    def own() -> dict[str | None, Tensor]:
        with torch.no_grad():
            walk.move_to(eta)
        loss, gradient = _gradient(objective, leaves)
        return {None: loss, **gradient}

    # Gradients of parameters that are spread are means already, of which every rank holds its own shards.
    means = ranks.all_mean(own, apart=() if objective.shards is None else leaves)
    return means.pop(None), {name: means[name] for name in leaves}


def _gradient(objective: Objective, leaves: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.enable_grad():
        losses, gradients = zip(*(term.gradient(leaves) for term in objective.terms), strict=True)
    parts = zip(*gradients, strict=True)
    sums = [torch.stack([_plain(part) for part in column]).sum(0) for column in parts]
    return objective.weighted_sum(losses), dict(zip(leaves, sums, strict=True))


def norm(tensors: Parameters, shards: ShardedParameters | None = None) -> Tensor:
    """The l2 norm over all of the tensors, or over those that these are ``shards`` of."""
    plain = {name: _plain(tensor).detach() for name, tensor in tensors.items()}
    if shards is None:
        return torch.nn.utils.get_total_norm(list(plain.values()))
    return shards.all_reduce_sum(
        {name: torch.linalg.vector_norm(tensor).double() ** 2 for name, tensor in plain.items()}
    ).sqrt()


def inner(one: Parameters, other: Parameters, shards: ShardedParameters | None = None) -> Tensor:
    """The inner product over all of the tensors of the ``one``, or over those that both are ``shards`` of."""
    products = {name: torch.dot(_plain(a).flatten(), _plain(other[name]).flatten()) for name, a in one.items()}
    return torch.stack(list(products.values())).sum() if shards is None else shards.all_reduce_sum(products)


def _plain(tensor: Tensor) -> Tensor:
    """Dense, and in at least single precision: norms of half precision overflow."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
