"""A ray of points in parameter space, and a buffer for the parameters along it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from landscape.distributed.parameter_space import Parameters, foreach, foreach_groups, write
from landscape.errors import LandscapeError
from landscape.ray.objective import LossFunction, Objective

LARGE = 1 << 17
"""Elements from which a parameter is moved by a kernel of its own."""


@dataclass(frozen=True)
class Ray:
    """The points ``origin - eta * direction``, and an objective.

    The objective is evaluated at each eta of ``step_sizes``.

    Raises:
        LandscapeError: The direction does not fit the origin, or a step size overflows the parameters' type.
    """

    objective: LossFunction
    origin: Parameters
    direction: Parameters
    step_sizes: Sequence[float]

    def __post_init__(self) -> None:
        farthest = max(map(abs, self.step_sizes))
        if not self.direction:
            raise LandscapeError("direction={}: must have a tensor for at least one of the model's parameters.")
        for name, tensor in self.direction.items():
            label = f"direction[{name!r}]"
            if not isinstance(tensor, Tensor):
                raise LandscapeError(
                    f"{label} must be a tensor, got {type(tensor).__name__}. Give a tensor, or leave it out."
                )
            if name not in self.origin:
                raise LandscapeError(f"{label}: must be named as in model.named_parameters(), which lacks it.")
            origin = self.origin[name]
            if tensor.shape != origin.shape:
                raise LandscapeError(
                    f"{label} has shape {tuple(tensor.shape)}: must be that of the parameter, {tuple(origin.shape)}."
                )
            if tensor.is_complex() or tensor.layout is not torch.strided or tensor.device != origin.device:
                raise LandscapeError(
                    f"{label} is {tensor.layout} of {tensor.dtype} on {tensor.device}: must be a dense tensor of real "
                    f"numbers on {origin.device}."
                )
            if farthest > torch.finfo(origin.dtype).max:
                raise LandscapeError(f"step_sizes: {farthest} is more than {origin.dtype} holds. Give smaller ones.")

    def pass_signature(self) -> tuple[object, ...] | None:
        """Return a signature of passes that ranks make together."""
        if not isinstance(self.objective, Objective) or not self.objective.space.is_sharded:
            return None
        return self.step_sizes, len(self.objective.terms)


class PointBuffer:
    """Memory for parameters at a point, written by few kernels.

    Args:
        tensors: The memory, by the names of parameters.
        origin: The parameters at step size 0.
        direction: The direction; parameters that it lacks are the same at all points.
    """

    def __init__(self, tensors: dict[str, Tensor], origin: Parameters, direction: Parameters) -> None:
        self.tensors = tensors
        self._still = {name: origin[name] for name in tensors if name not in direction}
        rows = [(tensors[name], origin[name], direction[name]) for name in tensors if name in direction]
        # Two kernels for many tensors read them twice, which for large ones costs more than it saves.
        others, self._groups = foreach_groups(row for row in rows if 0 < row[0].numel() < LARGE)
        self._singles = [*others, *(row for row in rows if row[0].numel() >= LARGE)]

    def move_to(self, eta: float | Tensor) -> None:
        """Write the parameters at ``eta``."""
        for point, origin, direction in self._singles:
            if isinstance(eta, Tensor):
                torch.addcmul(origin, direction, eta.to(origin.dtype), value=-1, out=point)
            else:
                torch.sub(origin, direction, alpha=eta, out=point)
        for points, origins, directions in self._groups:
            foreach._foreach_copy_(points, origins)
            if isinstance(eta, Tensor):
                foreach._foreach_sub_(points, foreach._foreach_mul(directions, eta.to(directions[0].dtype)))
            else:
                foreach._foreach_sub_(points, directions, alpha=eta)
        if self._still:
            write(self._still, self.tensors)


class ParametersAlongRay:
    """A buffer for the parameters at any point.

    ``point`` holds ``origin - eta * direction`` for the eta of the last move, always in the same tensors.

    Args:
        ray: The ray.
    """

    def __init__(self, ray: Ray) -> None:
        self.point: dict[str, Tensor] = {name: torch.empty_like(ray.origin[name]) for name in ray.direction}
        self._buffer = PointBuffer(self.point, ray.origin, ray.direction)

    def moves(self, step_sizes: Sequence[float]) -> list[Callable[[], None]]:
        """Return a move to each of the step sizes."""
        return [partial(self.move_to, eta) for eta in step_sizes]

    def move_to(self, eta: float) -> None:
        """Write the parameters at ``eta``."""
        self._buffer.move_to(eta)


def check_model(model: nn.Module) -> None:
    """Raise a LandscapeError if parameters cannot be moved."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LandscapeError(
                f"{name or 'model'!r} is scripted or traced by torch.jit: must be a Python module, so that parameters "
                "can be replaced. Train and probe the module it was made from."
            )
