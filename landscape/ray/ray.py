"""A ray of points in parameter space, and a buffer for the parameters along it."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from landscape.distributed.parameter_space import Parameters
from landscape.errors import LandscapeError
from landscape.ray.objective import Objective

FEW_ROWS = 128
"""Most rows of an input for which building a large weight takes longer than the product with it."""
BLOCK = 4 << 20
"""Bytes of a weight that stay in a processor's cache while they are built and used."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Ray:
    """The points ``origin - eta * direction``, and an objective.

    The objective is evaluated at each eta of ``step_sizes``.

    Raises:
        LandscapeError: The direction does not fit the origin, or a step size overflows the parameters' type.
    """

    objective: Objective
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
        return (self.step_sizes, len(self.objective.terms)) if self.objective.space.is_sharded else None


class ParametersAlongRay:
    """A buffer for the parameters at any point.

    ``point`` holds ``origin - eta * direction`` for the eta of the last move, always in the same tensors.

    Args:
        ray: The ray.
        channels_last: True gives the weights of 2d and 3d convolutions that layout, which their outputs take over.
        idle: Parameters that take no memory, and are NaN, until they are first built.
    """

    def __init__(self, ray: Ray, channels_last: bool = False, idle: Container[str] = ()) -> None:
        formats = _CHANNELS_LAST if channels_last else {}
        layout = {name: formats.get(tensor.dim(), torch.preserve_format) for name, tensor in ray.direction.items()}
        self.channels_last = channels_last
        self.origin = ray.origin
        self.direction = {name: _in_layout(tensor, layout[name]) for name, tensor in ray.direction.items()}
        self.stand_ins = {name for name in ray.direction if name in idle}
        """Names of parameters that are placeholders still."""
        self.point: dict[str, Tensor] = {
            name: placeholder(ray.origin[name])
            if name in self.stand_ins
            else torch.empty_like(ray.origin[name], memory_format=layout[name])
            for name in ray.direction
        }
        self.eta = 0.0

    def moves(self, step_sizes: Sequence[float]) -> list[Callable[[], None]]:
        """Return a move to each of the step sizes."""
        return [partial(self.move_to, eta) for eta in step_sizes]

    def move_to(self, eta: float, skipped: Container[str] = ()) -> None:
        """Move to ``eta``; ``skipped`` tensors keep their values."""
        self.eta = eta
        for name in self.point:
            if name not in skipped:
                self.materialize(name)

    def materialize(self, name: str) -> None:
        """Write one tensor at the current point."""
        if name in self.stand_ins:
            self.stand_ins.remove(name)
            self.point[name].data = torch.empty_like(self.origin[name])
        torch.sub(self.origin[name], self.direction[name], alpha=self.eta, out=self.point[name])

    def blockwise_linear(self, name: str, inputs: Tensor) -> Tensor:
        """Return ``inputs @ W.T``, building the weight W in blocks.

        Each block of rows is used while it is in the cache: for a few rows of inputs, memory takes most of the time.
        """
        weight, direction = self.origin[name], self.direction[name]
        columns = inputs.reshape(-1, inputs.shape[-1]).t()
        rows = max(1, BLOCK // (weight.shape[1] * weight.itemsize))
        block = torch.empty_like(weight[:rows])
        outputs = columns.new_empty(weight.shape[0], columns.shape[1])
        for into, here, along in zip(outputs.split(rows), weight.split(rows), direction.split(rows), strict=True):
            built = torch.sub(here, along, alpha=self.eta, out=block[: len(here)])
            torch.mm(built, columns, out=into)
        return outputs.t().contiguous().view(*inputs.shape[:-1], weight.shape[0])


def placeholder(parameter: Tensor) -> Tensor:
    """Return NaN in the shape of a parameter.

    The loss is then NaN wherever a use of the parameter is not detected.
    """
    return parameter.new_full((), torch.nan).expand(parameter.shape)


def _in_layout(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return tensor if layout is torch.preserve_format else tensor.contiguous(memory_format=layout)


def check_model(model: nn.Module) -> None:
    """Raise a LandscapeError if parameters cannot be moved."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LandscapeError(
                f"{name or 'model'!r} is scripted or traced by torch.jit: must be a Python module, so that parameters "
                "can be replaced. Train and probe the module it was made from."
            )
