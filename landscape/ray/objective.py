"""The training loss of one update as a pure function of the parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landscape.distributed.fsdp import ShardedParameters
from landscape.errors import LandscapeError
from landscape.ray.linear_cache import CachedLinear
from landscape.ray.snapshot import Closure, ForwardSnapshot, LossModule, Parameters
from landscape.rng import RngState


class NoDependenceError(RuntimeError):
    """The loss does not depend on what is moved."""


@dataclass
class LossTerm:
    """The loss of one backward pass: ``weight * closure(model)`` in the state of the forward pass."""

    closure: Closure
    state: ForwardSnapshot
    value: Tensor | None = None
    """What the forward pass gave, detached."""
    weight: Tensor | None = None
    """Derivative of what was differentiated by this loss (1/n under accumulation over n batches); None is 1.

    Of a loss that is not reduced, one for each element."""
    versions: Sequence[int] = ()
    """How often the optimizer's parameters had been written to when it was computed."""
    observed: bool = False
    """Whether the user has handed it over."""
    bases: Sequence[CachedLinear] = ()
    """Linear layers that need not be evaluated at step size 0 again."""

    def __call__(self, parameters: Parameters) -> Tensor:
        """The unweighted loss at ``parameters``, a scalar tensor."""
        return self.losses(parameters, [_stay])[0]

    def losses(self, parameters: Parameters, moves: Sequence[Callable[[], object]]) -> list[Tensor]:
        """The unweighted loss after each of ``moves``, which write to ``parameters``; scalar tensors."""
        scene = self.state.scene
        if not scene.differentiates:
            try:
                return self.state.evaluate_at(self._loss, parameters, moves)
            except RuntimeError as error:
                # Autograd has no type for it: a loss with derivatives in it, such as a gradient penalty.
                if torch.is_grad_enabled() or "require" not in str(error) or "grad" not in str(error):
                    raise
        points = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        losses = self.state.evaluate_at(self._differentiating, points, moves)
        scene.differentiates = True
        return losses

    def _differentiating(self, model: nn.Module) -> Tensor:
        with torch.enable_grad():
            return self._loss(model).detach()

    def gradient(self, leaves: Parameters) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The unweighted loss at ``leaves``, and the gradient of the weighted one in their order; they require it.

        Raises:
            RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
        """

        def differentiate(model: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
            # In here, so that what is computed again (checkpoints) finds the same tensors.
            loss, shards = self._loss(model), self.state.scene.shards
            if shards is not None:  # first, as a rank whose pass has failed has no loss to differentiate
                gradient = shards.gradient(self.weighted(loss), leaves)
            elif not loss.requires_grad:
                raise NoDependenceError("The loss depends on no parameter that autograd knows of.")
            else:
                gradient = torch.autograd.grad(self.weighted(loss), list(leaves.values()), allow_unused=True)
            if any(part is None for part in gradient) and _hides(loss):
                raise RuntimeError("reentrant checkpoints hide parameters from torch.autograd.grad")
            if all(part is None for part in gradient):
                raise NoDependenceError("The loss depends on no parameter that autograd knows of.")
            return loss.detach(), tuple(
                torch.zeros_like(x) if part is None else part for x, part in zip(leaves.values(), gradient, strict=True)
            )

        return self.state.evaluate_at(differentiate, leaves, [_stay])[0]

    @property
    def recorded(self) -> Tensor | None:
        """What the forward pass gave, as :meth:`scalar` gives it."""
        return None if self.value is None else self._reduced(self.value)

    def weighted(self, loss: Tensor) -> Tensor:
        """A loss, or several, times the weight."""
        return loss if self.weight is None or self.weight.numel() > 1 else self.weight * loss

    def _reduced(self, loss: Tensor) -> Tensor:
        weighs = self.weight is not None and self.weight.numel() == loss.numel() > 1
        return (self.weight.reshape(loss.shape) * loss).sum() if weighs else loss  # pyright: ignore

    def _loss(self, model: nn.Module) -> Tensor:
        shards = self.state.scene.shards
        return self.scalar(model) if shards is None else shards.evaluate(self.scalar)

    def scalar(self, model: nn.Module) -> Tensor:
        """``closure(model)``, of a loss that is not reduced the weighted sum; a LandscapeError unless it has one element."""
        loss = self.closure(model)
        loss = self._reduced(loss) if isinstance(loss, Tensor) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LandscapeError(
                f"The loss must be a scalar, a tensor with one element; the criterion or closure gave {got}."
            )
        # A copy: the loss could be (a view of) a parameter, and points share their memory.
        return loss.reshape(()).clone()


def _hides(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint is in the graph of a loss; what it depends on inside is not in the graph."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [child for child, _ in node.next_functions]
    return any(node.name() == "CheckpointFunctionBackward" for node in seen)


def _stay() -> None:
    """A move to where the parameters are."""


@dataclass(frozen=True)
class Objective:
    """The loss of one update, ``sum of weight * loss`` over its backward passes, as a function of the parameters.

    Calling it changes nothing in the live model: parameters and buffers are swapped for the call, attributes of modules
    and random streams are put back.
    """

    terms: Sequence[LossTerm]

    @classmethod
    def of(cls, model: nn.Module, closure: Closure, walked: Collection[str] | None = None) -> "Objective":
        """The objective ``closure(model)`` in the state that the model is in now.

        Parameters that are not ``walked``, without it those that are frozen, are copied: it is not known which of them
        the closure writes to.
        """
        scene = LossModule(model)
        parameters = model.named_parameters()
        scene.written_parameters = {
            id(p) for n, p in parameters if (not p.requires_grad if walked is None else n not in walked)
        }
        return cls([LossTerm(closure, ForwardSnapshot.capture(scene))])

    def __call__(self, parameters: Parameters) -> Tensor:
        """The loss at ``parameters`` (tensors by the names of ``model.named_parameters()``), a scalar tensor."""
        with self.rng_restored():
            return self.weighted_sum([term(parameters) for term in self.terms])

    def training_loss(self) -> Tensor:
        """The loss that the forward passes of the update gave, a scalar tensor."""
        return self.weighted_sum([value.reshape(()) for term in self.terms if (value := term.recorded) is not None])

    def weighted_sum(self, losses: Sequence[Tensor]) -> Tensor:
        """Weighted sum over the terms of their ``losses``, which may all carry the same further dimensions."""
        pairs = zip(self.terms, losses, strict=True)
        return torch.stack([term.weighted(loss) for term, loss in pairs]).sum(0)

    @property
    def shards(self) -> ShardedParameters | None:
        """What this process holds of the parameters, where they are spread over several."""
        return self.terms[0].state.scene.shards if self.terms else None

    @contextmanager
    def rng_restored(self) -> Iterator[None]:
        """Put the random streams back after the body, which calls terms."""
        before = RngState.capture(list(self.terms[0].state.random.accelerators))
        # Without gradients, torch's transformers take another path in evaluation mode, with other numbers for padding.
        fast = torch.backends.mha.get_fastpath_enabled()
        # Compiled code is specialized on live parameters: swapping them would compile anew at every point.
        with torch.compiler.set_stance("force_eager"):
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                with nullcontext() if self.shards is None else self.shards.raise_deferred():
                    yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
                before.restore()

    def modules(self) -> Iterator[nn.Module]:
        """All modules that belong to it: of the model, its criterion, and others that are called."""
        return self.terms[0].state.scene.modules()

    def reduced_precision(self) -> bool:
        """Whether forward passes compute in less than single precision."""
        autocast = any(state.enabled for term in self.terms for state in term.state.autocast)
        parameters = (parameter for term in self.terms for parameter in term.state.scene.parameters())
        return autocast or any(parameter.dtype.itemsize < 4 for parameter in parameters)
