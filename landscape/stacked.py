"""Several points of a ray in one pass, stacked along a dimension of their own by :func:`torch.func.vmap`."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportMissingModuleSource]
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from landscape.objective import Term
from landscape.state import Parameters
from landscape.walk import Ray, Walk

_OTHERWISE = "its random numbers would not be those of the training step"
_RANDOM = {
    *(F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, F.gumbel_softmax),
    *(torch.bernoulli, torch.rand_like, torch.randn_like, torch.normal, torch.multinomial),
}
_ATTENTION = {F.multi_head_attention_forward: 10, F.scaled_dot_product_attention: 4}
"""Functions that may drop attention weights, and the place of the probability among their arguments."""
FEW_ROWS = 128
"""Below so many rows, two products with W and G on all rows are cheaper than building W - eta G for each point."""


class Stacked:
    """Evaluates ``chunk`` points at a time, all of them by default; out of memory halves the chunk for good."""

    def __init__(self, chunk: int | None = None) -> None:
        self.chunk = chunk
        self._looked = False

    def __call__(self, ray: Ray) -> Tensor:
        """The K losses; a RuntimeError where the model's code does not go with ``vmap``."""
        if not self._looked:
            _look(ray)
            self._looked = True
        while True:
            size = min(self.chunk or len(ray.step_sizes), len(ray.step_sizes))
            starts = range(0, len(ray.step_sizes), size)
            chunks = [replace(ray, step_sizes=ray.step_sizes[start : start + size]) for start in starts]
            try:
                return torch.cat([_losses(chunk) for chunk in chunks])
            except (torch.OutOfMemoryError, MemoryError):
                if size == 1:
                    raise
                self.chunk = size // 2


def _losses(ray: Ray) -> Tensor:
    return ray.objective.total([_term_losses(term, ray) for term in ray.objective.terms])


def _term_losses(term: Term, ray: Ray) -> Tensor:
    stand_ins = {name: _stand_in(ray.origin[name]) for name in ray.direction}
    device = next(iter(stand_ins.values())).device
    etas = torch.tensor(ray.step_sizes, dtype=torch.float64, device=device)

    def losses(model: nn.Module) -> Tensor:
        def loss(eta: Tensor, written: dict[str, Tensor]) -> Tensor:
            with _Points(ray, stand_ins, eta):
                return functional_call(term.state.scene, written, (term.scalar,))

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            # One mask of dropout for all points.
            return vmap(loss, randomness="same")(etas, term.state.written_copies(len(etas)))

    return term.state.each(losses, stand_ins, [lambda: None])[0]


def _stand_in(parameter: Tensor) -> Tensor:
    """What the model holds instead of a parameter: of its shape, and NaN wherever a use of it is not seen."""
    return parameter.new_full((), torch.nan).expand(parameter.shape)


class _Points(TorchFunctionMode):
    """Puts ``origin - eta * direction`` in the place of stand-ins, for an eta that ``vmap`` maps over.

    Linear layers are evaluated as ``X W^T - eta X G^T``, so that W - eta G need not exist: where X does not depend on
    eta, once for all points; otherwise on the rows of all points together, if these are few.
    """

    def __init__(self, ray: Ray, stand_ins: Parameters, eta: Tensor) -> None:
        super().__init__()
        self.origin, self.direction, self.eta = ray.origin, ray.direction, eta
        self.names = {id(tensor): name for name, tensor in stand_ins.items()}
        self.built: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _draws_otherwise(func, *args, **kwargs):
            raise RuntimeError(_OTHERWISE)
        if func is F.dropout:
            args = (args[0].contiguous(), *args[1:])  # as it is without vmap, see _Dropouts
        if func is F.linear and (layer := self._layer(*args, **kwargs)) is not None:
            return layer
        return func(*tree_map(self._point, args), **tree_map(self._point, kwargs))

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        names = [self.names.get(id(tensor), "") for tensor in (weight, bias) if tensor is not None]
        # What has been used by itself may have been written to.
        if "" in names or self.built.keys() & set(names):
            return None
        if is_batchedtensor(input) and input.shape[:-1].numel() > FEW_ROWS:
            return None
        base, slope = (F.linear(input, *(point[name] for name in names)) for point in (self.origin, self.direction))
        return base - self.eta.to(base.dtype) * slope

    def _point(self, value: Any) -> Any:
        name = self.names.get(id(value)) if isinstance(value, Tensor) else None
        if name is None:
            return value
        if name not in self.built:
            eta = self.eta.to(self.origin[name].dtype)
            self.built[name] = torch.addcmul(self.origin[name], self.direction[name], -eta)
        return self.built[name]


def _draws_otherwise(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ``vmap`` might draw other numbers than the model by itself."""
    if not (kwargs.get("training", True) and kwargs.get("p", 1)):
        return False
    place = _ATTENTION.get(func)
    dropped = place is not None and (args[place] if len(args) > place else kwargs.get("dropout_p"))
    return func in _RANDOM or bool(dropped)


def _look(ray: Ray) -> None:
    """Evaluate the origin; a RuntimeError if dropout fills a mask in another order than ``vmap`` would."""
    walk = Walk(ray)
    for term in ray.objective.terms:

        def closure(model: nn.Module, term: Term = term) -> Tensor:
            with _Dropouts():
                return term.closure(model)

        replace(term, closure=closure).losses(walk.point, walk.moves([0.0]))


class _Dropouts(TorchFunctionMode):
    """Refuses dropout of what is not contiguous: masks are filled in the order of memory, which ``vmap`` changes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs["training"] and kwargs["p"] and not args[0].is_contiguous():
            raise RuntimeError(_OTHERWISE)
        return func(*args, **kwargs)
