"""Parameters that ``fully_shard`` has spread over processes: moved where they are, and put back bit for bit."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from landscape.distributed.group import RankFailedError, RankGroup, sharded_parts, translate_collective_errors


class ShardedParameters:
    """What this process holds of the parameters of a model that ``torch.distributed.fsdp.fully_shard`` has spread.

    A forward pass gathers the parameters by itself, so it cannot be given others: a point is written into the shards,
    and what was in them is put back. As the ranks gather together, all of them make the same passes; one that fails in
    the middle of a pass gathers the rest of it all the same, and tells after the last pass.

    Args:
        model: The model.
        ranks: The processes that it is spread over.
    """

    def __init__(self, model: nn.Module, ranks: RankGroup) -> None:
        self._model, self._ranks = model, ranks
        self._parts: list[Any] = sharded_parts(model)
        inner = {id(module) for part in self._parts for module in part.modules() if module is not part}
        self._outer = [part for part in self._parts if id(part) not in inner]
        self._held: dict[str, Any] = dict(self.parameters())
        mesh = next(parameter.device_mesh for parameter in self._held.values() if hasattr(parameter, "device_mesh"))
        self.device = torch.device(mesh.device_type)
        if self.device.type != "cpu":
            self.device = torch.device(self.device.type, torch.get_device_module(self.device).current_device())
        self._entered: list[Any] = []
        """Parts that the pass under way has gathered, in its order."""
        self._order = self._parts
        """Those of a whole pass; before there was one, a guess."""
        self._error: Exception | None = None

    @classmethod
    def of(cls, model: nn.Module, ranks: RankGroup) -> Self | None:
        """The shards of the model; None if every process holds it as a whole."""
        return cls(model, ranks) if sharded_parts(model) else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, as the optimizer holds them; what is gathered of them is let go."""
        for part in self._parts:
            part.reshard()
        return dict(self._model.named_parameters())

    def syncs_gradients(self) -> bool:
        """Whether a backward pass reduces gradients; otherwise they are kept, out of sight, for one that does."""
        states = [part._get_fsdp_state() for part in self._parts]  # torch has no public way to ask
        groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
        return all(group.reduce_grads and group.all_reduce_grads for group in groups)

    def all_reduce_sum(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The sum over all parameters of ``numbers``, by name, that each rank has computed from its shards of them."""
        held = self.parameters()
        own = torch.stack([number.double() * _pieces(held[name]) for name, number in numbers.items()])
        return self._ranks.all_reduce_mean_(own.sum())

    @contextmanager
    def parameters_set_to(self, point: Mapping[str, Tensor]) -> Iterator[None]:
        """For the body, which makes one pass, write ``point`` into the shards of its names."""
        self._held = self.parameters()
        shards = {name: local(self._held[name]) for name in point}
        before = {name: shard.clone() for name, shard in shards.items()}
        self._entered = []
        hooks = [part.register_forward_pre_hook(self._enter) for part in self._parts]
        try:
            _write(point, shards)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for part in self._outer:
                if part in self._entered and hasattr(part, "reset_iter_state"):  # since torch 2.13
                    part.reset_iter_state()  # what a pass leaves that failed, or that no backward pass follows
            self.parameters()
            _write(before, shards)

    def evaluate(self, closure: Callable[[nn.Module], Tensor]) -> Tensor:
        """``closure(model)``, or NaN where it fails on this rank alone: the others do not know yet, and go on."""
        try:
            with translate_collective_errors():
                loss = closure(self._model)
            self._order = list(self._entered)
            return loss
        except RankFailedError:
            raise
        except Exception as error:
            self._error = self._error or error
            for part in self._order[len(self._entered) :]:
                part.unshard()
                part.reshard()
            return torch.tensor(math.nan, device=self.device)

    @contextmanager
    def raise_deferred(self) -> Iterator[None]:
        """After the body, in which all ranks make the same passes, raise what has failed in it on this one."""
        try:
            yield
            self._raise()
        finally:
            self._error = None

    def gradient(self, loss: Tensor, names: Iterable[str]) -> list[Tensor | None]:
        """The shards of the mean over the ranks of the gradients of their losses, within :meth:`at`.

        Raises:
            RuntimeError: A backward pass would do something else beside it, as training needs it.
        """
        self._ranks.run_on_all(self._check)
        before = {name: parameter.grad for name, parameter in self._held.items()}
        try:
            for parameter in self._held.values():
                parameter.grad = None
            loss.backward()
            found = [self._held[name].grad for name in names]
            return [None if gradient is None else local(gradient) for gradient in found]
        finally:
            for name, gradient in before.items():
                self._held[name].grad = gradient

    def _check(self) -> None:
        """Raise what has failed, or a RuntimeError where a backward pass would leave something behind."""
        self._raise()
        if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in self._held.values()):
            raise RuntimeError("hooks of parameters would see a gradient that is not that of training")
        if not self.syncs_gradients():
            raise RuntimeError("set_requires_gradient_sync(False) would keep a gradient for the next backward pass")

    def _enter(self, part: nn.Module, args: Any) -> None:
        self._entered.append(part)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor that is spread, in the same memory, or else the tensor; detached."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


def _pieces(parameter: Any) -> int:
    """How many different pieces of a parameter the processes hold."""
    if not hasattr(parameter, "placements"):
        return 1
    spread = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return math.prod(parameter.device_mesh.size(dim) for dim in spread)


@torch.no_grad()
def _write(values: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        shards[name].copy_(value)
