"""The tensors of a step that depend on the parameters, and the calls that make them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from landscape.ray.engines.calls import Affinity, Call, Constant, Memory, Read, Slot, needed_calls, of_type

aten = torch.ops.aten

NO_MEMORY = -1
"""Key of tensors without memory, such as those of other libraries."""
PRUNED = 1000
"""Calls after which those are dropped on which nothing depends any more."""
PRUNED_BYTES = 256 << 20
"""Bytes of constants after which the same happens."""


class SlotTable:
    """Slots by memory and geometry, constants by memory, and calls.

    A tensor is known by its memory and geometry, not by its Python object: autograd makes new objects for views.

    Args:
        held: The moved parameters, by name.

    Attributes:
        calls: The calls so far.
        parameters: The slots of the parameters, by name.
        initial: Values of parameters before the model's code wrote to them.
        roots: Differentiated sums, which later calls do not read.
        count: Number of slots.
        ids: Names of the parameters by their ids.
        memories: Memory that depends on the parameters, by key.
        parameter_keys: Keys of the memory of the parameters themselves.
    """

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = held
        self.calls: list[Call] = []
        self.parameters: dict[str, Slot] = {}
        self.initial: dict[str, Tensor] = {}
        self.roots: list[Slot] = []
        self.count = 0
        self.ids = {id(tensor): name for name, tensor in held.items()}
        self.memories: dict[int, Memory] = {}
        self.parameter_keys: set[int] = set()
        self._constants: dict[int, list[Constant]] = {}
        """Constants by memory, of which a copy must be made before a write."""
        self._bytes = 0
        """Bytes of constants since the last pruning."""
        self._next_prune, self._next_bytes = PRUNED, PRUNED_BYTES
        for name, tensor in held.items():
            self.add_parameter(name, tensor)

    def append(self, call: Call) -> None:
        """Add a call; drop earlier ones if there are many."""
        self.calls.append(call)
        if len(self.calls) >= self._next_prune or self._bytes >= self._next_bytes:
            self.prune()

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Add a parameter, unless it is lazy or known."""
        if is_lazy(tensor) or (key := key_of(tensor)) == NO_MEMORY or name in self.parameters:
            return
        memory = self.memories.setdefault(key, Memory(StorageWeakRef(tensor.untyped_storage())))
        is_shared = bool(memory.slots)  # as are parts of a flat buffer, each of which is moved by itself
        memory.is_whole = not is_shared and tensor.nbytes == tensor.untyped_storage().nbytes()
        if _geometry(tensor) in memory.slots:
            self.add_unknown(tensor, "two parameters are the same memory")
        self.parameters[name] = memory.slots.get(_geometry(tensor)) or self._slot_in(memory, tensor, "parameter")
        self.parameter_keys.add(key)

    def restart(self) -> None:
        """Forget what was computed from earlier parameters.

        The loop may load a checkpoint, or swap weights for an evaluation. Tensors from before are found by autograd's
        graph.
        """
        if not self.calls and all(key_of(self.held[name]) in self.memories for name in self.parameters):
            return
        self.calls, self.parameters, self.initial = [], {}, {}
        self.memories = {}  # but constants are those of a tape, too
        self.parameter_keys.clear()
        for name, tensor in self.held.items():
            self.add_parameter(name, tensor)

    def add_outputs(self, call: Call, result: Any, affine: Affinity) -> None:
        """Give each new output a slot."""
        for output in [result] if isinstance(result, Tensor) else result:
            if not isinstance(output, Tensor):
                call.outputs.append(None)
                if isinstance(output, list | tuple):
                    self.add_unknown(output, f"{call.func} returns a nest of tensors")
                continue
            key = key_of(output)
            if (memory := self.memories.get(key)) is not None:  # A view, or an argument.
                known = _geometry(output) in memory.slots
                call.outputs.append(None if known else self._slot_in(memory, output, affine))
            elif output.layout is not torch.strided:
                call.outputs.append(None)
                self.add_unknown(output, f"{call.func} returns a {output.layout} tensor")
            else:
                memory = self.memories[key] = Memory(StorageWeakRef(output.untyped_storage()))
                call.outputs.append(self._slot_in(memory, output, affine))
                if affine == "product" and output.dtype in (torch.float32, torch.float64):
                    call.base = self.kept(output)

    def kept(self, tensor: Tensor) -> Constant:
        """Keep the values of a tensor that depends on parameters."""
        constant = Constant(tensor.detach())
        constant.version, constant.is_alias = None, True
        self._constants.setdefault(key_of(tensor), []).append(constant)
        return constant

    def argument(self, value: Any, depends: Mapping[int, bool]) -> Any:
        """Return a value with each tensor's `Read` or `Constant`."""
        if isinstance(value, Tensor):
            if depends[id(value)]:
                return Read(self.slot_of(value), value.requires_grad)
            constant = Constant(value)
            self._bytes += value.nbytes if value.layout is torch.strided else 0
            if (key := key_of(value)) != NO_MEMORY:
                self._constants.setdefault(key, []).append(constant)
            return constant
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            return [self.argument(item, depends) for item in value]
        return value

    def slot_of(self, tensor: Tensor) -> Slot:
        """Return the slot of a tensor."""
        memory = self.memories.get(key_of(tensor))
        if memory is None or tensor.layout is not torch.strided:
            slot = self.add_replayed(None)
            self.calls[-1].problem = f"a {tensor.layout} tensor depends on the parameters"
            return slot
        if (slot := memory.slots.get(_geometry(tensor))) is not None:
            return slot
        # It was made out of sight, as by `.data`, or before its memory depended on the parameters.
        base, slot = memory.base, self._slot_in(memory, tensor, None)
        strided = [Read(base, tensor.requires_grad), tensor.shape, tensor.stride(), tensor.storage_offset()]
        problem = None
        if not memory.is_whole or base.geometry[3:] != slot.geometry[3:]:
            problem = "it is a view of memory that several parameters share, or of another type than the memory"
        self.calls.append(Call(aten.as_strided.default, strided, {}, [slot], problem=problem))
        return slot

    def add_replayed(self, func: Any, *args: Any) -> Slot:
        """Record a call that only replays make."""
        memory = Memory()
        slot = memory.slots[None] = self._new_slot(memory)
        self.calls.append(Call(func, args, outputs=[slot]))
        return slot

    def add_written_constant(self, tensor: Tensor) -> None:
        """Let memory depend on the parameters from now on.

        A replay starts from a copy of it.
        """
        if (key := key_of(tensor)) == NO_MEMORY:
            return
        storage = tensor.untyped_storage()
        whole = tensor.new_empty(0).set_(storage)
        memory = self.memories[key] = Memory(StorageWeakRef(storage))
        constant = Constant(whole.clone())
        self.calls.append(Call(aten.clone.default, [constant], {}, [self._slot_in(memory, whole, None)]))

    def add_unknown(self, values: Any, problem: str) -> None:
        """Mark tensors whose dependence cannot be repeated."""
        for tensor in of_type(Tensor, values):
            if (storage := _storage_of(tensor)) is None:
                continue
            # The reference keeps the key from becoming that of other memory.
            memory = self.memories.setdefault(storage._cdata, Memory(StorageWeakRef(storage)))
            geometry = _geometry(tensor) if tensor.layout is torch.strided else None
            if (slot := memory.slots.get(geometry)) is None:
                slot = memory.slots[geometry] = self._new_slot(memory, geometry)
            slot.affinity = None
            self.calls.append(Call(None, [], {}, [slot], [memory], problem=problem))

    def copy_before_write(self, written: Sequence[Tensor]) -> None:
        """Copy constants before their memory is written to."""
        for tensor in written:
            for constant in self._constants.pop(key_of(tensor), ()):
                constant.copy()

    def prune(self) -> None:
        """Drop calls on which nothing that is alive depends."""
        alive = {memory for key, memory in self.memories.items() if self._is_alive(key, memory)}
        self.calls = needed_calls(self.calls, self.roots, alive)
        held = {id(constant) for call in self.calls for constant in call.constants()}
        kept = {key: [one for one in constants if id(one) in held] for key, constants in self._constants.items()}
        self._constants = {key: constants for key, constants in kept.items() if constants}
        self.memories = {key: memory for key, memory in self.memories.items() if memory in alive}
        self._next_prune, self._bytes = 2 * len(self.calls) + PRUNED, 0
        strided = [one.tensor for constants in kept.values() for one in constants if one.tensor.layout is torch.strided]
        self._next_bytes = sum(tensor.nbytes for tensor in strided) + PRUNED_BYTES

    def _slot_in(self, memory: Memory, tensor: Tensor, affine: Affinity) -> Slot:
        geometry = _geometry(tensor)
        slot = memory.slots[geometry] = self._new_slot(memory, geometry, affine)
        return slot

    def _new_slot(self, memory: Memory, geometry: Any = None, affine: Affinity = None) -> Slot:
        self.count += 1
        return Slot(self.count - 1, memory, geometry, affine)

    def _is_alive(self, key: int, memory: Memory) -> bool:
        """Return True if the step still has a tensor there."""
        own = {id(constant.tensor) for constant in self._constants.get(key, ()) if constant.is_alias}
        is_freed = memory.reference is None or memory.reference.expired()
        return not is_freed and torch._C._storage_Use_Count(key) > len(own)


def key_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, or `NO_MEMORY`."""
    storage = _storage_of(tensor)
    return NO_MEMORY if storage is None else storage._cdata


def _storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage, for sparse tensors that of values."""
    if tensor.layout is torch.strided:
        return tensor.untyped_storage()
    if tensor.layout is torch.sparse_coo:
        return tensor._values().untyped_storage()
    is_compressed = tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.values().untyped_storage() if is_compressed else None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    bits = (tensor.is_conj(), tensor.is_neg()) if tensor.is_complex() or tensor.is_neg() else (False, False)
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, bits
