"""Traits of ATen functions: what they write to, draw, and depend on."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from landscape.ray.engines.calls import of_type, tensors_of
from landscape.rng import GENERATORS

aten = torch.ops.aten

_UNDECLARED_WRITES = {
    aten.native_batch_norm.default: (3, 4),
    aten.cudnn_batch_norm.default: (3, 4),
    aten.miopen_batch_norm.default: (3, 4),
    aten.batch_norm_update_stats.default: (1, 2),
}
"""Arguments that are written to in training although the schema does not say so: running statistics."""
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"} | {
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size", "sym_stride", "sym_numel",
    "sym_storage_offset", "is_same_size", "_shape_as_tensor"
}  # fmt: skip
"""Functions of a tensor's shape alone."""
_BLANK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Functions that return memory without values."""
_REPLACING = {"set_", "resize_", "resize_as_", "_resize_output_"}
"""Functions that give a tensor another memory."""


class FunctionTraits(NamedTuple):
    """Traits of an ATen function, read from its schema."""

    written: tuple[int | str, ...]
    """Positions or names of arguments that it writes to."""
    draws: bool
    """True if it may draw random numbers."""
    is_guarded: bool
    """True if it returns a number, or a tensor whose shape depends on values."""
    is_shape_only: bool
    is_blank: bool
    is_view: bool
    is_in_place_view: bool
    is_collective: bool
    replaces_memory: bool


@cache
def function_traits(func: OpOverload) -> FunctionTraits:
    """Return the traits of a function."""
    written: list[int | str] = list(_UNDECLARED_WRITES.get(func, ()))
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else place)
    name = func._schema.name.split("::")[-1]
    guarded = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return FunctionTraits(
        written=tuple(written),
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        is_guarded=any(tag in guarded for tag in func.tags),
        is_shape_only=name in _SHAPE_ONLY,
        is_blank=name in _BLANK,
        is_view=any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns),
        is_in_place_view=torch.Tag.inplace_view in func.tags,
        is_collective=func.namespace in ("c10d", "_c10d_functional", "c10d_functional"),
        replaces_memory=name in _REPLACING,
    )


def rng_states(func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[Any, Tensor]]:
    """Return generator and state if a call draws."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p" and not (args[place] if place < len(args) else kwargs.get("dropout_p", 0)):
            return []
    device = next(of_type(Tensor, (args, kwargs))).device
    with GENERATORS:
        if (generator := kwargs.get("generator")) is not None:
            return [(generator, generator.get_state())]
        if device.type == "cpu":
            return [(torch.default_generator, torch.get_rng_state())]
        return [(device, torch.get_device_module(device).get_rng_state(device))]


def list_versions(func: Any, args: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors of lists that a call writes to.

    Under a mode, ``_foreach`` functions do not count their writes, by which autograd and the probe notice them.
    """
    if not isinstance(func, OpOverload) or not func._schema.name.startswith("aten::_foreach"):
        return []
    written = [args[at] for at in function_traits(func).written if isinstance(at, int)]
    return [(tensor, tensor._version) for tensor in tensors_of(written) if not tensor.is_inference()]
