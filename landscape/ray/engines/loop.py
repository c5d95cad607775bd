"""The plain loop: one forward pass per point."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape.errors import LandscapeError
from landscape.ray.engines.calls import tensors_of
from landscape.ray.engines.slots import NO_MEMORY, key_of
from landscape.ray.loss_module import Closure
from landscape.ray.objective import Objective
from landscape.ray.ray import ParametersAlongRay, Ray


def loop(ray: Ray) -> Tensor:
    """Return the K losses, one point after the other.

    It is the reference for the tape, and the fallback. It calls the user's code again: the objective is an `Objective`.
    """
    return _losses(ray, ParametersAlongRay(ray), lambda closure: closure)


def checked_loop(ray: Ray) -> Tensor:
    """Return the K losses, unless they are of other parameters.

    They are those of `loop`.

    Raises:
        LandscapeError: All losses are the same, and forward passes read none of the parameters that move.
    """
    if ray.objective.space.is_sharded:  # Forward passes read gathered copies.
        return loop(ray)
    along = ParametersAlongRay(ray)
    reads = Reads(along.point.values())
    losses = _losses(ray, along, reads.watching)
    # The values are read only in this case, as reading them waits for an accelerator.
    if not reads.found and len(losses) > 1 and bool((losses == losses[0]).all()):
        raise LandscapeError(
            f"The loss does not depend on {next(iter(ray.direction))!r}, nor on another parameter that moves: when it "
            "is computed again, it does not read them from the modules, but from elsewhere (a closure, a cache, a "
            "captured CUDA graph, an object around outputs that were computed before), so no ray can be measured. Let "
            "the forward pass read them from the modules of the model that it is given."
        )
    return losses


class Reads(TorchDispatchMode):
    """A mode that notes if a call reads certain tensors.

    Attributes:
        found: True if one does, or if it cannot be known.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._keys = {key_of(tensor) for tensor in tensors}
        # Of tensors of other libraries it is not known.
        self.found = NO_MEMORY in self._keys

    def watching(self, closure: Closure) -> Closure:
        """Return the closure, watched."""

        def watched(model: nn.Module) -> Tensor:
            if self.found:
                return closure(model)
            with self:
                return closure(model)

        return watched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.found:
            self.found = any(key_of(tensor) in self._keys for tensor in tensors_of((*args, *kwargs.values())))
        return func(*args, **kwargs)


def _losses(ray: Ray, along: ParametersAlongRay, watching: Callable[[Closure], Closure]) -> Tensor:
    """Return the losses of terms whose closures are watched."""
    assert isinstance(ray.objective, Objective)
    moves = along.moves(ray.step_sizes)
    terms = [replace(term, closure=watching(term.closure)) for term in ray.objective.terms]
    with torch.no_grad(), ray.objective.rng_restored():
        columns = [torch.stack(term.losses(along.point, moves)) for term in terms]
        return ray.objective.weighted_sum(columns)
