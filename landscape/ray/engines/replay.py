"""Replays of recorded calls along a ray: which calls are needed, and how they are made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.parameter_space import Parameters
from landscape.ray.engines.calls import (
    Call,
    Constant,
    DivergedError,
    Memory,
    NoTapeError,
    Read,
    Recording,
    Slot,
    of_type,
)
from landscape.ray.engines.slopes import slope
from landscape.rng import GENERATORS

aten = torch.ops.aten

_IN_PLACE = ("add", "sub", "mul", "div", "neg", "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt")
"""Functions that may overwrite their first argument where nothing reads it later."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_RESHAPING = {aten.view.default, aten._unsafe_view.default}


@dataclass
class Plan:
    """The calls that replays make."""

    calls: list[Call] = field(default_factory=list)
    slopes: list[Call] = field(default_factory=list)
    """Calls of which slopes are needed."""
    slots: set[Slot] = field(default_factory=set)
    """Slots whose values are read."""

    @classmethod
    def of(cls, tape: Recording) -> "Plan":
        """Walk the calls backwards from the roots."""
        plan, memories = cls(slots=set(tape.roots)), {root.memory for root in tape.roots}
        sloped, scopes = set[Slot](), set[int]()
        for call in reversed(tape.calls):
            made = list(call.makes())
            is_read = any(slot in plan.slots for slot in made) or any(memory in memories for memory in call.written)
            if is_read or call.is_decision(scopes):
                scopes.add(call.scope)
                call = _without_statistics(call, memories)
                plan.calls.append(call)
                if call.base is not None:
                    sloped.update(made)
                else:
                    plan.slots.update(slot for slot, _ in call.reads())
                    memories.update(slot.memory for slot, _ in call.reads())
            if any(slot in sloped for slot in made):
                plan.slopes.append(call)
                sloped.update(slot for slot, _ in call.reads())
        plan.calls.reverse()
        plan.slopes.reverse()
        known = {*tape.parameters.values(), *(slot for call in tape.calls for slot in call.makes())}
        if not known.issuperset(tape.roots):
            raise NoTapeError("parameters were written to between the forward pass and the optimizer's step")
        for call in plan.calls:
            if call.problem is not None:
                raise NoTapeError(call.problem)
            if not all(constant.is_unwritten() for constant in call.constants()):
                shape = next(tuple(c.tensor.shape) for c in call.constants() if not c.is_unwritten())
                raise NoTapeError(
                    f"a tensor of shape {shape} was overwritten between the forward pass and the optimizer's step; "
                    "pass a copy of it: tensor.clone()"
                )
        return plan


def _without_statistics(call: Call, live: set[Memory]) -> Call:
    """Return a batch norm without running statistics that nothing reads."""
    if call.func not in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default) or not call.args[5]:
        return call
    if any(memory in live for memory in call.written):
        return call
    args = [None if at in (3, 4) else value for at, value in enumerate(call.args)]
    return Call(call.func, args, call.kwargs, call.outputs, (), call.has_grad)


def _fits_channels_last(plan: Plan) -> bool:
    """Return True if convolutions may be computed in that layout.

    On a CPU it saves them the reordering of their inputs. Views of images in another layout are copies, which must
    neither be written to nor cost much.
    """
    written = {memory for call in plan.calls for memory in call.written}
    for call in plan.calls:
        images = [
            slot for slot, _ in call.reads() if slot.geometry is not None and len(slot.geometry[0]) in _CHANNELS_LAST
        ]
        is_large = any(math.prod(slot.geometry[0][2:]) > 1 for slot in images)
        if call.func is aten.as_strided.default or (images and call.states):
            return False
        if call.func in _RESHAPING and (is_large or any(slot.memory in written for slot in call.makes())):
            return False
    convolutions = [call for call in plan.calls if call.func is aten.convolution.default]
    weights = [value for call in convolutions if isinstance(value := call.args[1], Read)]
    return bool(weights) and all(slot.geometry[3] is torch.float32 for slot, _ in weights)


class Replay:
    """A tape along one ray.

    Args:
        tape: The tape.
        origin: The parameters at step size 0.
        direction: The direction, by name.
        is_exact: True to compute in the memory layout of training, which gives the same bits at step size 0. Otherwise
            convolutions on a CPU are in channels-last layout, which is faster.
    """

    def __init__(self, tape: Recording, origin: Parameters, direction: Parameters, is_exact: bool = False) -> None:
        self.tape, self.origin, self.direction = tape, origin, direction
        plan = Plan.of(tape)
        on_cpu = all(tensor.device.type == "cpu" for tensor in origin.values())
        self._formats = _CHANNELS_LAST if on_cpu and not is_exact and _fits_channels_last(plan) else {}
        named = {slot: name for name, slot in tape.parameters.items()}
        self._moved = [(slot.index, named[slot]) for slot in plan.slots if slot in named]
        written = {memory for call in plan.calls for memory in call.written}
        self._points = {
            name: torch.empty_like(origin[name], memory_format=self._format(origin[name]))
            if name in direction or tape.parameters[name].memory in written
            else origin[name]
            for _, name in self._moved
        }
        slopes = self._slopes(plan, named)
        last = _last_uses(plan.calls, tape.roots)
        self._steps = [
            _step(call, self._combination(call, slopes), last.get(place, ()), bool(self._formats))
            for place, call in enumerate(plan.calls)
        ]

    def _format(self, tensor: Tensor) -> torch.memory_format:
        return self._formats.get(tensor.dim(), torch.preserve_format)

    def _combination(self, call: Call, slopes: Mapping[Slot, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return base and slope of an affine product."""
        if call.base is None:
            return None
        base, along = call.base.tensor, slopes[next(call.makes())]
        layout = self._format(base)
        if layout is torch.preserve_format:
            return base, along
        return base.contiguous(memory_format=layout), along.contiguous(memory_format=layout)

    def _slopes(self, plan: Plan, named: Mapping[Slot, str]) -> dict[Slot, Tensor]:
        slopes: dict[Slot, Tensor] = {}
        for call in plan.slopes:
            for slot, _ in call.reads():
                if slot in named:
                    name, origin = named[slot], self.origin[named[slot]]
                    along = self.direction[name].to(origin.dtype) if name in self.direction else None
                    slopes[slot] = torch.zeros_like(origin) if along is None else along
            (out,) = call.makes()
            slopes[out] = slope(call, slopes)
        return slopes

    def loss(self, eta: float) -> Tensor:
        """Return the loss at a step size.

        Raises:
            DivergedError: The model's code would take another course there.
        """
        values: list[Any] = [None] * self.tape.count
        for index, name in self._moved:
            origin, point = self.origin[name], self._points[name]
            if name in self.direction:
                torch.sub(origin, self.direction[name], alpha=eta, out=point)
            elif point is not origin:
                point.copy_(origin)
            values[index] = point
        distance = eta - self.tape.anchor
        for step in self._steps:
            step(values, distance)
        return self.tape.unscaled(torch.stack([values[root.index].reshape(()) for root in self.tape.roots]).sum(0))


def _step(
    call: Call, combination: tuple[Tensor, Tensor] | None, dying: Sequence[Slot], copies_views: bool
) -> Callable[[list[Any], float], None]:
    """Return a function that makes a call in a replay."""
    freed = [slot.index for slot in dying]
    if combination is not None:
        (out,), (base, along) = call.makes(), combination

        def combine(values: list[Any], distance: float) -> None:
            values[out.index] = torch.sub(base, along, alpha=distance)

        return combine
    func = aten.reshape.default if copies_views and call.func in _RESHAPING else _in_place(call, dying)
    args = [resolved(value) for value in call.args]
    reads = [(at, value.slot.index) for at, value in enumerate(args) if isinstance(value, Read)]
    nests = [(at, value) for at, value in enumerate(args) if isinstance(value, list)]
    named = {name: resolved(value) for name, value in call.kwargs.items()}
    named_reads = any(of_type(Read, named))
    outputs = [None if slot is None else slot.index for slot in call.outputs]
    single = len(outputs) == 1

    def make(values: list[Any], distance: float) -> None:
        for at, index in reads:
            args[at] = values[index]
        for at, nest in nests:
            args[at] = _filled(nest, values)
        for generator, state in call.states:
            set_state(generator, state)
        kwargs = {name: _filled(value, values) for name, value in named.items()} if named_reads else named
        result = func(*args, **kwargs)
        for at, _ in reads:
            args[at] = None
        if call.guard is not None:
            compare(call.guard, result)
        if isinstance(result, torch.Tensor):
            if single and outputs[0] is not None:
                values[outputs[0]] = result
        elif outputs:
            for index, output in zip(outputs, result, strict=True):
                if index is not None:
                    values[index] = output
        for index in freed:
            values[index] = None

    return make


def resolved(value: Any) -> Any:
    """Return an argument with constants as tensors."""
    if isinstance(value, Constant):
        return value.tensor
    if isinstance(value, list):
        return [resolved(item) for item in value]
    return value


def _filled(value: Any, values: Sequence[Any]) -> Any:
    """Return an argument with slots as their values."""
    if isinstance(value, Read):
        return values[value.slot.index]
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    return value


def _last_uses(calls: Sequence[Call], roots: Sequence[Slot]) -> dict[int, list[Slot]]:
    """Return the slots that each call uses last.

    The key is the place of the call.
    """
    seen, last = set(roots), dict[int, list[Slot]]()
    for place in reversed(range(len(calls))):
        for slot in [*calls[place].makes(), *(slot for slot, _ in calls[place].reads())]:
            if slot not in seen:
                seen.add(slot)
                last.setdefault(place, []).append(slot)
    return last


def _in_place(call: Call, dying: Sequence[Slot]) -> Any:
    """Return the function, or one that overwrites a dying argument."""
    func = call.func
    first = call.args[0] if call.args else None
    if not isinstance(first, Read) or call.written or first.slot not in dying or call.guard is not None:
        return func
    memory = first.slot.memory
    name, overload = func._schema.name.split("::")[-1], func._overloadname
    others = [slot for slot, _ in call.reads() if slot.memory is memory and slot is not first.slot]
    (out, *more) = [*call.makes()] or [None]
    is_own = memory.reference is not None and len(memory.slots) == 1 and first.slot.affinity != "parameter"
    if name not in _IN_PLACE or not is_own or others or more or out is None or func.namespace != "aten":
        return func
    if out.geometry is None or out.geometry != first.slot.geometry:
        return func
    return getattr(getattr(aten, name + "_", None), overload, func)


def compare(guard: Any, result: Any) -> None:
    """Raise a DivergedError if a call returns something else."""
    if isinstance(guard, Tensor):
        if not torch.equal(guard, result):
            raise DivergedError("at a step size the model's code reads other values than in training")
        return
    if isinstance(guard, list):
        found: Any = [tuple(tensor.shape) for tensor in of_type(Tensor, result)]
    else:
        found = result
    if found != guard and not (found != found and guard != guard):
        raise DivergedError(f"at a step size the model's code reads {found} where it read {guard} in training")


def set_state(generator: Any, state: Tensor) -> None:
    """Set the state of a generator, or of a device's."""
    with GENERATORS:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        else:
            torch.get_device_module(generator).set_rng_state(state, generator)


def state_of(generator: Any) -> Tensor:
    """Return the state of a generator, or of a device's."""
    with GENERATORS:
        if isinstance(generator, torch.Generator):
            return generator.get_state()
        return torch.get_device_module(generator).get_rng_state(generator)
