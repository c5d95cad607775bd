"""The parameters of a model as a vector space: whole in every process, or sharded over several."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from landscape.distributed.devices import stacked
from landscape.distributed.group import (
    SINGLE_PROCESS,
    RankFailedError,
    RankGroup,
    sharded_parts,
    translate_collective_errors,
)

foreach: Any = torch
"""Torch with its ``_foreach`` functions, which its types leave out."""
K = TypeVar("K")
Parameters = Mapping[str, Tensor]
_PLAIN = {Tensor, nn.Parameter}


class WholeParameters:
    """Parameters that every process holds as a whole.

    Args:
        model: The model.
        ranks: The processes that train it.

    Attributes:
        is_sharded: True if forward passes gather the parameters. Then all ranks must make the same passes, and replace
            parameters only through `set_to`.
        devices: Devices on which parameters are gathered.
    """

    is_sharded = False
    devices: frozenset[torch.device] = frozenset()

    def __init__(self, model: nn.Module, ranks: RankGroup = SINGLE_PROCESS) -> None:
        self._model, self._ranks = model, ranks

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, as the optimizer holds them."""
        return dict(self._model.named_parameters())

    def local(self, tensor: Tensor) -> Tensor:
        """Return a parameter or its gradient, detached."""
        return tensor.detach()

    def versions(self, parameters: Iterable[Tensor]) -> list[int]:
        """Return the number of writes to each parameter."""
        return [parameter._version for parameter in parameters]

    @contextmanager
    def replaced_by(self, tensors: Parameters, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Replace parameters by ``tensors`` in ``modules``, for the body.

        ``tensors`` have the parameters' names. Parameters are found by identity, because a parameter, or the module
        that holds it, may have several names.
        """
        named = self._model.named_parameters()
        replacements = {id(parameter): tensors[name] for name, parameter in named if name in tensors}
        slots: list[tuple[Any, str, Any]] = [
            (module._parameters, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if id(parameter) in replacements
        ]
        try:
            for owner, name, parameter in slots:
                owner[name] = replacements[id(parameter)]
            yield
        finally:
            for owner, name, parameter in slots:
                owner[name] = parameter

    def set_to(self, point: Parameters) -> AbstractContextManager[None]:
        """Do nothing: `replaced_by` has set the parameters."""
        return nullcontext()

    def evaluate(self, closure: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return ``closure(model)``."""
        return closure(self._model)

    def gradient(self, loss: Tensor, point: Parameters) -> list[Tensor | None]:
        """Return the gradient with respect to each tensor of ``point``."""
        if not loss.requires_grad:
            return [None] * len(point)
        return list(torch.autograd.grad(loss, list(point.values()), allow_unused=True))

    def raise_deferred(self) -> AbstractContextManager[None]:
        """Do nothing: `evaluate` raises at once."""
        return nullcontext()

    def syncs_gradients(self) -> bool:
        """Return True: gradients are in ``.grad`` after each backward pass."""
        return True

    def inner(self, a: Parameters, b: Parameters) -> Tensor:
        """Return the inner product over the tensors of ``a``."""
        return stacked(_products(a, b)).sum()

    def norm(self, a: Parameters) -> Tensor:
        """Return the l2 norm over the tensors of ``a``."""
        tensors = [single_precision(tensor).detach() for tensor in a.values()]
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        total = torch.nn.utils.get_total_norm
        norms = [total([tensor for tensor in tensors if tensor.device == device]) for device in devices]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(stacked(norms))

    def all_mean(self, compute: Callable[[], Mapping[K, Tensor]]) -> dict[K, Tensor]:
        """Return the means over the ranks of ``compute()``.

        Args:
            compute: Returns scalars, and gradients by the names of parameters.
        """
        return self._ranks.all_mean(compute)


class ShardedParameters:
    """Parameters of a model that ``torch.distributed.fsdp.fully_shard`` has sharded.

    A forward pass gathers the parameters, so other tensors cannot replace them: a point is written into the shards, and
    the previous values are restored. Ranks gather together, so all of them must make the same passes. A rank that fails
    within a pass still gathers the rest, and raises after the last pass.

    The methods are those of `WholeParameters`.

    Args:
        model: The model.
        ranks: The processes over which it is sharded.
    """

    is_sharded = True

    def __init__(self, model: nn.Module, ranks: RankGroup) -> None:
        self._model, self._ranks = model, ranks
        self._parts: list[Any] = sharded_parts(model)
        inner = {id(module) for part in self._parts for module in part.modules() if module is not part}
        self._outer = [part for part in self._parts if id(part) not in inner]
        self._held: dict[str, Any] = dict(self.parameters())
        mesh = next(parameter.device_mesh for parameter in self._held.values() if hasattr(parameter, "device_mesh"))
        self._device = torch.device(mesh.device_type)
        if self._device.type != "cpu":
            self._device = torch.device(self._device.type, torch.get_device_module(self._device).current_device())
        self.devices = frozenset({self._device})
        self._entered: list[Any] = []
        """Parts that the current pass has gathered, in order."""
        self._order = self._parts
        """Parts that a whole pass gathers, in order; a guess before the first pass."""
        self._error: Exception | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, as the optimizer holds them.

        Gathered parameters are freed.
        """
        for part in self._parts:
            part.reshard()
        return dict(self._model.named_parameters())

    def local(self, tensor: Tensor) -> Tensor:
        """Return the shard of a parameter or its gradient, detached."""
        return local(tensor)

    def versions(self, parameters: Iterable[Tensor]) -> list[int]:
        """Return an empty list, as gathering writes to parameters."""
        return []

    def replaced_by(self, tensors: Parameters, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Replace nothing; `set_to` writes to the shards."""
        return nullcontext()

    @contextmanager
    def set_to(self, point: Parameters) -> Iterator[None]:
        """Write ``point`` into the shards for one pass."""
        self._held = self.parameters()
        shards = {name: local(self._held[name]) for name in point}
        before = clones(shards)
        self._entered = []
        hooks = [part.register_forward_pre_hook(self._enter) for part in self._parts]
        try:
            with torch.no_grad():
                write(point, shards)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for part in self._outer:
                if part in self._entered and hasattr(part, "reset_iter_state"):  # since torch 2.13
                    # Clears the state that a failed pass leaves, or one without a backward pass.
                    part.reset_iter_state()
            self.parameters()
            with torch.no_grad():
                write(before, shards)

    def evaluate(self, closure: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return ``closure(model)``, or NaN if it fails.

        `raise_deferred` raises the error later.
        """
        try:
            with translate_collective_errors():
                loss = closure(self._model)
            self._order = list(self._entered)
            return loss
        except RankFailedError:
            raise
        except Exception as error:
            self._error = self._error or error
            # The other ranks are not informed yet: gather with them what is left of the pass.
            for part in self._order[len(self._entered) :]:
                part.unshard()
                part.reshard()
            return torch.tensor(math.nan, device=self._device)

    def gradient(self, loss: Tensor, point: Parameters) -> list[Tensor | None]:
        """Return the shards of the mean gradient, within `set_to`.

        The mean is over the ranks, each of which has a loss of its own.

        Raises:
            RuntimeError: A backward pass would have side effects.
        """
        self._ranks.run_on_all(self._check)
        before = {name: parameter.grad for name, parameter in self._held.items()}
        try:
            for parameter in self._held.values():
                parameter.grad = None
            loss.backward()
            found = [self._held[name].grad for name in point]
            return [None if gradient is None else local(gradient) for gradient in found]
        finally:
            for name, gradient in before.items():
                self._held[name].grad = gradient

    @contextmanager
    def raise_deferred(self) -> Iterator[None]:
        """Raise what `evaluate` has caught, after the body.

        Within the body, all ranks make the same passes.
        """
        try:
            yield
            self._raise()
        finally:
            self._error = None

    def syncs_gradients(self) -> bool:
        """Return True if backward passes reduce gradients.

        If not, they are kept out of ``.grad`` for a later backward pass.
        """
        states = [part._get_fsdp_state() for part in self._parts]  # torch has no public way to read it
        groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
        return all(group.reduce_grads and group.all_reduce_grads for group in groups)

    def inner(self, a: Parameters, b: Parameters) -> Tensor:
        """Return the inner product, given shards of both."""
        return self._sum(a, stacked(_products(a, b)).double())

    def norm(self, a: Parameters) -> Tensor:
        """Return the l2 norm, given shards."""
        return self._sum(a, stacked(_norms(a.values())).double() ** 2).sqrt()

    def all_mean(self, compute: Callable[[], Mapping[K, Tensor]]) -> dict[K, Tensor]:
        """Return the means over the ranks of ``compute()``.

        Args:
            compute: Returns scalars, and gradients by the names of parameters, which are shards of a mean already.
        """
        return self._ranks.all_mean(compute, local=self._held)

    def _sum(self, names: Iterable[str], numbers: Tensor) -> Tensor:
        """Return the sum of numbers that were computed from shards.

        Args:
            names: The parameter of each number.
            numbers: One number for each shard, in double precision.
        """
        held = self.parameters()
        # The mean over the ranks counts each number as many times as there are different shards of the parameter.
        foreach._foreach_mul_(list(numbers), [float(_shard_count(held[name])) for name in names])
        return self._ranks.all_reduce_mean_(numbers.sum())

    def _check(self) -> None:
        self._raise()
        if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in self._held.values()):
            raise RuntimeError("hooks of parameters would get a gradient that is not that of training")
        if not self.syncs_gradients():
            raise RuntimeError("set_requires_gradient_sync(False) would keep a gradient for the next backward pass")

    def _enter(self, part: nn.Module, args: Any) -> None:
        self._entered.append(part)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


ParameterSpace = WholeParameters | ShardedParameters


def parameter_space(model: nn.Module, ranks: RankGroup) -> ParameterSpace:
    """Return the parameters of a model that ``ranks`` train."""
    return ShardedParameters(model, ranks) if sharded_parts(model) else WholeParameters(model, ranks)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, detached.

    It is in the same memory; a tensor that is not sharded is its own shard.
    """
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor in dense layout."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def single_precision(tensor: Tensor) -> Tensor:
    """Return the tensor, dense, in at least single precision.

    Norms in half precision overflow.
    """
    return dense(tensor).float() if tensor.dtype.itemsize < 4 else dense(tensor)


def _products(a: Parameters, b: Parameters) -> list[Tensor]:
    pairs = ((single_precision(tensor), single_precision(b[name])) for name, tensor in a.items())
    return [torch.dot(one.flatten(), other.flatten()) for one, other in pairs]


def _norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the l2 norm of each tensor, by few kernels."""
    numbers = [single_precision(tensor).detach() for tensor in tensors]
    if len({tensor.device for tensor in numbers}) == 1:
        return list(foreach._foreach_norm(numbers))
    return [torch.linalg.vector_norm(tensor) for tensor in numbers]  # Some shards are offloaded to the host.


def _shard_count(parameter: Any) -> int:
    """Return the number of different shards of a parameter."""
    if not hasattr(parameter, "placements"):
        return 1
    dims = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return math.prod(parameter.device_mesh.size(dim) for dim in dims)


def foreach_groups(rows: Iterable[tuple[Tensor, ...]]) -> tuple[list[tuple[Tensor, ...]], list[list[list[Tensor]]]]:
    """Group rows of tensors for torch's ``_foreach`` functions.

    Such a function launches one kernel for many tensors of the same device and type, but one for each if they differ.

    Returns:
        Rows with sparse tensors or subclasses, which these functions may not take; and the columns of each group.
    """
    others, groups = list[tuple[Tensor, ...]](), dict[Any, list[tuple[Tensor, ...]]]()
    for row in rows:
        if all(map(_is_plain, row)):
            groups.setdefault(tuple((tensor.device, tensor.dtype) for tensor in row), []).append(row)
        else:
            others.append(row)
    return others, [[list(column) for column in zip(*group, strict=True)] for group in groups.values()]


def write(values: Mapping[K, Tensor], targets: Mapping[K, Tensor]) -> None:
    """Copy values to targets by key, with few kernels."""
    others, groups = foreach_groups((targets[key], value) for key, value in values.items())
    for target, value in others:
        target.copy_(value)
    for columns in groups:
        foreach._foreach_copy_(*columns)


def clones(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Return detached copies of tensors, made by few kernels."""
    plain = {key: tensor.detach() for key, tensor in tensors.items() if _is_plain(tensor)}
    copies = {key: torch.empty_like(tensor) for key, tensor in plain.items()}
    write(plain, copies)
    return {key: copies[key] if key in copies else tensor.detach().clone() for key, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided
