"""Inputs and outputs of linear layers in the forward pass of an update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CachedLinear:
    """A linear layer, its input and its output at theta."""

    parameters: Mapping[str, Tensor]
    inputs: Tensor
    outputs: Tensor
    state: Sequence[tuple[int, int]]
    """Version and address of each of the tensors above, in their order."""

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], inputs: Tensor, outputs: Tensor) -> "CachedLinear":
        """Return the layer in its current state.

        ``outputs`` may be a part of autograd's graph.
        """
        base = cls(parameters, inputs.detach(), outputs.detach(), [])
        return replace(base, state=base._current_state())

    def is_valid(self) -> bool:
        """Return True if the output is still the layer's.

        A hook may have changed it, or a write through ``.data`` the weights. On a CPU one row is recomputed; on
        a GPU that would synchronize.
        """
        if self.state != self._current_state():
            return False
        if self.outputs.device.type != "cpu" or not self.outputs.numel():
            return True
        row, parameters = self.inputs.reshape(-1, self.inputs.shape[-1])[:1], self.parameters.values()
        expected = F.linear(row, *(parameter.detach() for parameter in parameters))[0]
        if not expected.isfinite().all():
            return False  # training has diverged: the output cannot be compared
        got = self.outputs.reshape(-1, self.outputs.shape[-1])[0]
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), equal_nan=True)

    def is_unwritten(self) -> bool:
        """Return True if input and output are unchanged.

        A forward pass may write to the input of a layer.
        """
        return self.state[-2:] == self._current_state()[-2:]

    def _current_state(self) -> list[tuple[int, int]]:
        tensors = [*self.parameters.values(), self.inputs, self.outputs]
        return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def layer_key(names: tuple[str, ...], inputs: Tensor) -> tuple[Any, ...]:
    """Return a key of parameters and of an input's memory."""
    return names, inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs.device, inputs.is_neg()
