"""Gradients along a ray, and their distances from the gradient at its origin."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters
from landscape.ray.objective import LossFunction
from landscape.ray.ray import ParametersAlongRay, Ray


class RayGradients(NamedTuple):
    """Losses and gradients along a ray.

    With the loss ``L`` and its gradient ``g``; tensors on the device of the loss.

    Attributes:
        losses: (K,), ``L(theta - eta_k d)``.
        distances: (K,), ``|g(theta) - g(theta - eta_k d)|``, l2 norms over the parameters that the ray moves; their
            range is the gradient predictiveness of Santurkar et al. (2018), section 3.1.
        cosines: (K,), the cosine between ``g(theta)`` and ``g(theta - eta_k d)``.
        slope: (), the inner product of ``g(theta)`` and ``d``.
    """

    losses: Tensor
    distances: Tensor
    cosines: Tensor
    slope: Tensor


def gradients_along(ray: Ray, start: Parameters | None = None) -> RayGradients:
    """Return losses and gradients at every point.

    It takes K forward and backward passes, and one more if the gradient at theta is not known. Each point has the same
    buffers, RNG state, train flags and autocast state, and nothing is left changed. If several ranks train the model,
    the objective is the mean of theirs.

    Args:
        ray: The ray.
        start: The gradient at theta, if it is known: that of the loss, not one that was clipped since.

    Raises:
        RuntimeError: The loss cannot be differentiated this way.
    """
    buffer, space = ParametersAlongRay(ray), ray.objective.space
    leaves = {name: tensor.requires_grad_() for name, tensor in buffer.point.items()}

    def differentiated(eta: float) -> tuple[Tensor, Parameters]:
        def own() -> dict[str | None, Tensor]:
            with torch.no_grad():
                buffer.move_to(eta)
            loss, gradient = ray.objective.value_and_gradient(leaves)
            return {None: loss, **gradient}

        means = space.all_mean(own)
        return means.pop(None), {name: means[name] for name in leaves}

    losses, distances, cosines = [], [], []
    with ray.objective.rng_restored():
        if start is None:
            _, start = differentiated(0.0)
        size = space.norm(start)
        for eta in ray.step_sizes:
            loss, gradient = differentiated(eta)
            cosines.append(space.inner(gradient, start) / (space.norm(gradient) * size))
            distances.append(space.norm({name: there - start[name] for name, there in gradient.items()}))
            losses.append(loss)
    slope = space.inner(start, ray.direction)
    return RayGradients(torch.stack(losses), torch.stack(distances), torch.stack(cosines), slope)


def gradient(objective: LossFunction, parameters: Parameters) -> Parameters:
    """Return the gradient of the objective at ``parameters``.

    Raises:
        RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
    """
    # Copies, because a model may write to its parameters.
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    with objective.rng_restored():
        return objective.value_and_gradient(leaves)[1]
