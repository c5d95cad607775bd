"""An update that an optimizer makes, and the values of its row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from landscape.distributed.devices import moved_to
from landscape.distributed.parameter_space import Parameters, clones, dense
from landscape.errors import LandscapeError
from landscape.probe.capture import Capture
from landscape.probe.messages import NO_LOSS
from landscape.probe.passes import CapturedUpdate
from landscape.probe.step_hooks import find_grad_scaler, gradient_scale
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.engines.tape import Tape
from landscape.ray.loss_module import LossModule
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray


@dataclass(frozen=True)
class Update:
    """An update, which is a step of each optimizer.

    Attributes:
        loss_module: The model, and modules that its loss calls.
        tape: The loss as recorded calls, or the reason why there is none.
        origin: The parameters before the step.
        gradient: The gradient that the optimizers get.
        loss_gradient: The gradient of the loss, None if unknown; it is ``gradient`` itself if nothing changed that.
        lr: Learning rate of the first parameter group in which it is not 0; a tensor if it was not read.
        rates: The rate of each parameter divided by ``lr``, negative where the optimizer ascends; 1 or -1 if ``lr`` was
            not read.
        captured: The captured losses.
    """

    loss_module: LossModule
    tape: Tape | NoTapeError
    origin: Parameters
    gradient: Parameters
    loss_gradient: Parameters | None
    lr: float | Tensor
    rates: Mapping[str, float]
    captured: CapturedUpdate

    @classmethod
    def from_optimizers(
        cls,
        capture: Capture,
        optimizers: Sequence[torch.optim.Optimizer],
        captured: CapturedUpdate,
        reads_lr: bool = True,
    ) -> Self:
        """Return the update that ``optimizers`` are about to make.

        Args:
            capture: Has the model, of which only parameters that the optimizers hold are moved.
            optimizers: The optimizers, before the first step.
            captured: The captured losses.
            reads_lr: True to read a learning rate from a device, for which the host waits.
        """
        loss_module = capture.loss_module
        try:
            tape = capture.tape(captured)
        except NoTapeError as error:
            tape = error
        scaler, lr = find_grad_scaler(), learning_rate_of(optimizers)
        lr = float(lr) if reads_lr else lr
        scales, by_id = dict[int, Tensor | None](), dict[int, float]()
        for optimizer in optimizers:
            scale = gradient_scale(optimizer, scaler)
            for group in optimizer.param_groups:
                scales |= {id(parameter): scale for parameter in group["params"]}
                by_id |= {id(parameter): _rate(group, lr) for parameter in group["params"]}
        parameters = loss_module.space.parameters()
        gradient = {
            name: _unscaled(loss_module.space.local(parameter.grad), scales[id(parameter)])
            for name, parameter in parameters.items()
            if parameter.grad is not None and id(parameter) in scales
        }
        origin = {name: loss_module.space.local(parameter) for name, parameter in parameters.items()}
        known = captured.gradients
        own = gradient if known == {} else None
        if known and all(id(parameters[name]) in known for name in gradient):
            own = {name: dense(known[id(parameters[name])]) for name in gradient}
        rates = {name: by_id[id(parameters[name])] for name in gradient}
        return cls(loss_module, tape, origin, gradient, own, lr, rates, captured)

    def snapshot(self) -> Self:
        """Return the update with copies of tensors that steps overwrite."""
        copies, own = clones(self.gradient), self.loss_gradient
        if own is not None:
            own = copies if own is self.gradient else clones(own)
        return replace(self, origin=clones(self.origin), gradient=copies, loss_gradient=own)

    def gradient_direction(self, relative: bool) -> Parameters:
        """Return the gradient, uphill if the optimizer ascends.

        Args:
            relative: True if step sizes are multiples of ``lr``; each parameter then moves by its own rate.
        """
        factors = self.rates if relative else {name: math.copysign(1.0, rate) for name, rate in self.rates.items()}
        if all(factor == 1.0 for factor in factors.values()):
            return self.gradient
        return {name: tensor * factors[name] for name, tensor in self.gradient.items()}

    def actual_direction(self) -> Parameters:
        """Return ``(origin - parameters) / lr``, after the step."""
        space = self.loss_module.space
        now = space.parameters()
        steps = {name: self.origin[name] - space.local(now[name]) for name in self.gradient}
        if isinstance(self.lr, Tensor):
            rate = torch.where((self.lr != 0) & self.lr.isfinite(), self.lr, 1.0)
            return {name: step / moved_to(rate, step.device) for name, step in steps.items()}
        rate = self.lr if self.lr and math.isfinite(self.lr) else 1.0
        return {name: step / rate for name, step in steps.items()}

    def row_values(self, direction: Parameters) -> dict[str, Tensor]:
        """Return the columns that need no evaluation of the loss."""
        space, gradient, own = self.loss_module.space, self.gradient, self.loss_gradient
        size = space.norm(gradient)
        unknown = torch.full_like(size, math.nan)
        # A hook may have changed an unknown gradient, which is seldom; of a changed one there is no copy.
        source = gradient if own is None else own
        slope = size**2 if direction is source else space.inner(direction, source)
        if own is None:
            rest, slope = unknown, unknown if self.captured.is_changed else slope
        else:
            rest = torch.zeros_like(size) if own is gradient else self._rest(own, size)
        return {
            "gradient_rest": rest,
            "grad_norm": size,
            "direction_norm": size if direction is gradient else space.norm(direction),
            "slope": slope,
        }

    def _rest(self, own: Parameters, size: Tensor) -> Tensor:
        """Return the part of the gradient not along the loss's."""
        space = self.loss_module.space
        scale = space.inner(own, self.gradient) / space.inner(own, own)
        rest = {name: self.gradient[name] - moved_to(scale, own[name].device) * own[name] for name in own}
        return space.norm(rest) / size

    def rays(
        self, direction: Parameters, step_sizes: Sequence[float]
    ) -> tuple[Ray | NoTapeError, Ray | LandscapeError]:
        """Return the rays of the tape and of the loop.

        Both go from the origin along ``direction``.

        A reason stands for one that there is not.
        """
        ray = partial(Ray, origin=self.origin, direction=direction, step_sizes=step_sizes)
        taped = self.tape if isinstance(self.tape, NoTapeError) else ray(self.tape)
        if not self.captured.terms:
            return taped, LandscapeError(NO_LOSS)
        if self.captured.terms_problem is not None:
            return taped, LandscapeError(self.captured.terms_problem)
        return taped, ray(Objective(self.captured.terms))


def learning_rate_of(optimizers: Sequence[torch.optim.Optimizer]) -> float | Tensor:
    """Return the first learning rate other than 0.

    The result is a tensor if a rate is on an accelerator, so that the host does not wait for it.
    """
    rates = [_on_host(group.get("lr", math.nan)) for optimizer in optimizers for group in optimizer.param_groups]
    found = rates[0]
    for rate in reversed(rates):
        if not isinstance(rate, Tensor):
            found = rate or found
        else:
            found = torch.where(rate != 0, rate, moved_to(found, rate.device) if isinstance(found, Tensor) else found)
    return found


def _on_host(rate: Any) -> float | Tensor:
    """Return a number, unless an accelerator has it."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return rate.detach().reshape(()).clone()  # A scheduler may write to it before the row is read.
    return float(rate)


def _rate(group: Mapping[str, Any], lr: float | Tensor) -> float:
    if isinstance(lr, Tensor):
        share = 1.0
    else:
        rate = float(group.get("lr", math.nan))
        share = rate / lr if lr and math.isfinite(rate) and math.isfinite(lr) else 1.0
    return -share if group.get("maximize") else share


def _unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    return dense(gradient) if scale is None else dense(gradient) / moved_to(scale, gradient.device)
