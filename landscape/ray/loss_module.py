"""A model and its criterion as one module, and the traits of its forward pass."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from landscape.distributed.parameter_space import ParameterSpace, WholeParameters

Closure = Callable[[nn.Module], Tensor]
TensorSlot = tuple[Any, str, Any]
"""Dict of a module that holds buffers or parameters, name in it, tensor."""
COMPARED_BYTES = 1 << 30
"""Most bytes of parameters that are compared before and after a first evaluation."""


@dataclass
class ForwardTraits:
    """Traits of a forward pass, found by evaluating it."""

    written_parameters: set[int] = field(default_factory=set)
    """Parameters (by id) to which forward passes write, such as those of a momentum encoder."""
    draws: bool = False
    """True if forward passes draw from the RNGs of Python or numpy, or may do so on another rank."""
    differentiates: bool = False
    """True if the loss computes derivatives itself, so that it needs gradients where they are off."""

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the traits as plain values.

        Args:
            module: Holds the written parameters, which are returned by name.
        """
        written = [name for name, parameter in module.named_parameters() if id(parameter) in self.written_parameters]
        return {**vars(self), "written_parameters": written}

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module) -> None:
        """Restore the traits.

        From the first update on, rays are evaluated to the same bits as without the interruption.

        Args:
            state: The return value of `state_dict`.
            module: Holds the written parameters.
        """
        written = state["written_parameters"] if "written_parameters" in state else state["moving"]  # until 2026-11
        ids = {id(parameter) for name, parameter in module.named_parameters() if name in written}
        self.written_parameters = ids
        self.draws, self.differentiates = state["draws"], state.get("differentiates", False)


class LossModule(nn.Module):
    """A model and its criterion as one module.

    Their tensors can be replaced together. It only holds them: it is never called, trained, moved or switched to
    another mode itself.

    Attributes:
        others: Modules that belong to neither, but are called by the loss: a discriminator, a teacher.
        space: The model's parameters.
        traits: The traits of the forward pass found so far.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module | None = None, space: ParameterSpace | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.others = nn.ModuleList()
        self.space: ParameterSpace = space or WholeParameters(model)
        self.traits = ForwardTraits(draws=self.space.is_sharded)

    def written_slots(self) -> list[TensorSlot]:
        """Return the slots of buffers and written parameters."""
        slots: list[TensorSlot] = []
        for module in self.modules():
            slots += [(module._buffers, name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
            slots += [
                (module._parameters, name, parameter)
                for name, parameter in module._parameters.items()
                if id(parameter) in self.traits.written_parameters
            ]
        return slots

    def frozen_versions(self) -> dict[int, int]:
        """Return versions of frozen parameters, by id, if known."""
        frozen = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        frozen = [parameter for parameter in frozen if not parameter.is_inference()]  # these have no version
        return dict(zip(map(id, frozen), self.space.versions(frozen), strict=False))

    @contextmanager
    def detect_writes(self, moved: Collection[str]) -> Iterator[None]:
        """Restore parameters that the body writes to.

        They are added to the traits; ``moved`` parameters are not restored. Values are compared, because a write
        through ``.data`` does not change the version. Above 1 GiB of parameters nothing is compared.
        """
        others = [p for name, p in self.model.named_parameters() if name not in moved]
        compared = others if sum(p.nbytes for p in others) <= COMPARED_BYTES else []
        before = [(parameter, parameter.data, parameter.detach().clone()) for parameter in compared]
        try:
            yield
        finally:
            for parameter, data, values in before:
                if parameter.data_ptr() != data.data_ptr() or not torch.equal(parameter, values):
                    parameter.data = data
                    data.copy_(values)
                    self.traits.written_parameters.add(id(parameter))

    def is_lazy(self) -> bool:
        """Return True if shapes await the first forward pass."""
        tensors = [*self.parameters(), *self.buffers()]
        return any(map(is_lazy, tensors))

    def devices(self) -> set[torch.device]:
        """Return the devices of buffers and (gathered) parameters."""
        return {tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors} | (
            self.space.devices
        )
