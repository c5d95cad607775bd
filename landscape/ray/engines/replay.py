"""Replays of recorded calls along a ray: which calls are needed, and how they are made."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.devices import stacked
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
from landscape.ray.engines.factors import Factors, factor_input, find_factors, product_step
from landscape.ray.engines.slopes import slope
from landscape.ray.ray import PointBuffer
from landscape.rng import GENERATORS

aten = torch.ops.aten

_IN_PLACE = ("add", "sub", "mul", "div", "neg", "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt")
"""Functions that may overwrite their first argument where nothing reads it later."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_RESHAPING = {aten.view.default, aten._unsafe_view.default}

Etas = Sequence[float | Tensor]
Step = Callable[[Sequence[list[Any]], Etas], None]
"""Makes a call at several points, given the values of their slots and their step sizes."""


@dataclass
class Plan:
    """The calls that replays make."""

    calls: list[Call] = field(default_factory=list)
    slopes: list[Call] = field(default_factory=list)
    """Calls of which slopes are needed."""
    slots: set[Slot] = field(default_factory=set)
    """Slots whose values are read."""

    @classmethod
    def of(cls, tape: Recording, factors: Collection[Call] = ()) -> "Plan":
        """Walk the calls backwards from the roots.

        Args:
            tape: The tape.
            factors: Products that read only their input.
        """
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
                    read = [factor_input(call)] if call in factors else [slot for slot, _ in call.reads()]
                    plan.slots.update(read)
                    memories.update(slot.memory for slot in read)
            if any(slot in sloped for slot in made):
                plan.slopes.append(call)
                sloped.update(slot for slot, _ in call.reads())
        plan.calls.reverse()
        plan.slopes.reverse()
        known = {*tape.parameters.values(), *(slot for call in tape.calls for slot in call.makes())}
        if not known.issuperset(tape.roots):
            raise NoTapeError("parameters were written to between the forward pass and the optimizer's step")
        check_repeatable(plan.calls)
        return plan


def check_repeatable(calls: Iterable[Call]) -> None:
    """Raise a NoTapeError unless calls can be made again."""
    for call in calls:
        if call.problem is not None:
            raise NoTapeError(call.problem)
        for constant in call.constants():
            if not constant.is_unwritten():
                shape = tuple(constant.tensor.shape)
                raise NoTapeError(
                    f"a tensor of shape {shape} was overwritten between the forward pass and the optimizer's step; "
                    "pass a copy of it: tensor.clone()"
                )


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
        self._named = {slot: name for name, slot in tape.parameters.items()}
        found = {call: find_factors(call, tape, origin, direction) for call in tape.calls}
        factors = {call: one for call, one in found.items() if one is not None}
        stacked = {call: one for call, one in factors.items() if call.base is None}
        plan = Plan.of(tape, stacked)
        if stacked and not self._fits_together(plan, stacked):
            stacked, plan = {}, Plan.of(tape)
        self._is_together = bool(stacked)
        """True if calls are made at all points before the next call."""
        on_cpu = all(tensor.device.type == "cpu" for tensor in origin.values())
        self._formats = _CHANNELS_LAST if on_cpu and not is_exact and _fits_channels_last(plan) else {}
        self._moved = [(slot.index, self._named[slot]) for slot in plan.slots if slot in self._named]
        self._written = {memory for call in plan.calls for memory in call.written}
        slopes = self._slopes(plan, factors)
        last = _last_uses(plan.calls, tape.roots)
        self._steps: list[Step] = []
        for place, call in enumerate(plan.calls):
            freed = last.get(place, ())
            if call in stacked:
                self._steps.append(product_step(call, stacked[call], [slot.index for slot in freed]))
            else:
                self._steps.append(self._step(call, slopes, freed))

    def _fits_together(self, plan: Plan, stacked: Mapping[Call, Factors]) -> bool:
        """Return True if all points may be held at once.

        Each has its own copy of the parameters that are left, so that they must be few.
        """
        names = {self._named[slot] for slot in plan.slots if slot in self._named}
        moved = sum(self.origin[name].nbytes for name in names & self.direction.keys())
        return moved <= sum(one.weight.nbytes for one in stacked.values()) / 8

    def _format(self, tensor: Tensor) -> torch.memory_format:
        return self._formats.get(tensor.dim(), torch.preserve_format)

    def _step(self, call: Call, slopes: Mapping[Slot, Tensor], dying: Sequence[Slot]) -> Step:
        if call.base is None:
            return _repetition(call, dying, bool(self._formats))
        (out,) = call.makes()
        base, along = call.base.tensor, slopes[out]
        if (layout := self._format(base)) is not torch.preserve_format:
            base, along = base.contiguous(memory_format=layout), along.contiguous(memory_format=layout)
        return _combination(out.index, base, along, self.tape.anchor)

    def _slopes(self, plan: Plan, factors: Mapping[Call, Factors]) -> dict[Slot, Tensor]:
        slopes, named = dict[Slot, Tensor](), self._named
        for call in plan.slopes:
            for slot, _ in call.reads():
                if slot in named:
                    name, origin = named[slot], self.origin[named[slot]]
                    along = self.direction[name].to(origin.dtype) if name in self.direction else None
                    slopes[slot] = torch.zeros_like(origin) if along is None else along
            (out,) = call.makes()
            slopes[out] = factors[call].slope() if call in factors else slope(call, slopes)
        return slopes

    def losses(self, etas: Etas) -> list[Tensor]:
        """Return the loss at each step size.

        Step sizes that are tensors may change between two runs of a graph.

        Raises:
            DivergedError: The model's code would take another course there.
        """
        groups = [etas] if self._is_together else [[eta] for eta in etas]
        buffers = [self._buffer() for _ in groups[0]]
        return [loss for group in groups for loss in self._losses(group, buffers)]

    def _buffer(self) -> PointBuffer:
        """Return memory for the parameters at a point."""
        tensors = {
            name: torch.empty_like(self.origin[name], memory_format=self._format(self.origin[name]))
            for _, name in self._moved
            if name in self.direction or self.tape.parameters[name].memory in self._written
        }
        return PointBuffer(tensors, self.origin, self.direction)

    def _losses(self, etas: Etas, buffers: Sequence[PointBuffer]) -> list[Tensor]:
        points = [self._point(eta, buffer) for eta, buffer in zip(etas, buffers, strict=True)]
        for step in self._steps:
            step(points, etas)
        roots = [[values[root.index].reshape(()) for root in self.tape.roots] for values in points]
        return [self.tape.unscaled(parts[0] if len(parts) == 1 else stacked(parts).sum(0)) for parts in roots]

    def _point(self, eta: float | Tensor, buffer: PointBuffer) -> list[Any]:
        """Return the values of all slots, those of parameters set."""
        buffer.move_to(eta)
        values: list[Any] = [None] * self.tape.count
        for index, name in self._moved:
            values[index] = buffer.tensors.get(name, self.origin[name])
        return values


def _combination(out: int, base: Tensor, along: Tensor, anchor: float) -> Step:
    """Return a function that computes an affine product."""

    def combine(points: Sequence[list[Any]], etas: Etas) -> None:
        for values, eta in zip(points, etas, strict=True):
            distance = eta - anchor if anchor else eta
            if isinstance(distance, Tensor):
                values[out] = torch.addcmul(base, along, distance.to(base.dtype), value=-1)
            else:
                values[out] = torch.sub(base, along, alpha=distance)

    return combine


def _repetition(call: Call, dying: Sequence[Slot], copies_views: bool) -> Step:
    """Return a function that makes a call."""
    freed = [slot.index for slot in dying]
    func = aten.reshape.default if copies_views and call.func in _RESHAPING else _in_place(call, dying)
    args = [resolved(value) for value in call.args]
    reads = [(at, value.slot.index) for at, value in enumerate(args) if isinstance(value, Read)]
    nests = [(at, value) for at, value in enumerate(args) if isinstance(value, list)]
    named = {name: resolved(value) for name, value in call.kwargs.items()}
    named_reads = any(of_type(Read, named))
    outputs = [None if slot is None else slot.index for slot in call.outputs]
    single = len(outputs) == 1

    def make(values: list[Any]) -> None:
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

    def make_at_each(points: Sequence[list[Any]], etas: Etas) -> None:
        for values in points:
            make(values)

    return make_at_each


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
