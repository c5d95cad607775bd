"""Records the ATen calls of a training step that depend on its parameters."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from landscape.ray.engines.calls import Call, Constant, NoTapeError, Read, Slot, of_type, tensors_of
from landscape.ray.engines.exports import unwatch_exports, watch_exports
from landscape.ray.engines.factors import input_of
from landscape.ray.engines.functions import FunctionTraits, function_traits, list_versions, rng_states
from landscape.ray.engines.slopes import affinity
from landscape.ray.engines.slots import PRUNED, SlotTable, key_of
from landscape.ray.engines.tape import Tape
from landscape.ray.graph import graph_nodes
from landscape.ray.loss_module import LossModule

aten = torch.ops.aten

# How a step is recorded. `W` is a moved parameter, `x` the batch; the memory of W is the first that depends on the step
# size. Calls with no argument in such memory run once, in training, and are constants of all replays:
#
#     the loop            call                      recorded
#     x = x / 255         div(x, 255)               nothing: x is a constant
#     h = linear(x, W)    t(W) -> 1                 Call t: slot 0 (W) -> slot 1, a view in the memory of W
#                         mm(x, 1) -> 2             Call mm: constant x, slot 1 -> slot 2, new memory, which is kept
#     mask = rand() > p   rand, gt                  nothing: a constant, so all points have the same mask
#     h.mul_(mask)        mul_(2, mask)             Call mul_: writes to the memory of slot 2
#     loss = h.sum()      sum(2) -> 3               Call sum: slot 2 -> slot 3
#     loss.backward()                               the root is slot 3; the mode is left for the backward pass
#
# A tensor is known by its memory and geometry, not by its Python object: autograd makes new objects for views.

_BOUNDARIES = {nn.Module._call_impl.__code__, torch.autograd.Function.apply.__func__.__code__}
"""Code through which the loop enters modules and functions, which a replay repeats as a whole."""
_PLAIN = torch._C._disabled_torch_dispatch_impl
"""The method of classes of tensors that the dispatcher treats as tensors."""


class Recorder(TorchDispatchMode):
    """A mode that records the calls that depend on parameters.

    It changes nothing in the step: each call is made once, with the arguments it has. What the step computes from
    parameters depends on them, with two exceptions, which make a replay the function that is differentiated:

    - In the code of the loop, outside of modules, a floating-point tensor that does not require gradients is a
      constant: a target, a teacher's output, an adversarial example. So is all that is computed without gradients.
    - What leaves torch (``item``, ``numpy``, ``tolist``) is a constant in the code of the loop, such as a log. Within a
      module it may decide what the module does, so a point with another value is not replayed.

    Args:
        parameters: The moved parameters, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._table = SlotTable(parameters)
        self.problem: str | None = None
        """Reason why nothing is recorded any more."""
        self.has_functions = False
        """True if a root depends on an ``autograd.Function``, whose derivative is its own."""
        self._foreign: dict[int, StorageWeakRef] = {}
        """Memory of tensors that require gradients of other parameters only."""
        self._blank: dict[int, StorageWeakRef] = {}
        """Memory that no call has written to yet."""
        self._depth = self._muted = self._scopes = self._scope = 0
        self._next_clean = PRUNED
        self._thread: tuple[int, int] | None = None
        """Process and thread in which it records; elsewhere, it makes calls and does nothing else."""
        self._last_error: Any = None

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return self._table.calls

    @property
    def roots(self) -> list[Slot]:
        """Differentiated sums, which later calls do not read."""
        return self._table.roots

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code runs as without the mode."""
        return True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Let dependence follow the data in the body."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def enter(self, muted: bool) -> None:
        """Begin a call of the model, constant if ``muted``."""
        self._muted += muted
        self._scopes += 1
        self._scope = self._scopes

    def leave(self, muted: bool) -> None:
        """End a call of the model."""
        self._muted -= muted
        self._scope = 0

    def is_outermost(self, modules: Sequence[nn.Module]) -> bool:
        """Return True if the loop itself has called a module.

        It is one of ``modules``, whose hooks run now.
        """
        boundary = _boundary()
        return not self._depth and boundary is not None and boundary.f_locals.get("self") in modules

    @property
    def is_active(self) -> bool:
        """True if the mode is on this thread's stack."""
        return any(mode is self for mode in dispatch._get_current_dispatch_mode_stack())

    def start(self) -> None:
        """Record from now on.

        The mode is put below those of others, which take the uppermost off the stack when they are left.
        """
        self._last_error = _last_error()
        if not self.is_active:
            # Without the flags of __enter__, which would keep models from being compiled.
            above = []
            while (stack := dispatch._get_current_dispatch_mode_stack()) and not stack[-1].is_infra_mode():
                above.append(dispatch._pop_mode())
            # A recorder that was stopped in another thread is still on the stack of its own.
            kept = [mode for mode in reversed(above) if not isinstance(mode, Recorder) or mode._thread is not None]
            for mode in (self, *kept):
                dispatch._push_mode(mode)
        self._thread = _here()
        watch_exports(self)

    def stop(self) -> None:
        """Record nothing from now on."""
        self._thread = None
        unwatch_exports(self)
        if self.is_active:
            above = []
            while (mode := dispatch._pop_mode()) is not self:
                above.append(mode)
            for mode in reversed(above):
                dispatch._push_mode(mode)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the body."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def add_root(self, tensors: Sequence[Tensor], factors: Sequence[Tensor | None]) -> Slot:
        """Return the slot of a differentiated sum.

        The sum is ``(tensor * factor).sum()`` over the tensors, a factor of None being 1. It is computed in replays
        alone, so later writes to the tensors do not matter.
        """
        with self.inside():
            addends = [self._addend(tensor, factor) for tensor, factor in zip(tensors, factors, strict=True)]
        root = addends[0]
        for addend, tensor in zip(addends[1:], tensors[1:], strict=True):
            if tensor.device != tensors[0].device:
                addend = self._table.add_replayed(aten.to.device, Read(addend, True), tensors[0].device, tensor.dtype)
            root = self._table.add_replayed(aten.add.Tensor, Read(root, True), Read(addend, True))
        self._table.roots.append(root)
        nodes = [node for tensor in tensors for node in graph_nodes(tensor)]
        self.has_functions |= any(isinstance(node, BackwardCFunction) and not _is_operator(node) for node in nodes)
        if any(node.name().startswith("CompiledFunction") for node in nodes):
            self._table.append(Call(None, outputs=[root], problem="a part of it is compiled by torch.compile"))
        return root

    def tape(
        self,
        roots: Sequence[Slot],
        loss_module: LossModule,
        value: Tensor,
        scale: Tensor | None = None,
        anchor: float = 0.0,
    ) -> Tape:
        """Return the recorded calls as a function of parameters.

        The arguments are attributes of `Tape`.

        Raises:
            NoTapeError: They were not recorded.
        """
        if self.problem is not None:
            raise NoTapeError(self.problem)
        return Tape(
            calls=list(self._table.calls),
            parameters=dict(self._table.parameters),
            initial=dict(self._table.initial),
            roots=roots,
            count=self._table.count,
            loss_module=loss_module,
            value=value,
            scale=scale,
            anchor=anchor,
            has_functions=self.has_functions,
        )

    def rename(self, names: Mapping[int, str]) -> None:
        """Use the present names, by the id of a parameter.

        The loop may reparametrize the model between the start of the recording and the forward pass.

        Raises:
            NoTapeError: The model has other parameters by now.
        """
        if names.keys() != self._table.ids.keys():
            raise NoTapeError("the model has other parameters than when the recording began")
        if names != self._table.ids:
            new = {name: names[id(tensor)] for name, tensor in self._table.held.items()}
            self._table.parameters = {new[name]: slot for name, slot in self._table.parameters.items()}
            self._table.initial = {new[name]: tensor for name, tensor in self._table.initial.items()}

    def note_export(self, tensor: Tensor) -> None:
        """Note that values leave torch.

        The code may decide what to do by them.
        """
        self._blank.pop(key_of(tensor), None)
        if self._is_recording() and not self._is_loop_code() and self._depends(tensor):
            read = Read(self._table.slot_of(tensor), tensor.requires_grad)
            self._table.append(Call(aten.detach.default, [read], guard=tensor.detach().clone(), scope=self._scope))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_recording():
            return func(*args, **kwargs)
        try:
            call, is_unseen = self._before(func, types, args, kwargs)
        except Exception as error:  # The call is the user's, and must be made.
            self._fail(error)
            return func(*args, **kwargs)
        versions = list_versions(func, args)
        result = func(*args, **kwargs)
        for tensor, version in versions:
            if tensor._version == version:
                increment_version(tensor)
        try:
            self._after(func, args, kwargs, call, is_unseen, result)
        except Exception as error:
            self._fail(error)
        return result

    def _is_recording(self) -> bool:
        if self._thread != _here() or torch.is_inference_mode_enabled():
            return False
        if _last_error() is not self._last_error:  # The loop has ended by an error, in a notebook or a console.
            self._thread = None
        return self._thread is not None

    def _fail(self, error: Exception) -> None:
        self.problem, self._thread = f"recording has failed ({type(error).__name__}: {error})", None

    def _before(self, func: Any, types: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Call | None, bool]:
        """Return the call if it is to be recorded.

        The second value is True if it depends on the parameters but cannot be recorded.
        """
        tensors = tensors_of(args) + tensors_of(kwargs.values()) if kwargs else tensors_of(args)
        if not isinstance(func, OpOverload) or any(kind.__torch_dispatch__ is not _PLAIN for kind in types):
            return None, any(self._depends(tensor) for tensor in tensors)
        traits = function_traits(func)
        written = tensors_of(args[at] if isinstance(at, int) else kwargs.get(at) for at in traits.written)
        if self._blank and not (traits.is_view or traits.is_shape_only):
            self._find_unseen_writes(tensors, written)
        depends = {id(tensor): self._depends(tensor) for tensor in tensors}
        if any(key_of(tensor) in self._table.parameter_keys for tensor in written) and self._is_loop_code():
            self._table.restart()
        elif (any(depends.values()) and not traits.is_shape_only) or any(
            key_of(tensor) in self._table.memories for tensor in written
        ):
            return self._call(func, traits, args, kwargs, written, depends), False
        self._table.copy_before_write(written)
        return None, False

    def _call(
        self,
        func: Any,
        traits: FunctionTraits,
        args: Any,
        kwargs: Mapping[str, Any],
        written: Sequence[Tensor],
        depends: dict[int, bool],
    ) -> Call:
        """Return a call before it is made.

        ``depends`` has an entry for each tensor, by id.
        """
        self._table.copy_before_write(written)
        for tensor in written:
            depends[id(tensor)] = True
            if (key := key_of(tensor)) not in self._table.memories:
                self._table.add_written_constant(tensor)
            elif key in self._table.parameter_keys:
                for name in self._table.parameters:
                    if name not in self._table.initial and key_of(self._table.held[name]) == key:
                        self._table.initial[name] = self._table.held[name].detach().clone()
        recorded_args = [self._table.argument(value, depends) for value in args]
        recorded_kwargs = {name: self._table.argument(value, depends) for name, value in kwargs.items()}
        memories = list(
            {self._table.memories[key] for tensor in written if (key := key_of(tensor)) in self._table.memories}
        )
        states = rng_states(func, args, kwargs) if traits.draws else ()
        call = Call(
            func, recorded_args, recorded_kwargs, [], memories, torch.is_grad_enabled(), states, scope=self._scope
        )
        if (rows := input_of(call, args)) is not None:
            call.rows = self._table.kept(rows)
        return call

    def _after(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], call: Call | None, is_unseen: bool, result: Any
    ) -> None:
        """Record the call with its result."""
        if is_unseen:
            self._table.add_unknown(result, f"{func} is not a plain function of tensors")
        elif call is None:
            self._note_constants(func, args, kwargs, result)
        elif (traits := function_traits(func)).is_collective or traits.replaces_memory:
            written = [args[at] if isinstance(at, int) else kwargs.get(at) for at in traits.written]
            self._table.add_unknown((result, written), f"{func} cannot be repeated")
        elif not traits.is_in_place_view:  # The tensor is another view of its memory then.
            affine = affinity(call)
            for memory in call.written:
                for slot in memory.slots.values():
                    slot.affinity = None
            if isinstance(result, Tensor | tuple | list):
                self._table.add_outputs(call, result, affine)
                if traits.is_guarded:
                    call.guard = [tuple(tensor.shape) for tensor in of_type(Tensor, result)]
            elif result is not None and not self._is_loop_code():
                call.guard = result
            if call.written or call.guard is not None or any(slot is not None for slot in call.outputs):
                self._table.append(call)

    def _note_constants(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Note the outputs of a call that is not recorded."""
        if isinstance(func, OpOverload) and function_traits(func).is_blank:
            # A function that fills memory in the shape of what it is given, such as a kernel of one's own.
            likely = any(key_of(tensor) in self._table.memories for tensor in tensors_of(args))
            for tensor in of_type(Tensor, result):
                if likely and tensor.numel() and tensor.layout is torch.strided:
                    self._blank[key_of(tensor)] = StorageWeakRef(tensor.untyped_storage())
        elif any(tensor.requires_grad for tensor in tensors_of((*args, *kwargs.values()))):
            for output in of_type(Tensor, result):
                self._add_foreign(output)

    def _find_unseen_writes(self, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Mark blank memory that is read.

        A kernel has written to it that the dispatcher does not see.
        """
        for tensor in written:
            self._blank.pop(key_of(tensor), None)
        for tensor in tensors:
            if self._blank.pop(key_of(tensor), None) is not None:
                self._table.add_unknown(tensor, "a kernel that the dispatcher does not see has written to a tensor")

    def _add_foreign(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or (key := key_of(tensor)) in self._foreign:
            return
        self._foreign[key] = StorageWeakRef(tensor.untyped_storage())
        if len(self._foreign) + len(self._blank) > self._next_clean:
            for known in (self._foreign, self._blank):
                for expired in [key for key, reference in known.items() if reference.expired()]:
                    del known[expired]
            self._next_clean = 2 * (len(self._foreign) + len(self._blank)) + PRUNED

    def _depends(self, tensor: Tensor) -> bool:
        """Return True if a tensor depends on the parameters.

        One that requires gradients without being known was made before the recording, or by code that the dispatcher
        does not see, such as compiled code. Autograd's graph shows whether it depends on them.
        """
        if self._muted:
            return False
        key = key_of(tensor)
        if key not in self._table.memories and (name := self._table.ids.get(id(tensor))) is not None:
            if name in self._table.parameters:
                self._table.restart()  # The loop has given the parameter another memory.
            self._table.add_parameter(name, tensor)
        if key in self._table.memories:
            return not self._is_cut_off(tensor)
        if not tensor.requires_grad or tensor.grad_fn is None or key in self._foreign:
            return False
        if any(id(leaf) in self._table.ids for leaf in leaves_of(tensor)):
            self._table.add_unknown(tensor, "it was computed before the forward pass, or by compiled code")
            return True
        self._add_foreign(tensor)
        return False

    def _is_cut_off(self, tensor: Tensor) -> bool:
        """Return True if a tensor is constant where used.

        It depends on the parameters, but is cut off from autograd's graph.
        """
        has_grad = torch.is_grad_enabled()
        if (has_grad and tensor.requires_grad) or self._depth or torch._C._current_graph_task_id() != -1:
            return False
        # Indices and masks have no gradients by their type, which does not show that they are meant to be constant.
        is_meant = tensor.is_floating_point() or tensor.is_complex()
        if (boundary := _boundary()) is None:
            return is_meant or not has_grad
        if not is_meant or tensor.requires_grad:
            return False
        given = tensors_of((*boundary.f_locals.get("args", ()), *(boundary.f_locals.get("kwargs") or {}).values()))
        return any(other is tensor for other in given)

    def _is_loop_code(self) -> bool:
        """Return True outside of modules."""
        return not self._depth and _boundary() is None

    def _addend(self, tensor: Tensor, factor: Tensor | None) -> Slot:
        value = self._table.add_replayed(
            aten.clone.default, self._table.argument(tensor, {id(tensor): self._depends(tensor)})
        )
        if factor is not None:
            value = self._table.add_replayed(aten.mul.Tensor, Read(value, True), Constant(factor))
        return self._table.add_replayed(aten.sum.default, Read(value, True)) if tensor.dim() else value


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a tensor's graph."""
    for node in graph_nodes(tensor):
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable


def _is_operator(node: BackwardCFunction) -> bool:
    """Return True for the derivative of an operator.

    A replay calls the operator, and so has its derivative, too.
    """
    return getattr(getattr(node, "_forward_cls", None), "is_operator", False)


def _boundary() -> FrameType | None:
    """Return the outermost call of a module or Function."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code in _BOUNDARIES:
            found = frame
        frame = frame.f_back
    return found


def _here() -> tuple[int, int]:
    """Return process and thread.

    A process that was forked has the modes of its parent.
    """
    return os.getpid(), threading.get_ident()


def _last_error() -> Any:
    """Return the last unhandled error of an interactive Python."""
    return getattr(sys, "last_value", None)
