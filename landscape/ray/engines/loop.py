"""The plain loop: one forward pass per point."""

import torch
from torch import Tensor

from landscape.ray.ray import ParametersAlongRay, Ray


def loop(ray: Ray) -> Tensor:
    """Return the K losses, one point after the other.

    It is the reference for all engines.
    """
    buffer = ParametersAlongRay(ray)
    moves = buffer.moves(ray.step_sizes)
    return ray.objective.weighted_sum([torch.stack(term.losses(buffer.point, moves)) for term in ray.objective.terms])
