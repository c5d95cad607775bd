"""The plain loop: one forward pass per point."""

import torch
from torch import Tensor

from landscape.ray.objective import Objective
from landscape.ray.ray import ParametersAlongRay, Ray


def loop(ray: Ray) -> Tensor:
    """Return the K losses, one point after the other.

    It is the reference for the tape, and the fallback. It calls the user's code again: the objective is an `Objective`.
    """
    assert isinstance(ray.objective, Objective)
    buffer = ParametersAlongRay(ray)
    moves = buffer.moves(ray.step_sizes)
    with torch.no_grad(), ray.objective.rng_restored():
        columns = [torch.stack(term.losses(buffer.point, moves)) for term in ray.objective.terms]
        return ray.objective.weighted_sum(columns)
