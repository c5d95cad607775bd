"""Products with a large weight whose direction has low rank."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters
from landscape.ray.engines.calls import Call, Read, Recording, Slot

aten = torch.ops.aten

# A linear layer with M rows of input A has the gradient D = A' delta; the rows of delta are derivatives by its outputs.
# So
#
#     X (W - eta D) = X W - eta (X A') delta.
#
# If M is small, as in a network of linear layers with small batches, most of a product's time goes into reading W. The
# right-hand side reads it once for all points of a ray, whose inputs X are stacked, and writes no W - eta D. A part of
# D gives delta, and a product with a random vector shows whether the rest agrees. It does not if another direction is
# taken, or if gradients of several batches were added.

_PLACES = {aten.mm.default: 0, aten.addmm.default: 1}
"""Place of the input among the arguments; the weight follows it."""
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest part of a direction that may be left out: its own rounding errors."""
_SAMPLED, _RUN = 4, 16
"""Rows of D that give delta, for each row of A; and how many of them are neighbours, which are faster to read."""


class Factors(NamedTuple):
    """A product with a weight whose direction has factors.

    Attributes:
        weight: W, the weight at the origin, (n_in, n_out).
        rows: A, (M, n_in).
        delta: (M, n_out).
        bias: What is added to the product at the origin; None for nothing.
        bias_along: Direction of the bias; None if it does not move.
    """

    weight: Tensor
    rows: Tensor
    delta: Tensor
    bias: Tensor | None
    bias_along: Tensor | None

    def slope(self) -> Tensor:
        """Return the product of A and the direction."""
        along = (self.rows @ self.rows.t()) @ self.delta
        return along if self.bias_along is None else along + self.bias_along

    def products(self, inputs: Sequence[Tensor], etas: Sequence[float | Tensor]) -> list[Tensor]:
        """Return the product at each step size."""
        stacked = torch.cat([*inputs])
        likeness = (stacked @ self.rows.t()).chunk(len(etas))
        moved = torch.cat([part * eta for part, eta in zip(likeness, etas, strict=True)]) @ self.delta
        parts = (stacked @ self.weight).sub_(moved).chunk(len(etas))
        # In memory of their own, to which later calls may write.
        return [self._with_bias(part, eta) for part, eta in zip(parts, etas, strict=True)]

    def _with_bias(self, product: Tensor, eta: float | Tensor) -> Tensor:
        if self.bias is None:
            return product.clone()
        if self.bias_along is None:
            return product + self.bias
        return product + (self.bias - eta * self.bias_along)


def input_of(call: Call, args: Sequence[Any]) -> Tensor | None:
    """Return the input of a product that may have factors.

    Args:
        call: The call.
        args: Its arguments as they were given.
    """
    place = _PLACES.get(call.func)
    if place is None or call.kwargs or not _is_parameter(call.args[place + 1]):
        return None
    rows, weight = args[place : place + 2]
    # The comparison of a direction with its factors would wait for an accelerator.
    if rows.device.type != "cpu" or rows.dtype not in _TOLERANCES:
        return None
    return rows if len(rows) * sum(weight.shape) < weight.numel() else None


def find_factors(call: Call, tape: Recording, origin: Parameters, direction: Parameters) -> Factors | None:
    """Return the factors of a product.

    The result is None if its weight does not move, or the direction is not that of a gradient.
    """
    if call.rows is None:
        return None
    place = _PLACES[call.func]
    weight, bias = _moved(call.args[place + 1], tape, origin, direction), (None, None)
    if place:
        bias = _moved(call.args[0], tape, origin, direction)
    if weight is None or bias is None or weight[1] is None:
        return None
    rows = call.rows.tensor
    delta = _delta(rows, weight[1])
    return None if delta is None else Factors(weight[0], rows, delta, *bias)


def factor_input(call: Call) -> Slot:
    """Return the input of a product."""
    return call.args[_PLACES[call.func]].slot


def product_step(
    call: Call, factors: Factors, freed: Sequence[int]
) -> Callable[[Sequence[list[Any]], Sequence[float | Tensor]], None]:
    """Return a function that computes the product at all points."""
    read, (out,) = factor_input(call).index, call.makes()

    def multiply(points: Sequence[list[Any]], etas: Sequence[float | Tensor]) -> None:
        products = factors.products([values[read] for values in points], etas)
        for values, product in zip(points, products, strict=True):
            values[out.index] = product
            for index in freed:
                values[index] = None

    return multiply


def _delta(rows: Tensor, along: Tensor) -> Tensor | None:
    """Return delta, or None where D is not A' delta."""
    height, width = along.shape
    starts = torch.linspace(0, height - _RUN, -(-_SAMPLED * len(rows) // _RUN), device=rows.device).long().tolist()
    parts = [slice(start, start + _RUN) for start in starts] if len(starts) * _RUN < height else [slice(None)]
    sampled = torch.cat([along.t()[:, part] for part in parts], 1)
    try:
        inverse = torch.linalg.pinv(torch.cat([rows[:, part] for part in parts], 1))
    except RuntimeError:  # A LinAlgError, as the training has diverged.
        return None
    delta = (sampled @ inverse).t()
    generator = torch.Generator(along.device).manual_seed(0)
    vector = torch.randn(width, generator=generator, dtype=along.dtype, device=along.device)
    image = along @ vector
    error = (image - rows.t() @ (delta @ vector)).norm()
    return delta if error <= _TOLERANCES[along.dtype] * image.norm() else None


def _moved(
    value: Any, tape: Recording, origin: Parameters, direction: Parameters
) -> tuple[Tensor, Tensor | None] | None:
    """Return an argument at the origin, and its direction.

    The direction is None if it does not move, the result for anything but a constant, a parameter, or its transpose.
    """
    if not isinstance(value, Read):
        return value.tensor, None
    if not _is_parameter(value):  # or not any more, as it was written to
        return None
    for name, slot in tape.parameters.items():
        shape, strides, *rest = slot.geometry
        is_transposed = value.slot.memory is slot.memory and value.slot.geometry == (shape[::-1], strides[::-1], *rest)
        if value.slot is slot or is_transposed:
            here = origin[name]
            along = direction[name].to(here.dtype) if name in direction else None
            if value.slot is slot:
                return here, along
            return here.t(), None if along is None else along.t()
    return None


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Read) and value.slot.affinity == "parameter"
