"""A call of the model and one of the criterion in the user's loop, kept in a form that can be made again."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from landscape.errors import LandscapeError
from landscape.ray.linear_cache import CachedLinear
from landscape.ray.snapshot import Autocast, Closure, ForwardSnapshot


class _Replays(threading.local):
    """Number of replays that are under way in this thread: what models do then is not training, to any probe."""

    depth = 0


_replays = _Replays()


@contextmanager
def replaying() -> Iterator[None]:
    """No capture listens within the body."""
    _replays.depth += 1
    try:
        yield
    finally:
        _replays.depth -= 1


def is_replaying() -> bool:
    """Whether a replay is under way in this thread."""
    return _replays.depth > 0


OBSERVE = "Hand the loss to the probe: `loss = probe.observe(lambda model: ...)`, once for each backward pass"


@dataclass
class VersionedArgs:
    """A nest of arguments, flattened, with the versions of its tensors, so that a later write in place is noticed."""

    leaves: list[Any]
    spec: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, nest: Any) -> "VersionedArgs":
        """The tensors of the nest as they are now."""
        leaves, spec = tree_flatten(nest)
        return cls(leaves, spec, [_version(leaf) for leaf in leaves])

    def nest(self, what: str = "the model", outputs: Sequence[Any] = ()) -> Any:
        """The arguments of ``what``, around the model's ``outputs``; an error if one has been written to since."""
        self.check(what)
        leaves = [outputs[leaf.index] if isinstance(leaf, OutputRef) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def check(self, what: str) -> None:
        """Raise a LandscapeError if one of these, arguments of ``what``, has been written to since."""
        for place, (leaf, version) in enumerate(zip(self.leaves, self.versions, strict=True)):
            if version != _version(leaf):
                paths = tree_flatten_with_path(tree_unflatten(self.leaves, self.spec))[0]
                raise LandscapeError(
                    f"The tensor {tuple(leaf.shape)} among the arguments of {what} ({keystr(paths[place][0])}) was "
                    "overwritten before the optimizer's step, so that the loss cannot be computed again. Pass a copy "
                    "of it: tensor.clone()."
                )

    def unwritten(self) -> bool:
        """Whether none of them has been written to."""
        return self.versions == [_version(leaf) for leaf in self.leaves]


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


@dataclass
class ModelCall:
    """A call of the model in the user's loop: the state it ran in, what went in and what came out."""

    state: ForwardSnapshot
    arguments: VersionedArgs
    versions: dict[int, int]
    is_carried: bool = False
    """Whether an argument was computed from parameters."""
    outputs: VersionedArgs | None = None
    left: Any = None
    """What the criterion's modules held, and the random stream, when the model was through."""
    bases: list[CachedLinear] = field(default_factory=list)


@dataclass(frozen=True)
class OutputRef:
    """Stands for an output of the model among the arguments of the criterion."""

    index: int


def replay(call: ModelCall, criterion: nn.Module, arguments: Any) -> Closure:
    """The closure that evaluates ``criterion(model(inputs), targets)`` again, or one that says why it cannot be."""
    try:
        return _tied(call, criterion, VersionedArgs.of(arguments))
    except LandscapeError as error:
        return raises(error)


def _tied(call: ModelCall, criterion: nn.Module, arguments: VersionedArgs) -> Closure:
    if call.outputs is None:
        raise LandscapeError(f"The criterion was called without a call of the model before it. {OBSERVE}.")
    if not call.outputs.unwritten():
        raise LandscapeError(f"An output of the model was changed in place after the probe saw it. {OBSERVE}.")
    # Numbers and texts may be the same objects as outputs without being outputs.
    plain = int | float | str | None
    places = {id(leaf): OutputRef(at) for at, leaf in enumerate(call.outputs.leaves) if not isinstance(leaf, plain)}
    arguments.leaves = [places.get(id(leaf), leaf) for leaf in arguments.leaves]
    arguments.versions = [_version(leaf) for leaf in arguments.leaves]
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in arguments.leaves):
        raise LandscapeError(
            "The criterion was given a tensor that was computed from the model's outputs (or by another call of the "
            f"model), so criterion(model(inputs), targets) is not the training loss. {OBSERVE}."
        )
    kinds = [autocast.device_type for autocast in call.state.autocast]
    inputs, autocast = call.arguments, Autocast.capture(kinds)

    def closure(model: nn.Module) -> Tensor:
        args, kwargs = inputs.nest()
        outputs = tree_flatten(model(*args, **kwargs))[0]
        args, kwargs = arguments.nest("the criterion", outputs)
        with Autocast.restored(autocast):
            return criterion(*args, **kwargs)

    return closure


def raises(error: LandscapeError) -> Closure:
    """A closure that raises the error, once the loss is asked for."""

    def closure(model: nn.Module) -> Tensor:
        raise error

    return closure
