"""Replays as one graph of a GPU, which launches all of their kernels at once."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from landscape.distributed.parameter_space import write
from landscape.ray.engines.calls import Call, Constant, Read, Recording, needed_calls
from landscape.ray.engines.replay import Replay, check_repeatable
from landscape.ray.engines.tape import Tape
from landscape.ray.ray import Ray

# A graph repeats kernels with the same addresses. Parameters stay where they are; all else that a replay reads is
# copied to where it was at the capture:
#
#     the tapes of two updates    the same signature: functions, arguments, shapes, types, devices
#     first one                   replayed call by call
#     second one                  its constants and the direction are copied, the replays are captured
#     from the third one on       constants, direction and step sizes are copied into those; the graph runs
#
# Calls that draw random numbers, or return numbers to the host, are not captured.

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures the kernels that a function launches, and returns a function that launches them again."""
DEVICES = {"cuda"}
"""Types of devices that have graphs."""
CHECK_EVERY = 100
"""Runs of a graph after which it also runs at step size 0."""


class NotCapturableError(RuntimeError):
    """A tape that cannot be captured as a graph."""


def capture_on_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function launches as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Libraries allocate their workspaces.
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Inputs:
    """The tensors that a replay of a tape reads.

    Attributes:
        signature: What must be the same for the kernels to be the same.
        tensors: What is copied: constants, the direction, a loss scale.
    """

    signature: Hashable
    tensors: list[Tensor]

    @classmethod
    def of(cls, tape: Recording, ray: Ray) -> "Inputs":
        """Return the inputs of the replays along a ray.

        Raises:
            NotCapturableError: They are no graph.
        """
        calls = needed_calls(tape.calls, tape.roots)
        if tape.initial or any(call.states or call.guard is not None for call in calls):
            raise NotCapturableError("a call draws random numbers, decides by values, or writes to parameters")
        check_repeatable(calls)
        tensors, places = list[Tensor](), dict[Hashable, int]()
        for constant in chain.from_iterable(call.constants() for call in calls):
            if (key := _identity(constant.tensor)) not in places:
                places[key] = len(tensors)
                tensors.append(constant.tensor)
        tensors += [ray.direction[name] for name in sorted(ray.direction)]
        tensors += [] if tape.scale is None else [tape.scale]
        devices = {tensor.device for tensor in (*tensors, *ray.origin.values())}
        if len(devices) > 1:
            raise NotCapturableError(f"tensors are on several devices, {sorted(map(str, devices))}")
        signature = (
            tuple(_signature(call, places) for call in calls),
            tuple((name, slot.index, *_memory(ray.origin[name])) for name, slot in tape.parameters.items()),
            tuple(map(_layout, tensors)),
            tuple(sorted(ray.direction)),
            tuple(root.index for root in tape.roots),
            (len(ray.step_sizes), tape.anchor, tape.scale is None),
        )
        return cls(signature, tensors)


class Program:
    """Captured replays of a tape.

    Args:
        tape: The tape.
        ray: The ray; of its step sizes only their number matters.
        inputs: The inputs of both.
        capture: Captures what is launched.
    """

    def __init__(self, tape: Recording, ray: Ray, inputs: Inputs, capture: Capture) -> None:
        self.signature = inputs.signature
        self._tensors = [tensor.detach().clone() for tensor in inputs.tensors]
        device = self._tensors[0].device
        self._etas = torch.zeros(len(ray.step_sizes), device=device, dtype=torch.float64)
        # Origins are the parameters themselves, whose memory is part of the signature.
        places = {_identity(tensor): place for place, tensor in enumerate(inputs.tensors)}
        calls = [self._frozen(call, places) for call in needed_calls(tape.calls, tape.roots)]
        count = len(ray.direction) + (tape.scale is not None)
        moved = dict(zip(sorted(ray.direction), self._tensors[len(self._tensors) - count :], strict=False))
        scale = None if tape.scale is None else self._tensors[-1]
        self._tape = replace(tape, calls=calls, scale=scale)
        self._losses = torch.empty(0)

        def run() -> None:
            replay = Replay(self._tape, ray.origin, moved)
            self._losses = torch.stack(replay.losses(self._etas.unbind()))

        # Its stream is one of the current device, which need not be the model's.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._run = capture(run)

    def losses(self, tensors: Sequence[Tensor], step_sizes: Tensor) -> Tensor:
        """Return the losses of another tape of the signature.

        Args:
            tensors: Its inputs.
            step_sizes: (K,), on the host or the device.
        """
        write(dict(enumerate(tensors)), dict(enumerate(self._tensors)))
        self._etas.copy_(step_sizes, non_blocking=True)
        self._run()
        return self._losses.clone()

    def _frozen(self, call: Call, places: dict[Hashable, int]) -> Call:
        """Return a call that reads the copies."""

        def frozen(value: Any) -> Any:
            if isinstance(value, Constant):
                copy = Constant(self._tensors[places[_identity(value.tensor)]])
                copy.version = None
                return copy
            if isinstance(value, list):
                return [frozen(item) for item in value]
            return value

        kwargs = {name: frozen(value) for name, value in call.kwargs.items()}
        return replace(
            call, args=[frozen(value) for value in call.args], kwargs=kwargs, base=frozen(call.base), rows=None
        )


class Graphs:
    """The latest program of a probe's replays.

    A signature is captured when two updates in a row have it, and kept until two in a row have another one, so that a
    smaller last batch does not replace it.

    Args:
        capture: Captures what is launched.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or capture_on_cuda
        self._program: Program | None = None
        self._last: Hashable = None
        self._refused: Hashable = None
        self._runs = 0
        self._unchecked: list[Tensor] = []
        """Losses at step size 0, by the program and in training."""
        self._is_trusted = True

    def losses(self, tape: Tape, ray: Ray) -> Tensor | None:
        """Return the K losses, or None without a program."""
        if next(iter(ray.origin.values())).device.type not in DEVICES or not self._is_trusted:
            return None
        try:
            inputs = Inputs.of(tape, ray)
        except NotCapturableError:
            return None
        is_second, self._last = inputs.signature == self._last, inputs.signature
        if self._program is None or self._program.signature != inputs.signature:
            if not is_second or inputs.signature == self._refused:
                return None
            try:
                self._program = Program(tape, ray, inputs, self._capture)
            except (RuntimeError, NotImplementedError):  # A kernel waits for the host.
                self._refused, self._program = inputs.signature, None
                return None
        etas = torch.tensor(list(ray.step_sizes), dtype=torch.float64, device="cpu")
        self._runs += 1
        if self._runs % CHECK_EVERY == 1:
            at_zero = self._program.losses(inputs.tensors, torch.zeros_like(etas))[0]
            self._unchecked.append(torch.stack([at_zero, tape.training_loss().to(at_zero)]))
        return self._program.losses(inputs.tensors, etas)

    def check(self) -> None:
        """Compare losses at step size 0 with those of training.

        It waits for the device, and warns if they differ; then no program is run any more.
        """
        if not self._unchecked:
            return
        found, expected = torch.stack(self._unchecked).double().cpu().unbind(1)
        self._unchecked = []
        if not torch.allclose(found, expected, rtol=1e-2, equal_nan=True):
            self._is_trusted, self._program = False, None
            warnings.warn(
                f"The CUDA graph of the replays gave the losses {found.tolist()} at step size 0, where training had "
                f"{expected.tolist()}: rows since the last check are wrong. From now on there is no graph.",
                stacklevel=2,
            )


def _signature(call: Call, places: dict[Hashable, int]) -> Hashable:
    def of(value: Any) -> Hashable:
        if isinstance(value, Read):
            return "slot", value.slot.index
        if isinstance(value, Constant):
            return "constant", places[_identity(value.tensor)]
        if isinstance(value, list | tuple):
            return tuple(map(of, value))
        # Numbers of different types may be equal.
        return type(value), value if isinstance(value, Hashable) else id(value)

    kwargs = tuple((name, of(value)) for name, value in call.kwargs.items())
    outputs = tuple(None if slot is None else (slot.index, slot.affinity) for slot in call.outputs)
    return call.func, of(call.args), kwargs, of(call.base), outputs


def _identity(tensor: Tensor) -> Hashable:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), *_layout(tensor)


def _layout(tensor: Tensor) -> tuple[Hashable, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _memory(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), *_layout(tensor)
