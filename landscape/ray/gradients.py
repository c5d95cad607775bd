"""Gradients along a ray, and their distances from the gradient at its origin."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters, single_precision
from landscape.ray.objective import Objective
from landscape.ray.ray import ParametersAlongRay, Ray


class RayGradients(NamedTuple):
    """Losses and gradients along a ray.

    With the loss ``L`` and its gradient ``g``; tensors on the device of the loss.

    Attributes:
        losses: (K,), ``L(theta - eta_k d)``.
        distances: (K,), ``|g(theta) - g(theta - eta_k d)|``, l2 norms over the parameters that the ray moves; their
            range is the gradient predictiveness of Santurkar et al. (2018), section 3.1.
        slope: (), the inner product of ``g(theta)`` and ``d``.
    """

    losses: Tensor
    distances: Tensor
    slope: Tensor


def gradients_along(ray: Ray) -> RayGradients:
    """Return losses and gradients at every point.

    It takes K + 1 forward and backward passes: the optimizer's gradient may have been clipped, so that at theta is
    evaluated too. Each point has the same
    buffers, RNG state, train flags and autocast state, and nothing is left changed. If several ranks train the model,
    the objective is the mean of theirs.

    Raises:
        RuntimeError: The loss cannot be differentiated this way.
    """
    buffer, space = ParametersAlongRay(ray), ray.objective.space
    leaves = {name: tensor.requires_grad_() for name, tensor in buffer.point.items()}

    def differentiated(eta: float) -> tuple[Tensor, Parameters]:
        def own() -> dict[str | None, Tensor]:
            with torch.no_grad():
                buffer.move_to(eta)
            loss, gradient = _gradient(ray.objective, leaves)
            return {None: loss, **gradient}

        means = space.all_mean(own)
        return means.pop(None), {name: means[name] for name in leaves}

    losses, distances = [], []
    with ray.objective.rng_restored():
        _, start = differentiated(0.0)
        for eta in ray.step_sizes:
            loss, gradient = differentiated(eta)
            distances.append(space.norm({name: there - start[name] for name, there in gradient.items()}))
            losses.append(loss)
    return RayGradients(torch.stack(losses), torch.stack(distances), space.inner(start, ray.direction))


def gradient(objective: Objective, parameters: Parameters) -> Parameters:
    """Return the gradient of the objective at ``parameters``.

    Raises:
        RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
    """
    # Copies, because a model may write to its parameters.
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    with objective.rng_restored():
        return _gradient(objective, leaves)[1]


def _gradient(objective: Objective, leaves: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.enable_grad():
        losses, gradients = zip(*(term.gradient(leaves) for term in objective.terms), strict=True)
    parts = zip(*gradients, strict=True)
    sums = [torch.stack([single_precision(part) for part in column]).sum(0) for column in parts]
    return objective.weighted_sum(losses), dict(zip(leaves, sums, strict=True))
