"""The parameters along a ray, in memory that each point takes over from the one before."""

from collections.abc import Container

import torch
from torch import Tensor

from landscape.objective import Parameters


class Walk:
    """``point`` holds ``origin - eta * direction`` for the eta of the last move; the tensors stay the same objects."""

    def __init__(self, origin: Parameters, direction: Parameters) -> None:
        self.origin = origin
        self.direction = direction
        self.point: dict[str, Tensor] = {name: torch.empty_like(origin[name]) for name in direction}
        self.eta = 0.0

    def move(self, eta: float, skipped: Container[str] = ()) -> None:
        """Go to ``eta``; the tensors that are ``skipped`` keep what is in them."""
        self.eta = eta
        for name in self.point:
            if name not in skipped:
                self.build(name)

    def build(self, name: str) -> None:
        """Write one tensor as it is at the current point."""
        torch.sub(self.origin[name], self.direction[name], alpha=self.eta, out=self.point[name])
