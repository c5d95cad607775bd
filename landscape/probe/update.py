"""What is known of one update before and after the optimizer makes it, and its row on the way to the trace."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from landscape.probe.passes import Captured
from landscape.ray.gradients import inner, norm
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray
from landscape.ray.snapshot import LossModule, Parameters


@dataclass(frozen=True)
class Update:
    """One update: the loss, where it starts, and the gradient that the optimizer got."""

    objective: Objective
    origin: Parameters
    gradient: Parameters
    lr: float
    captured: Captured

    @classmethod
    def from_optimizer(cls, scene: LossModule, optimizer: torch.optim.Optimizer, captured: Captured) -> "Update":
        """The update that ``optimizer`` is about to make; only the parameters it holds belong to it."""
        # A fused optimizer divides gradients by the loss scale inside its kernel; GradScaler hands it over this way.
        scale = getattr(optimizer, "grad_scale", None)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = scene.named_trained_parameters()
        gradient = {
            name: _plain(scene.local(parameter.grad), scale)
            for name, parameter in parameters.items()
            if parameter.grad is not None and id(parameter) in held
        }
        origin = {name: scene.local(parameter) for name, parameter in parameters.items()}
        return cls(Objective(captured.terms), origin, gradient, learning_rate_of(optimizer), captured)

    @property
    def differentiated(self) -> Tensor | None:
        """The value of the tensor that was differentiated, as far as it is known."""
        return self.captured.differentiated

    def snapshot(self) -> "Update":
        """The same, safe from the step that is about to overwrite the parameters, and maybe the gradient."""
        copies = {name: tensor.clone() for name, tensor in self.gradient.items()}
        return replace(self, origin={name: tensor.clone() for name, tensor in self.origin.items()}, gradient=copies)

    def actual_direction(self, scene: LossModule) -> Parameters:
        """What the optimizer did since the snapshot, as a direction whose step size is the learning rate."""
        now = scene.named_trained_parameters()
        rate = self.lr if self.lr and math.isfinite(self.lr) else 1.0
        return {name: (self.origin[name] - scene.local(now[name])) / rate for name in self.gradient}

    def row_values(self, direction: Parameters) -> dict[str, Tensor]:
        """The columns of its row that are known without going along the direction, still on the device."""
        shards = self.objective.shards
        size = norm(self.gradient, shards)
        known = {"loss": self.objective.training_loss(), "grad_norm": size, "direction_norm": size, "slope": size**2}
        if direction is not self.gradient:
            slope = inner(direction, self.gradient, shards)
            known |= {"direction_norm": norm(direction, shards), "slope": slope}
        return known

    def ray(self, direction: Parameters, step_sizes: Sequence[float]) -> Ray:
        """The ray that leads from where the update starts along ``direction``."""
        return Ray(self.objective, self.origin, direction, step_sizes)


def learning_rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first parameter group; NaN where the optimizer knows none."""
    return float(optimizer.param_groups[0].get("lr", math.nan))


def _plain(gradient: Tensor, scale: Tensor | None) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale is None else gradient / scale


def to_host(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with plain numbers; the tensors of all of them come over from the device in one transfer."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    if not tensors:
        return rows
    kind = torch.promote_types(tensors[0].dtype, torch.float32)
    numbers = iter(torch.cat([tensor.detach().reshape(-1).to(kind) for tensor in tensors]).tolist())

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return list(islice(numbers, len(value))) if value.dim() else next(numbers)

    return [{name: plain(value) for name, value in row.items()} for row in rows]
