"""Recorded calls: functions of tensors that depend on the parameters, or are constant."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
Affinity = Literal["parameter", "product"] | None


class NoTapeError(RuntimeError):
    """An update whose calls cannot be repeated."""


class DivergedError(NoTapeError):
    """A point at which the model takes another course."""


class Memory:
    """Memory of the step whose content depends on the parameters.

    Attributes:
        reference: Weak reference to the storage; None for memory that only replays have.
        slots: The tensors in it, by geometry. The first one is the base: a tensor of which nothing else is known is a
            view of it.
        is_whole: False if the base is only a part of the memory.
    """

    __slots__ = ("is_whole", "reference", "slots")

    def __init__(self, reference: StorageWeakRef | None = None) -> None:
        self.reference, self.is_whole = reference, True
        self.slots: dict[Any, Slot] = {}

    @property
    def base(self) -> "Slot":
        """The first tensor in it."""
        return next(iter(self.slots.values()))


class Slot:
    """A tensor of the step that depends on the parameters.

    Attributes:
        index: Its place in a replay.
        memory: The memory that it is in.
        geometry: Shape, strides, offset, type, and lazy bits.
        affinity: "parameter" for a parameter or a view of one, "product" for another tensor that is affine in the step
            size, otherwise None.
    """

    __slots__ = ("affinity", "geometry", "index", "memory")

    def __init__(self, index: int, memory: Memory, geometry: Any = None, affinity: Affinity = None) -> None:
        self.index, self.memory, self.geometry = index, memory, geometry
        self.affinity: Affinity = affinity


class Read(NamedTuple):
    """A slot as an argument."""

    slot: Slot
    requires_grad: bool


class Constant:
    """A tensor that is the same at all points.

    Attributes:
        tensor: The tensor, or a copy from before it was written to.
        version: Its version when it was read; None if it has none.
        is_alias: True if it is an object of its own, in memory of the step.
    """

    __slots__ = ("is_alias", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A tensor with a graph would keep the graph alive; an alias has a version of its own.
        self.is_alias = tensor.grad_fn is not None
        self.tensor = tensor.detach() if self.is_alias else tensor
        self.version = tensor._version if tensor.grad_fn is None and not tensor.is_inference() else None

    def copy(self) -> None:
        """Keep the values from before a write."""
        self.tensor, self.version, self.is_alias = self.tensor.detach().clone(), None, False

    def is_unwritten(self) -> bool:
        """Return True if the values are those that were read."""
        return self.version is None or self.tensor._version == self.version


@dataclass(slots=True, eq=False)
class Call:
    """A recorded call.

    Attributes:
        func: The ATen function; None if the tensors come from elsewhere, for which ``problem`` has the reason.
        args: Arguments, with a `Read` or `Constant` for each tensor, and a list for each list of tensors.
        kwargs: The same, by name.
        outputs: The slot of each output; None for one that is not new.
        written: Memories that it writes to.
        has_grad: True if autograd was on.
        states: Generators from which it draws, with their states before.
        guard: A number that it returned, or shapes that depend on values; None otherwise.
        base: The output of a product that is affine in the step size.
        rows: The input in training of a product with a large weight.
        scope: Number of the model's call in which it was made, from 1 on; 0 for other code.
        problem: Reason why it cannot be repeated.
    """

    func: Any
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outputs: list[Slot | None] = field(default_factory=list)
    written: Sequence[Memory] = ()
    has_grad: bool = True
    states: Sequence[tuple[Any, Tensor]] = ()
    guard: Any = None
    base: Constant | None = None
    rows: Constant | None = None
    scope: int = 0
    problem: str | None = None

    def is_decision(self, scopes: Container[int]) -> bool:
        """Return True if the model reads values here.

        It may branch on them. Only calls of the model with a number in ``scopes`` are of interest.
        """
        return self.guard is not None and not isinstance(self.guard, list) and self.scope in scopes

    def reads(self) -> Iterator[Read]:
        """Yield the slots among the arguments."""
        yield from of_type(Read, (self.args, self.kwargs))

    def constants(self) -> Iterator[Constant]:
        """Yield the constants that it holds."""
        yield from of_type(Constant, (self.args, self.kwargs, self.base, self.rows))

    def makes(self) -> Iterator[Slot]:
        """Yield the new slots among the outputs."""
        return (slot for slot in self.outputs if slot is not None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """Recorded calls, and what is needed to repeat them.

    Attributes:
        calls: The calls, in order.
        parameters: The slots of the moved parameters, by name.
        initial: Values of parameters before the forward pass wrote to them.
        roots: Slots of which the loss is the sum.
        count: Number of slots.
        scale: Factor of the roots that the loss is without, such as a loss scale; None is 1.
        anchor: The step size at which the calls were recorded.
        has_functions: True if an ``autograd.Function`` took part, whose derivative is its own.
    """

    calls: Sequence[Call]
    parameters: Mapping[str, Slot]
    initial: Mapping[str, Tensor]
    roots: Sequence[Slot]
    count: int
    scale: Tensor | None = None
    anchor: float = 0.0
    has_functions: bool = False

    def reads_parameters(self) -> bool:
        """Return True if the roots depend on a parameter."""
        parameters = set(self.parameters.values())
        return any(slot in parameters for call in needed_calls(self.calls, self.roots) for slot, _ in call.reads())

    def unscaled(self, loss: Tensor) -> Tensor:
        """Return a sum of roots without the scale."""
        return loss if self.scale is None else loss / self.scale.to(loss)


def needed_calls(calls: Sequence[Call], roots: Iterable[Slot], alive: Collection[Memory] = ()) -> list[Call]:
    """Return the calls on which slots depend, in order.

    Args:
        calls: All calls, in order.
        roots: The slots.
        alive: Memories that later calls may read.
    """
    slots = set(roots)
    memories = {root.memory for root in roots} | set(alive)
    needed, scopes = [], set[int]()
    for call in reversed(calls):
        is_read = any(slot in slots or slot.memory in alive for slot in call.makes())
        if is_read or any(memory in memories for memory in call.written) or call.is_decision(scopes):
            needed.append(call)
            scopes.add(call.scope)
            for slot, _ in call.reads():
                slots.add(slot)
                memories.add(slot.memory)
    return needed[::-1]


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
    return found


def of_type(kind: type[T], values: Any) -> Iterator[T]:
    """Yield the objects of a type in nested containers."""
    if isinstance(values, kind):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from of_type(kind, value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from of_type(kind, value)
