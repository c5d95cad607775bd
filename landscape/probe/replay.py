"""A call of the model and one of the criterion in the user's loop, in a form that can be repeated."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from landscape.errors import LandscapeError
from landscape.probe.messages import DERIVED_OUTPUT, NO_MODEL_CALL, WRITTEN_ARGUMENT, WRITTEN_OUTPUT
from landscape.ray.loss_module import Closure
from landscape.ray.snapshot import Autocast, ForwardSnapshot
from landscape.rng import cpu_rng_state


class _ReplayDepth(threading.local):
    """Number of replays in progress in this thread."""

    value = 0


_depth = _ReplayDepth()


@contextmanager
def replaying() -> Iterator[None]:
    """Keep probes of this thread from recording the body."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def is_replaying() -> bool:
    """Return True within the body of `replaying`."""
    return _depth.value > 0


@dataclass
class VersionedArgs:
    """Flattened arguments with the versions of their tensors.

    A version that has changed shows that the tensor was written to in place.
    """

    leaves: list[Any]
    spec: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, nest: Any) -> Self:
        """Flatten the arguments and note the present versions."""
        leaves, spec = tree_flatten(nest)
        return cls(leaves, spec, [_version(leaf) for leaf in leaves])

    def unflatten(self, function: str = "the model", outputs: Sequence[Any] = ()) -> Any:
        """Return the arguments, each `OutputRef` replaced by one of ``outputs``.

        Raises:
            LandscapeError: A tensor was written to since; the message names ``function``.
        """
        for place, (leaf, version) in enumerate(zip(self.leaves, self.versions, strict=True)):
            if version != _version(leaf):
                path = tree_flatten_with_path(tree_unflatten(self.leaves, self.spec))[0][place][0]
                raise LandscapeError(WRITTEN_ARGUMENT.format(tuple(leaf.shape), function, keystr(path)))
        leaves = [outputs[leaf.index] if isinstance(leaf, OutputRef) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def is_unwritten(self) -> bool:
        """Return True if no tensor was written to since."""
        return self.versions == [_version(leaf) for leaf in self.leaves]


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


@dataclass(frozen=True)
class CriterionState:
    """Contents of a criterion's modules, and torch's RNG state.

    A replay starts from the state before the model's call. It calls the criterion in the state in which the loop does
    only if that is the same after the model's call and before the criterion's.
    """

    contents: Sequence[dict[str, Any]]
    """Attributes and buffers of each module."""
    buffers: Sequence[tuple[Tensor, int]]
    """Buffers with their versions."""
    rng: Tensor

    @classmethod
    def capture(cls, criterion: nn.Module | None) -> Self:
        """Return the present state."""
        modules = [] if criterion is None else list(criterion.modules())
        buffers = [] if criterion is None else list(criterion.buffers())
        contents = [{**vars(module), **module._buffers} for module in modules]
        return cls(contents, [(buffer, buffer._version) for buffer in buffers], cpu_rng_state())

    def has_contents_of(self, other: Self) -> bool:
        """Return True if objects and buffer versions are the same."""
        return all(map(_are_same, self.contents, other.contents)) and all(
            a is b and version == later for (a, version), (b, later) in zip(self.buffers, other.buffers, strict=True)
        )


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


@dataclass
class ModelCall:
    """A call of the model: its state, inputs and outputs."""

    state: ForwardSnapshot
    arguments: VersionedArgs
    versions: dict[int, int]
    """Number of writes to each frozen parameter, by id."""
    depends_on_parameters: bool = False
    """True if an argument was computed from parameters."""
    outputs: VersionedArgs | None = None
    criterion_state: CriterionState | None = None
    """State of the criterion after the call."""


@dataclass(frozen=True)
class OutputRef:
    """Placeholder for a model's output among the criterion's arguments."""

    index: int


def replay(call: ModelCall, criterion: nn.Module, arguments: Any) -> Closure:
    """Return a closure that evaluates ``criterion(model(inputs), targets)`` again.

    If that cannot be evaluated again, the closure raises a LandscapeError with the reason.
    """
    try:
        return _replay(call, criterion, VersionedArgs.of(arguments))
    except LandscapeError as error:
        return raises(error)


def _replay(call: ModelCall, criterion: nn.Module, arguments: VersionedArgs) -> Closure:
    if call.outputs is None:
        raise LandscapeError(NO_MODEL_CALL)
    if not call.outputs.is_unwritten():
        raise LandscapeError(WRITTEN_OUTPUT)
    # Python shares equal numbers and texts, so one that is the same object as an output need not be the output.
    plain = int | float | str | None
    refs = {id(leaf): OutputRef(at) for at, leaf in enumerate(call.outputs.leaves) if not isinstance(leaf, plain)}
    arguments.leaves = [refs.get(id(leaf), leaf) for leaf in arguments.leaves]
    arguments.versions = [_version(leaf) for leaf in arguments.leaves]
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in arguments.leaves):
        raise LandscapeError(DERIVED_OUTPUT)
    inputs, autocast = call.arguments, Autocast.capture([state.device_type for state in call.state.autocast])

    def closure(model: nn.Module) -> Tensor:
        args, kwargs = inputs.unflatten()
        outputs = tree_flatten(model(*args, **kwargs))[0]
        args, kwargs = arguments.unflatten("the criterion", outputs)
        with Autocast.restored(autocast):
            return criterion(*args, **kwargs)

    return closure


def raises(error: LandscapeError) -> Closure:
    """Return a closure that raises the error."""

    def closure(model: nn.Module) -> Tensor:
        raise error

    return closure
