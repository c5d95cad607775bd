"""Linear layers as the forward pass of an update evaluated them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CachedLinear:
    """A linear layer as the forward pass of the update evaluated it: its input and output at step size 0."""

    parameters: Mapping[str, Tensor]
    inputs: Tensor
    outputs: Tensor
    state: Sequence[tuple[int, int]]
    """Version and address of each of the tensors above, in their order."""

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], inputs: Tensor, outputs: Tensor) -> "CachedLinear":
        """The layer as it is now; ``outputs`` may still be a part of autograd's graph."""
        base = cls(parameters, inputs.detach(), outputs.detach(), [])
        return replace(base, state=base._now())

    def is_valid(self) -> bool:
        """Whether nothing has been written to since, and the output is that of the layer.

        A hook may have changed it, or a write through ``.data`` the weights. On a CPU one row of it is computed anew;
        on a GPU that would have to be waited for.
        """
        if self.state != self._now():
            return False
        if self.outputs.device.type != "cpu" or not self.outputs.numel():
            return True
        row, parameters = self.inputs.reshape(-1, self.inputs.shape[-1])[:1], self.parameters.values()
        expected = F.linear(row, *(parameter.detach() for parameter in parameters))[0]
        if not expected.isfinite().all():
            return False  # there is no telling, and nothing to save where training has diverged
        got = self.outputs.reshape(-1, self.outputs.shape[-1])[0]
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), equal_nan=True)

    def is_unwritten(self) -> bool:
        """Whether input and output are still what they were; a forward pass may write to what it feeds to a layer."""
        return self.state[-2:] == self._now()[-2:]

    def _now(self) -> list[tuple[int, int]]:
        tensors = [*self.parameters.values(), self.inputs, self.outputs]
        return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def layer_key(names: tuple[str, ...], inputs: Tensor) -> tuple[Any, ...]:
    """Names of a layer's parameters, and where and what its input is."""
    return names, inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs.device, inputs.is_neg()
