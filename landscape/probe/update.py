"""An update that an optimizer makes, and the values of its row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters, dense
from landscape.probe.passes import CapturedUpdate
from landscape.ray.loss_module import LossModule
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray


@dataclass(frozen=True)
class Update:
    """An update of an optimizer.

    Attributes:
        objective: The loss as a function of the parameters.
        origin: The parameters before the step.
        gradient: The gradient that the optimizer gets.
        lr: Learning rate of the first parameter group.
        captured: The captured losses.
    """

    objective: Objective
    origin: Parameters
    gradient: Parameters
    lr: float
    captured: CapturedUpdate

    @classmethod
    def from_optimizer(
        cls, loss_module: LossModule, optimizer: torch.optim.Optimizer, captured: CapturedUpdate
    ) -> Self:
        """Return the update that ``optimizer`` is about to make.

        Args:
            loss_module: The model, of which only parameters that the optimizer holds are moved.
            optimizer: The optimizer, before its step.
            captured: The captured losses.
        """
        # A fused optimizer divides gradients by the loss scale in its kernel; GradScaler passes the scale this way.
        scale = getattr(optimizer, "grad_scale", None)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = loss_module.space.parameters()
        gradient = {
            name: _unscaled(loss_module.space.local(parameter.grad), scale)
            for name, parameter in parameters.items()
            if parameter.grad is not None and id(parameter) in held
        }
        origin = {name: loss_module.space.local(parameter) for name, parameter in parameters.items()}
        return cls(Objective(captured.terms), origin, gradient, learning_rate_of(optimizer), captured)

    @property
    def differentiated(self) -> Tensor | None:
        """Value of the differentiated tensors, or None if unknown."""
        return self.captured.differentiated

    def snapshot(self) -> Self:
        """Return the update with copies of tensors that steps overwrite."""
        copies = {name: tensor.clone() for name, tensor in self.gradient.items()}
        return replace(self, origin={name: tensor.clone() for name, tensor in self.origin.items()}, gradient=copies)

    def actual_direction(self, loss_module: LossModule) -> Parameters:
        """Return ``(origin - parameters) / lr``, after the step."""
        now = loss_module.space.parameters()
        rate = self.lr if self.lr and math.isfinite(self.lr) else 1.0
        return {name: (self.origin[name] - loss_module.space.local(now[name])) / rate for name in self.gradient}

    def row_values(self, direction: Parameters) -> dict[str, Tensor]:
        """Return the columns that need no evaluation of the ray."""
        space = self.objective.space
        size = space.norm(self.gradient)
        known = {"loss": self.objective.training_loss(), "grad_norm": size, "direction_norm": size, "slope": size**2}
        if direction is not self.gradient:
            slope = space.inner(direction, self.gradient)
            known |= {"direction_norm": space.norm(direction), "slope": slope}
        return known

    def ray(self, direction: Parameters, step_sizes: Sequence[float]) -> Ray:
        """Return the ray from the origin along ``direction``."""
        return Ray(self.objective, self.origin, direction, step_sizes)


def learning_rate_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the first parameter group's learning rate, or NaN."""
    return float(optimizer.param_groups[0].get("lr", math.nan))


def _unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    return dense(gradient) if scale is None else dense(gradient) / scale


def to_host(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as plain numbers, by one device transfer."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    if not tensors:
        return rows
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    numbers = iter(torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors]).tolist())

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return list(islice(numbers, len(value))) if value.dim() else next(numbers)

    return [{name: plain(value) for name, value in row.items()} for row in rows]
