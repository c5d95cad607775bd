"""Several points of a ray in one pass, stacked along a dimension of their own by :func:`torch.func.vmap`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportMissingModuleSource]
from torch.func import vmap
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from landscape.ray.engines.layers import Hook
from landscape.ray.engines.masks import OTHER_NUMBERS, draws
from landscape.ray.linear_cache import CachedLinear, layer_key
from landscape.ray.objective import LossTerm
from landscape.ray.peak_memory import PeakMemory
from landscape.ray.ray import FEW_ROWS, ParametersAlongRay, Ray, placeholder


class Stacked:
    """Evaluates ``chunk`` points at a time, all of them by default; out of memory halves the chunk for good."""

    def __init__(self, chunk: int | None = None) -> None:
        self.chunk = chunk
        self._draws: int | None = None

    def __call__(self, ray: Ray) -> Tensor:
        """The K losses; a RuntimeError where the model's code does not go with ``vmap``, or might keep its tensors.

        These are of no use outside of it: an attempt to read one ends the user's code by an error.
        """
        if any(term.observed for term in ray.objective.terms) or _are_hooked(ray.objective.modules()):
            raise RuntimeError("hooks or the observed loss may keep tensors that are valid within it alone")
        if self._draws != 0:
            self._draws = _draws(ray)
        while True:
            size = min(self.chunk or len(ray.step_sizes), len(ray.step_sizes))
            starts = range(0, len(ray.step_sizes), size)
            chunks = [replace(ray, step_sizes=ray.step_sizes[start : start + size]) for start in starts]
            try:
                return torch.cat([_losses(chunk, self._draws) for chunk in chunks])
            except (torch.OutOfMemoryError, MemoryError):
                if size == 1:
                    raise
                self.chunk = size // 2


def _losses(ray: Ray, draws: int) -> Tensor:
    points = _Points(ray)
    losses = ray.objective.weighted_sum([_term_losses(term, ray, points) for term in ray.objective.terms])
    if points.dropouts != draws:
        raise RuntimeError(OTHER_NUMBERS)
    return losses


def _term_losses(term: LossTerm, ray: Ray, points: "_Points") -> Tensor:
    etas = torch.tensor(ray.step_sizes, dtype=torch.float64, device=next(iter(points.stand_ins.values())).device)

    def losses(model: nn.Module) -> Tensor:
        def loss(eta: Tensor, written: list[Tensor]) -> Tensor:
            term.state.enter_written(written)
            with points.at(eta, term.bases):
                return term.scalar(model)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            # One mask of dropout for all points.
            return vmap(loss, randomness="same")(etas, term.state.written_copies(len(etas)))

    (measured,) = term.state.evaluate_at(losses, points.stand_ins, [lambda: None])
    term.state.loss_module.traits.shared |= points.shared
    return measured


class _Points(TorchFunctionMode):
    """Puts ``origin - eta * direction`` in the place of stand-ins, for an eta that ``vmap`` maps over.

    Linear layers are evaluated as ``X W^T - eta X G^T``, so that W - eta G need not exist: where X does not depend on
    eta, once for all points; otherwise on the rows of all points together, if these are few.
    """

    def __init__(self, ray: Ray) -> None:
        super().__init__()
        self.origin, self.direction = ray.origin, ray.direction
        self.stand_ins = {name: placeholder(ray.origin[name]) for name in ray.direction}
        self.names = {id(tensor): name for name, tensor in self.stand_ins.items()}
        self.shared: set[str] = set()
        """Parameters of linear layers whose input is the same at all points."""
        self.dropouts = 0
        """How often dropout has drawn a mask."""

    def at(self, eta: Tensor, bases: Sequence[CachedLinear]) -> Self:
        """From here on the points are at ``eta``, which ``vmap`` maps over."""
        self.eta = eta
        self.bases = {layer_key(tuple(base.parameters), base.inputs): base for base in bases}
        self.built: dict[str, Tensor] = {}
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout and kwargs["training"] and kwargs["p"] and not kwargs["inplace"]:
            self.dropouts += 1
            args = (args[0].contiguous(), *args[1:])  # as it is without vmap, see _Draws
        if func is F.linear and (layer := self._layer(*args, **kwargs)) is not None:
            return layer
        return func(*tree_map(self._point, args), **tree_map(self._point, kwargs))

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        names = [self.names.get(id(tensor), "") for tensor in (weight, bias) if tensor is not None]
        # What has been used by itself may have been written to.
        if "" in names or self.built.keys() & set(names):
            return None
        moves = is_batchedtensor(input)
        if moves and input.shape[:-1].numel() > FEW_ROWS:
            return None
        slope = F.linear(input, *(self.direction[name] for name in names))
        base = F.linear(input, *(self.origin[name] for name in names)) if moves else self._base(names, input)
        return base - self.eta.to(base.dtype) * slope

    def _base(self, names: list[str], input: Tensor) -> Tensor:
        """The layer at theta, where its input is the same at all points: known from the update, or computed."""
        self.shared.update(names)
        known = self.bases.get(layer_key(tuple(names), input))
        if known is not None and known.is_unwritten():
            return known.outputs
        return F.linear(input, *(self.origin[name] for name in names))

    def _point(self, value: Any) -> Any:
        name = self.names.get(id(value)) if isinstance(value, Tensor) else None
        if name is None:
            return value
        if name not in self.built:
            eta = self.eta.to(self.origin[name].dtype)
            self.built[name] = torch.addcmul(self.origin[name], self.direction[name], -eta)
        return self.built[name]


def _draws(ray: Ray) -> int:
    """How often the model draws random numbers at the origin; a RuntimeError if ``vmap`` would draw others.

    Numbers fill a tensor in the order of its memory, which ``vmap`` may change. It is an error, too, if the model keeps
    tensors somewhere (in a list, a cache).
    """
    walk, seen, meter = ParametersAlongRay(ray), _Draws(), PeakMemory()
    for term in ray.objective.terms:

        def closure(model: nn.Module, term: LossTerm = term) -> Tensor:
            before = torch.get_rng_state()
            with seen:
                loss = term.closure(model)
            if not seen.count and not torch.equal(before, torch.get_rng_state()):
                raise RuntimeError(OTHER_NUMBERS)  # drawn in code that cannot be seen
            return loss

        with meter:
            replace(term, closure=closure).losses(walk.point, walk.moves([0.0]))
    if meter.held():
        raise RuntimeError("the model keeps tensors that are valid within it alone")
    return seen.count


def _are_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks that are not ours see what modules get or give."""
    if _has_any_global_hook():
        return True
    groups = (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks)
    return not all(isinstance(hook, Hook) for hooks in groups for hook in hooks.values())


class _Draws(TorchDispatchMode):
    """Counts what draws random numbers, and refuses it where a tensor is not contiguous."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs):
            self.count += 1
            if any(isinstance(value, Tensor) and not value.is_contiguous() for value in args):
                raise RuntimeError(OTHER_NUMBERS)
        return func(*args, **kwargs)
