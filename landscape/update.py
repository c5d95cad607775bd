"""What is known of one update before and after the optimizer makes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from landscape.objective import Objective, Parameters, Term


@dataclass(frozen=True)
class Update:
    """One update: the loss, where it starts, and the gradient that the optimizer got."""

    objective: Objective
    origin: Parameters
    gradient: Parameters
    lr: float

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, terms: Sequence[Term]) -> "Update":
        """The update that ``optimizer`` is about to make; only the parameters it holds belong to it."""
        # A fused optimizer divides gradients by the loss scale inside its kernel; GradScaler hands it over this way.
        scale = getattr(optimizer, "grad_scale", None)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = dict(model.named_parameters())
        gradient = {
            name: _plain(parameter.grad, scale)
            for name, parameter in parameters.items()
            if parameter.grad is not None and id(parameter) in held
        }
        origin = {name: parameter.detach() for name, parameter in parameters.items()}
        return cls(Objective(terms), origin, gradient, float(optimizer.param_groups[0]["lr"]))

    def snapshot(self) -> "Update":
        """The same, safe from the step that is about to overwrite the parameters."""
        return replace(self, origin={name: tensor.clone() for name, tensor in self.origin.items()})

    def made(self, model: nn.Module) -> Parameters:
        """What the optimizer did since the snapshot, as a direction whose step size is the learning rate."""
        now = dict(model.named_parameters())
        return {name: (self.origin[name] - now[name].detach()) / (self.lr or 1.0) for name in self.gradient}

    def values(self, losses: Tensor) -> Tensor:
        """Training loss, gradient norm and the K losses in one tensor, left on the device until rows are written."""
        norm = torch.nn.utils.get_total_norm(self.gradient.values())
        parts = [self.objective.recorded().reshape(1), norm.detach().reshape(1), losses]
        return torch.cat([part.to(torch.promote_types(losses.dtype, torch.float32)) for part in parts])


def _plain(gradient: Tensor, scale: Tensor | None) -> Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale is None else gradient / scale
