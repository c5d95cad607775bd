"""A ray, and the parameters along it in memory that each point takes over from the one before."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from landscape.errors import LandscapeError
from landscape.ray.objective import Objective
from landscape.ray.snapshot import Parameters

FEW_ROWS = 128
"""Up to so many rows of an input, it takes longer to build a large weight than to multiply with it."""
BLOCK = 4 << 20
"""Bytes of a weight that stay in the cache of a processor while they are built and used."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Ray:
    """What is to be evaluated: ``objective`` at ``origin - eta * direction`` for each eta of ``step_sizes``.

    Raises:
        LandscapeError: A direction that does not fit the origin, or a step size that the parameters' type does not hold.
    """

    objective: Objective
    origin: Parameters
    direction: Parameters
    step_sizes: Sequence[float]

    def __post_init__(self) -> None:
        farthest = max(map(abs, self.step_sizes))
        if not self.direction:
            raise LandscapeError("The direction is empty; give a tensor for at least one of the model's parameters.")
        for name, tensor in self.direction.items():
            if not isinstance(tensor, Tensor):
                raise LandscapeError(
                    f"The direction of {name!r} is a {type(tensor).__name__}; give a tensor, or leave it out."
                )
            if name not in self.origin:
                raise LandscapeError(f"The direction names {name!r}, which model.named_parameters() does not have.")
            origin = self.origin[name]
            if tensor.shape != origin.shape:
                shapes = f"{tuple(tensor.shape)}, the parameter {tuple(origin.shape)}"
                raise LandscapeError(f"The direction of {name!r} has shape {shapes}; the two must be equal.")
            if tensor.is_complex() or tensor.layout is not torch.strided or tensor.device != origin.device:
                raise LandscapeError(
                    f"The direction of {name!r} is {tensor.layout} of {tensor.dtype} on {tensor.device}; give a dense "
                    f"tensor of real numbers on {origin.device}."
                )
            if farthest > torch.finfo(origin.dtype).max:
                raise LandscapeError(f"The step size {farthest} is more than {origin.dtype} holds; give smaller ones.")

    def together(self) -> tuple[object, ...] | None:
        """What decides on the forward passes, which all ranks have to make alike where these gather parameters."""
        return None if self.objective.shards is None else (self.step_sizes, len(self.objective.terms))


class ParametersAlongRay:
    """``point`` holds ``origin - eta * direction`` for the eta of the last move; the tensors stay the same objects.

    With ``channels_last``, weights of 2d and 3d convolutions have that layout, and so has what they are applied to.
    Parameters that are ``idle`` take no memory, and are NaN, until they are built for the first time.
    """

    def __init__(self, ray: Ray, channels_last: bool = False, idle: Container[str] = ()) -> None:
        formats = _CHANNELS_LAST if channels_last else {}
        layout = {name: formats.get(tensor.dim(), torch.preserve_format) for name, tensor in ray.direction.items()}
        self.channels_last = channels_last
        self.origin = ray.origin
        self.direction = {name: _laid_out(tensor, layout[name]) for name, tensor in ray.direction.items()}
        self.stand_ins = {name for name in ray.direction if name in idle}
        self.point: dict[str, Tensor] = {
            name: placeholder(ray.origin[name])
            if name in self.stand_ins
            else torch.empty_like(ray.origin[name], memory_format=layout[name])
            for name in ray.direction
        }
        self.eta = 0.0

    def moves(self, step_sizes: Sequence[float]) -> list[Callable[[], None]]:
        """A move to each of the step sizes."""
        return [partial(self.move_to, eta) for eta in step_sizes]

    def move_to(self, eta: float, skipped: Container[str] = ()) -> None:
        """Go to ``eta``; the tensors that are ``skipped`` keep what is in them."""
        self.eta = eta
        for name in self.point:
            if name not in skipped:
                self.materialize(name)

    def materialize(self, name: str) -> None:
        """Write one tensor as it is at the current point."""
        if name in self.stand_ins:
            self.stand_ins.remove(name)
            self.point[name].data = torch.empty_like(self.origin[name])
        torch.sub(self.origin[name], self.direction[name], alpha=self.eta, out=self.point[name])

    def blockwise_linear(self, name: str, inputs: Tensor) -> Tensor:
        """``inputs @ W.T`` with the weight of this name at the current point, which is not built as a whole.

        Each block of its rows is used while it is in the cache. For a few rows of inputs, memory is what takes time.
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
    """What the model holds instead of a parameter: of its shape, and NaN wherever a use of it is not seen."""
    return parameter.new_full((), torch.nan).expand(parameter.shape)


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return tensor if layout is torch.preserve_format else tensor.contiguous(memory_format=layout)


def check_model(model: nn.Module) -> None:
    """Raise a LandscapeError if there is a part of the model whose parameters cannot be moved."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LandscapeError(
                f"{name or 'The model'!r} is scripted or traced (torch.jit), and holds its parameters out of reach. "
                "Train and probe the Python module that it was made of."
            )
