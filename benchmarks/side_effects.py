"""Side effects of a measurement, found by comparing all state before and after it bit by bit."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SideEffects:
    """Snapshot of a model and of all random number generators."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    flags: dict[str, bool]
    requires: dict[str, bool]
    torch: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def snapshot(cls, model: nn.Module) -> "SideEffects":
        parameters = dict(model.named_parameters())
        return cls(
            weights={name: p.detach().clone() for name, p in parameters.items()},
            gradients={name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
            buffers={name: buffer.detach().clone() for name, buffer in model.named_buffers()},
            flags={name: module.training for name, module in model.named_modules()},
            requires={name: p.requires_grad for name, p in parameters.items()},
            torch=[torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
            numpy=np.random.get_state(),  # noqa: NPY002
            python=random.getstate(),
        )

    def restore(self, model: nn.Module) -> None:
        """Restore this state of the model and of the generators.

        The model may be another instance of the same architecture.
        """
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
                gradient = self.gradients[name]
                parameter.grad = None if gradient is None else gradient.clone()
                parameter.requires_grad_(self.requires[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])
        for name, training in self.flags.items():
            modules[name].training = training
        torch.set_rng_state(self.torch[0])
        if self.torch[1:]:
            torch.cuda.set_rng_state_all(self.torch[1:])
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def changes(self, after: "SideEffects") -> list[str]:
        """Return a short description of each difference."""
        states = {
            "weights moved": (self.weights, after.weights),
            "gradients changed": (self.gradients, after.gradients),
            "buffers moved": (self.buffers, after.buffers),
            "train flags changed": (self.flags, after.flags),
            "requires_grad changed": (self.requires, after.requires),
            "torch's RNG advanced": (self.torch, after.torch),
            "numpy's RNG advanced": (self.numpy, after.numpy),
            "Python's RNG advanced": (self.python, after.python),
        }
        return [description for description, pair in states.items() if not _same_bits(*pair)]


def _same_bits(one: Any, other: Any) -> bool:
    """Return True if two values have the same bits.

    NaN equals itself, and 0 differs from -0.
    """
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_bits(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same_bits, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Tensor):
        same_type = isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
        return same_type and torch.equal(_bits(one), _bits(other))
    return one == other


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
