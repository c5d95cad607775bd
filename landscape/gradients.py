"""Gradients along a ray: how far they are from the one at its origin."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape.objective import Objective
from landscape.ranks import ALONE, Ranks
from landscape.state import Parameters
from landscape.walk import Ray, Walk


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


def gradients_along(ray: Ray, ranks: Ranks = ALONE) -> RayGradients:
    """Losses and gradients at every point of a ray, by K + 1 forward and backward passes.

    The gradient at theta is evaluated too, because the optimizer's may have been clipped. Each point has the same
    buffers, random numbers, train flags and autocast state, and nothing is left changed. Where several ``ranks``
    train the model, all are of the mean over them of their objectives.

    Raises:
        RuntimeError: The loss cannot be differentiated this way.
    """
    walk = Walk(ray)
    leaves = {name: tensor.requires_grad_() for name, tensor in walk.point.items()}
    losses, distances = [], []
    with ray.objective.undisturbed():
        _, start = _differentiated(ray.objective, walk, leaves, 0.0, ranks)
        for eta in ray.step_sizes:
            loss, gradient = _differentiated(ray.objective, walk, leaves, eta, ranks)
            distances.append(norm([there - here for there, here in zip(gradient, start, strict=True)]))
            losses.append(loss)
    slope = inner(start, [ray.direction[name] for name in leaves])
    return RayGradients(torch.stack(losses), torch.stack(distances), slope)


def gradient(objective: Objective, parameters: Parameters) -> list[Tensor]:
    """The gradient of the objective with respect to ``parameters`` where they are, in their order.

    Raises:
        RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
    """
    # Copies, because a model may write to its parameters.
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    with objective.undisturbed():
        return _gradient(objective, leaves)[1]


def _differentiated(
    objective: Objective, walk: Walk, leaves: Parameters, eta: float, ranks: Ranks
) -> tuple[Tensor, list[Tensor]]:
    def own() -> dict[int, Tensor]:
        with torch.no_grad():
            walk.move(eta)
        loss, gradient = _gradient(objective, leaves)
        return dict(enumerate([loss, *gradient]))

    loss, *gradient = ranks.mean(own).values()
    return loss, gradient


def _gradient(objective: Objective, leaves: Parameters) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        losses, gradients = zip(*(term.gradient(leaves) for term in objective.terms), strict=True)
    parts = zip(*gradients, strict=True)
    return objective.total(losses), [torch.stack([_plain(part) for part in column]).sum(0) for column in parts]


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The l2 norm over all of the tensors."""
    return torch.nn.utils.get_total_norm([_plain(tensor) for tensor in tensors]).detach()


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product over all of the tensors."""
    pairs = zip(one, other, strict=True)
    return torch.stack([torch.dot(_plain(a).flatten(), _plain(b).flatten()) for a, b in pairs]).sum()


def _plain(tensor: Tensor) -> Tensor:
    """Dense, and in at least single precision: norms of half precision overflow."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
