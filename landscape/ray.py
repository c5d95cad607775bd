"""Losses at K points of a ray ``theta - eta * direction``: the plain loop, and its fast twin."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from landscape.errors import UserError
from landscape.objective import Closure, Objective, Parameters, Term

Engine = Callable[[Term, Parameters, Parameters, Sequence[float]], list[Tensor]]


def ray_losses(
    model: nn.Module, closure: Closure, direction: Parameters, step_sizes: Sequence[float], *, engine: str = "auto"
) -> Tensor:
    """Losses along a ray from the model's parameters, each in the state that the model is in now.

    Every point sees the same buffers, random numbers (so the same dropout mask), train flags and autocast state,
    and the model, its buffers and all random streams are left as they were.

    Args:
        model: Anything built of modules; tied parameters are moved together.
        closure: ``closure(model)`` gives the loss, a tensor with one element.
        direction: Tensors named and shaped like ``model.named_parameters()``; parameters not named stay where they
            are. For the paper's ray it is the gradient (Santurkar et al. 2018, section 3.1).
        step_sizes: The K step sizes eta, finite, in any order.
        engine: ``"loop"`` evaluates each point by itself; ``"affine"`` evaluates linear operations whose input does
            not depend on eta once for all points; ``"auto"`` chooses.

    Returns:
        The K losses at ``theta - eta * direction``, on the device and in the type of the loss; no synchronization.

    Raises:
        UserError: A direction or a step size that does not fit, an unknown engine, or a loss that is no scalar.
    """
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return losses_along(Objective.of(model, closure), origin, direction, step_sizes, engine)


def losses_along(
    objective: Objective, origin: Parameters, direction: Parameters, step_sizes: Sequence[float], engine: str = "auto"
) -> Tensor:
    """The K losses of ``objective`` at ``origin - eta * direction``; see :func:`ray_losses`."""
    check_step_sizes(step_sizes)
    _check_direction(origin, direction)
    evaluate = ENGINES[choose_engine(engine, len(step_sizes))]
    with torch.no_grad(), objective.undisturbed():
        return objective.total([torch.stack(evaluate(term, origin, direction, step_sizes)) for term in objective.terms])


def choose_engine(engine: str, points: int) -> str:
    """The engine that serves ``points`` points; affine evaluation takes two products, so it pays from three on."""
    if engine != "auto" and engine not in ENGINES:
        raise UserError(f"Unknown engine {engine!r}; choose one of auto, {', '.join(ENGINES)}.")
    return engine if engine != "auto" else "affine" if points > 2 else "loop"


def _loop(term: Term, origin: Parameters, direction: Parameters, step_sizes: Sequence[float]) -> list[Tensor]:
    """Each point by itself: the obvious twin of every other engine."""
    point = _like(origin, direction)
    return term.losses(point, (_move(point, origin, direction, eta) for eta in step_sizes))


def _affine(term: Term, origin: Parameters, direction: Parameters, step_sizes: Sequence[float]) -> list[Tensor]:
    """The loop, with linear operations whose input does not depend on eta evaluated once for all points."""
    point = _like(origin, direction)
    products = _SharedProducts(point, direction)

    def moves() -> Iterator[None]:
        for eta in step_sizes:
            _move(point, origin, direction, eta)
            products.arrive(eta)
            yield

    def closure(model: nn.Module) -> Tensor:
        with products:
            return term.closure(model)

    return replace(term, closure=closure).losses(point, moves())


ENGINES: dict[str, Engine] = {"loop": _loop, "affine": _affine}


def _like(origin: Parameters, direction: Parameters) -> dict[str, Tensor]:
    return {name: torch.empty_like(origin[name]) for name in direction}


def _move(point: Parameters, origin: Parameters, direction: Parameters, eta: float) -> None:
    for name, tensor in point.items():
        torch.sub(origin[name], direction[name], alpha=eta, out=tensor)


_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_LINEAR = {F.linear, F.embedding} | _CONVOLUTIONS


@dataclass
class _Product:
    """A linear operation as evaluated at step size ``eta``; holding its input keeps that memory from being reused."""

    inputs: Tensor
    inputs_version: int
    outputs: Tensor
    outputs_version: int
    eta: float
    slope: Tensor | None = None


class _SharedProducts(TorchFunctionMode):
    """Evaluates ``op(X, W - eta G, b - eta c)`` as ``op(X, W, b) - eta op(X, G, c)`` where X does not depend on eta.

    Whether it does is decided by looking: X at a later point must be the very memory that was X at the first point
    (held since then, so it cannot have been handed out again), with the same geometry, and unwritten in between.
    """

    def __init__(self, point: Parameters, direction: Parameters) -> None:
        super().__init__()
        self.directions = [(point[name], slope) for name, slope in direction.items()]
        self.products: dict[Any, _Product] = {}
        self.points = 0

    def arrive(self, eta: float) -> None:
        """The next point is reached; what the second point did not find again depends on eta and is let go."""
        if self.points == 2:
            self.products = {key: product for key, product in self.products.items() if product.slope is not None}
        self.points += 1
        self.eta = eta
        self.slopes = {id(parameter): (parameter._version, slope) for parameter, slope in self.directions}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # An embedding with max_norm writes to its weight.
        if func not in _LINEAR or kwargs.get("max_norm") is not None:
            return func(*args, **kwargs)
        return self._linear(func, *args, **kwargs)

    def _linear(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def product(weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(input, weight, *(() if func is F.embedding else (bias, *args)), **kwargs)

        slope, bias_slope = self._slope(weight), self._slope(bias)
        if type(input) is not Tensor or slope is None or (bias is not None and bias_slope is None):
            return product(weight, bias)
        geometry = input.data_ptr(), input.shape, input.stride(), input.dtype, input.device
        key = (func, id(weight), id(bias), *geometry, repr((args, kwargs)))
        known = self.products.get(key)
        if known is None or not known.inputs._version == known.inputs_version == input._version:
            outputs = product(weight, bias)
            # In bfloat16 or half the sum of two rounded products would not be the rounded product.
            if self.points == 1 and outputs.dtype in (torch.float32, torch.float64):
                self.products[key] = _Product(input, input._version, outputs, outputs._version, self.eta)
            return outputs
        if known.slope is None:
            if known.outputs._version != known.outputs_version:  # an in-place activation has overwritten it
                known.outputs, known.eta = product(weight, bias), self.eta
            known.slope = product(slope, bias_slope)
        return torch.sub(known.outputs, known.slope, alpha=self.eta - known.eta)

    def _slope(self, parameter: Tensor | None) -> Tensor | None:
        """The direction of a parameter as it stands at this point; None if it is none, or was written to since."""
        version, slope = self.slopes.get(id(parameter), (None, None))
        return slope if parameter is not None and version == parameter._version else None


def _check_direction(origin: Parameters, direction: Parameters) -> None:
    if not direction:
        raise UserError("The direction is empty; give a tensor for at least one of the model's parameters.")
    for name, tensor in direction.items():
        if name not in origin:
            raise UserError(f"The direction names {name!r}, which model.named_parameters() does not have.")
        if tensor.shape != origin[name].shape:
            shapes = f"{tuple(tensor.shape)}, the parameter {tuple(origin[name].shape)}"
            raise UserError(f"The direction of {name!r} has shape {shapes}; the two must be equal.")


def check_step_sizes(step_sizes: Sequence[float]) -> None:
    """Raise a UserError unless there is at least one step size and all are finite."""
    if not step_sizes or not all(math.isfinite(eta) for eta in step_sizes):
        raise UserError(f"step_sizes={list(step_sizes)!r}: give one finite number or more.")
