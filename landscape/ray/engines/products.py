"""Linear operations along a ray, evaluated once for all points where their input is the same at all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode

from landscape.ray.linear_cache import CachedLinear, layer_key
from landscape.ray.ray import FEW_ROWS, ParametersAlongRay

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_ALIASES = {
    *(Tensor.data.__get__, Tensor.data.__set__, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__),  # pyright: ignore
    *(Tensor.untyped_storage, Tensor.data_ptr),
}
"""What gives access to memory by which it can be written to while the tensor's version stays as it is."""
LARGE = 4 << 20
"""Bytes of a weight beyond what a cache holds."""
LONG_SUM = 64
"""Terms of the sums that make up a product from which on they take longer than memory does to pass over the result."""
_LINEAR = {F.linear, F.embedding} | _CONVOLUTIONS


@dataclass
class _Product:
    """A linear operation as evaluated at step size ``eta``; holding its input keeps that memory from being reused."""

    names: tuple[str, ...]
    inputs: Tensor
    inputs_version: int
    outputs: Tensor
    outputs_version: int
    eta: float
    slope: Tensor | None = None

    def holds(self, inputs: Tensor) -> bool:
        """Whether neither this input, which has the same address, nor the one that is held was written to."""
        return self.inputs._version == self.inputs_version == inputs._version


class SharedProducts(TorchFunctionMode):
    """Evaluates ``op(X, W - eta G, b - eta c)`` as ``op(X, W, b) - eta op(X, G, c)`` where X does not depend on eta.

    Whether it does is decided by looking: X at a later point must be the very memory that was X at the first point
    (held since then, so it cannot have been handed out again), with the same geometry, and unwritten in between.
    Parameters of shared products are not computed, unless another use of them comes up.
    """

    def __init__(
        self, walk: ParametersAlongRay, bases: Sequence[CachedLinear] = (), streamed: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.walk = walk
        self.names = {id(tensor): name for name, tensor in walk.point.items()}
        self.versions: dict[str, int] = {}
        known = [base for base in bases if base.parameters.keys() <= walk.point.keys()]
        self.bases = {layer_key(tuple(base.parameters), base.inputs): base for base in known}
        self.products: dict[Any, _Product] = {}
        self.fresh: set[int] = set()
        """Addresses of memory whose content is not shared: it came into being during the first point, or may be written
        to without a trace."""
        self.points = 0
        self.idle: set[str] = set()
        self.streamed = set(streamed) & walk.point.keys()
        """Weights that are large, and applied to a few rows that differ from point to point: built in blocks."""
        self.aliased: set[str] = set()
        """Parameters that may be written to without a trace."""
        self._let_idle(self.streamed.union(*(base.parameters for base in known)))

    def arrive(self, eta: float) -> None:
        """Go to the next point."""
        if self.points == 2:
            self._settle()
        self.points += 1
        self.walk.move_to(eta, skipped=self.idle)
        self.versions = {name: tensor._version for name, tensor in self.walk.point.items()}

    def are_useless(self) -> bool:
        """Whether enough points have passed to know that nothing is shared."""
        return self.points > 2 and not self.idle and all(known.slope is None for known in self.products.values())

    def layers(self) -> set[str]:
        """Parameters of the linear layers that turned out to be shared."""
        return {name for (func, *_), product in self.products.items() if func is F.linear for name in product.names}

    def _settle(self) -> None:
        """Let go of what was not found again at the second point, and of the parameters that need not be built."""
        self.products = {key: product for key, product in self.products.items() if product.slope is not None}
        shared = set().union(*(product.names for product in self.products.values()))
        self.streamed -= shared
        self._let_idle((shared | self.streamed) - self.idle)

    def _let_idle(self, names: set[str]) -> None:
        self.idle |= names
        for name in names - self.walk.stand_ins:
            self.walk.point[name].fill_(torch.nan)  # a use that cannot be seen from here shall not pass for a loss

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # An embedding with max_norm writes to its weight.
        if func in _LINEAR and kwargs.get("max_norm") is None:
            result = self._linear(func, *args, **kwargs)
        else:
            if self.idle:
                self._use(args)
                self._use(kwargs.values())
            result = func(*args, **kwargs)
            if func in _ALIASES:
                self._let_alone(args[0])
        if self.points == 1:
            self._note(args, result)
        return result

    def _linear(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def product(weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(input, weight, *(() if func is F.embedding else (bias, *args)), **kwargs)

        names = self._unwritten(weight, bias)
        if type(input) is not Tensor or names is None or _differentiates(input):
            self._use((input, weight, bias))
            return product(weight, bias)
        key = func, *layer_key(names, input), repr((args, kwargs))
        found = None if _address(input) in self.fresh else self.products.get(key) or self._based(key, input)
        known = found if found is not None and found.holds(input) else None
        if known is None:
            if func is F.linear and names[0] in self.streamed & self.idle and _streams(weight, input):
                self._use((bias,))
                outputs = self.walk.blockwise_linear(names[0], input)
                return outputs if bias is None else outputs + bias
            self._use((input, weight, bias))
            outputs = product(weight, bias)
            if self.points < 3 and func is F.linear and _streams(weight, input):
                self.streamed.add(names[0])
            # In bfloat16 or half the sum of two rounded products would not be the rounded product.
            exact = outputs.dtype in (torch.float32, torch.float64)
            if self.points == 1 and exact and _address(input) not in self.fresh and _pays(weight, outputs):
                self.products[key] = _Product(names, input, input._version, outputs, outputs._version, self.walk.eta)
            return outputs
        if known.slope is None:
            if known.outputs._version != known.outputs_version:  # an in-place activation has overwritten it
                self._use((weight, bias))
                known.outputs, known.eta = product(weight, bias), self.walk.eta
            slopes = [self.walk.direction[name] for name in names]
            known.slope = product(slopes[0], slopes[1] if bias is not None else None)
        return torch.sub(known.outputs, known.slope, alpha=self.walk.eta - known.eta)

    def _based(self, key: tuple[Any, ...], input: Tensor) -> _Product | None:
        """The product that the update's own forward pass has evaluated, if it has."""
        func, *layer, _ = key
        base = self.bases.get(tuple(layer)) if func is F.linear else None
        if base is None or not base.is_unwritten():
            return None
        inputs, outputs = base.inputs, base.outputs
        product = _Product(tuple(base.parameters), inputs, inputs._version, outputs, outputs._version, eta=0.0)
        return self.products.setdefault(key, product)

    def _note(self, args: Iterable[Any], result: Any) -> None:
        """Remember the memory of what was computed, unless it is that of an argument (a view, or a write in place)."""
        tensors = [value for value in (result if type(result) in (list, tuple) else (result,)) if type(value) is Tensor]
        known = {_address(value) for value in args if type(value) is Tensor} - self.fresh
        self.fresh.update(address for address in map(_address, tensors) if address not in known)

    def _let_alone(self, tensor: Tensor) -> None:
        """Share nothing that is computed from this memory: a write through ``.data`` or numpy leaves no trace."""
        if id(tensor) in self.names:
            self.aliased.add(self.names[id(tensor)])
        elif type(tensor) is Tensor:
            self.fresh.add(_address(tensor))

    def _unwritten(self, *tensors: Tensor | None) -> tuple[str, ...] | None:
        """Names of the tensors that are there, if all are parameters of the walk and unwritten at this point."""
        named = [(self.names.get(id(tensor), ""), tensor) for tensor in tensors if tensor is not None]
        unwritten = all(self.versions.get(name) == tensor._version for name, tensor in named)
        unwritten = unwritten and self.aliased.isdisjoint(name for name, _ in named)
        return tuple(name for name, _ in named) if unwritten else None

    def _use(self, values: Iterable[Any]) -> None:
        """Parameters among the values are about to be used as they are: build those that are not up to date."""
        for value in values:
            if type(value) in (list, tuple):
                self._use(value)
            elif id(value) in self.names and (name := self.names[id(value)]) in self.idle:
                self.idle.remove(name)
                self.walk.materialize(name)


def _differentiates(inputs: Tensor) -> bool:
    """Whether the model computes derivatives by its input; a product as it is kept would have none."""
    return (torch.is_grad_enabled() and inputs.requires_grad) or unpack_dual(inputs).tangent is not None


def _pays(weight: Tensor, outputs: Tensor) -> bool:
    """Whether a pass over the output, which combines two products, is less than to build the weight and multiply."""
    return weight[0].numel() >= LONG_SUM or weight.numel() > outputs.numel()


def _streams(weight: Tensor, inputs: Tensor) -> bool:
    """Whether it takes longer to read the weight than to multiply with it."""
    few = inputs.numel() <= FEW_ROWS * inputs.shape[-1] and weight.nbytes > LARGE
    plain = weight.dtype == inputs.dtype in (torch.float32, torch.float64) and weight.is_contiguous()
    return few and plain and weight.is_cpu and not torch.is_autocast_enabled("cpu")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
