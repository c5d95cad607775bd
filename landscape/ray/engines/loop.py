"""The plain loop: one forward pass per point."""

import torch
from torch import Tensor

from landscape.ray.ray import Ray, Walk


def loop(ray: Ray) -> Tensor:
    """Each point by itself: the obvious twin of every other engine."""
    walk = Walk(ray)
    moves = walk.moves(ray.step_sizes)
    return ray.objective.total([torch.stack(term.losses(walk.point, moves)) for term in ray.objective.terms])
