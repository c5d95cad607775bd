"""The plain loop: one forward pass per point."""

import torch
from torch import Tensor

from landscape.ray.ray import ParametersAlongRay, Ray


def loop(ray: Ray) -> Tensor:
    """Each point by itself: the obvious twin of every other engine."""
    walk = ParametersAlongRay(ray)
    moves = walk.moves(ray.step_sizes)
    return ray.objective.weighted_sum([torch.stack(term.losses(walk.point, moves)) for term in ray.objective.terms])
