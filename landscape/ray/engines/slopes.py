"""Products of parameters with constants, which are affine in the step size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from landscape.ray.engines.calls import Affinity, Call, Constant, Read, Slot

aten = torch.ops.aten

# With the parameters W - eta D, a product with a constant x is x W - eta x D. The base x W was computed in training, so
# a ray takes one product, the slope x D, however many points it has.

_VIEWS = {
    aten.t.default, aten.transpose.int, aten.view.default, aten._unsafe_view.default, aten.permute.default,
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.slice.Tensor,
    aten.select.int,
}  # fmt: skip
_PRODUCTS = {aten.mm.default, aten.bmm.default}
_SUMS_OF_PRODUCTS = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
_SUMS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_FIRST = {aten.convolution.default: 1, aten.embedding.default: 0}
"""Place of the weight among the arguments."""


_AFFINE = {*_VIEWS, *_PRODUCTS, *_SUMS_OF_PRODUCTS, *_SUMS, *_FIRST}


def affinity(call: Call) -> Affinity:
    """Return the affinity of a call's output."""
    if call.func not in _AFFINE:
        return None
    reads = list(call.reads())
    if call.written or not reads or any(slot.affinity is None for slot, _ in reads):
        return None
    func, args = call.func, call.args
    if func in _VIEWS:
        return reads[0].slot.affinity
    is_product = (
        (func in _PRODUCTS and len(reads) == 1)
        or (func in _SUMS_OF_PRODUCTS and sum(isinstance(factor, Read) for factor in args[1:3]) == 1)
        or (func in _FIRST and all(isinstance(args[k], Read) is (k == _FIRST[func]) for k in range(_FIRST[func] + 1)))
        or (func in _SUMS and any(slot.affinity == "product" for slot, _ in reads))
    )
    return "product" if is_product else None


def slope(call: Call, slopes: Mapping[Slot, Tensor]) -> Tensor:
    """Return the negative derivative of a call's output by eta.

    Args:
        call: A call with an affinity.
        slopes: Those of its arguments; that of a parameter is its direction.
    """
    func = call.func
    args = [_factor(value, slopes) for value in call.args]
    if func in _SUMS_OF_PRODUCTS and not isinstance(call.args[0], Read):
        return _SUMS_OF_PRODUCTS[func](*args[1:3]) * call.kwargs.get("alpha", 1)
    if func is aten.convolution.default and not isinstance(call.args[2], Read):
        args[2] = None
    if func in _SUMS and not all(isinstance(value, Read) for value in call.args):
        # The other one is a constant.
        if isinstance(call.args[0], Read):
            return args[0].expand_as(call.base.tensor)  # pyright: ignore[reportOptionalMemberAccess]
        return (args[1] * (_SUMS[func] * call.kwargs.get("alpha", 1))).expand_as(call.base.tensor)  # pyright: ignore
    return func(*args, **call.kwargs)


def _factor(value: Any, slopes: Mapping[Slot, Tensor]) -> Any:
    if isinstance(value, Read):
        return slopes[value.slot]
    return value.tensor if isinstance(value, Constant) else value
