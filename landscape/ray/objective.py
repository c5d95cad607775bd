"""The training loss of one update as a pure function of the parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from landscape.distributed.devices import stacked
from landscape.distributed.parameter_space import Parameters, ParameterSpace
from landscape.errors import LandscapeError
from landscape.ray.graph import graph_nodes
from landscape.ray.loss_module import Closure, LossModule
from landscape.ray.snapshot import ForwardSnapshot
from landscape.rng import RngState


class LossFunction(Protocol):
    """The loss of one update, given the parameters.

    An `Objective` calls the user's code again; a `landscape.ray.engines.tape.Tape` repeats its recorded calls.
    """

    @property
    def loss_module(self) -> LossModule:
        """The model and its criterion."""
        ...

    @property
    def space(self) -> ParameterSpace:
        """The model's parameters."""
        ...

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the loss at ``parameters``, a scalar tensor."""
        ...

    def training_loss(self) -> Tensor:
        """Return the loss that the update's own forward passes gave."""
        ...

    def value_and_gradient(self, leaves: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its gradient."""
        ...

    def rng_restored(self) -> AbstractContextManager[None]:
        """Restore the RNG state after the body."""
        ...

    def reduced_precision(self) -> bool:
        """Return True if forward passes compute below single precision."""
        ...


class NoDependenceError(RuntimeError):
    """A loss that does not depend on the moved parameters."""


@dataclass
class LossTerm:
    """The loss of one backward pass.

    It is ``weight * closure(model)`` in the state of the forward pass.
    """

    closure: Closure
    state: ForwardSnapshot
    value: Tensor | None = None
    """The result of the forward pass, detached."""
    weight: Tensor | None = None
    """Derivative of the differentiated value by this loss (1/n under accumulation over n batches); None is 1.

    If the loss is not reduced, one for each element."""
    versions: Sequence[int] = ()
    """Number of writes to each of the optimizer's parameters when the loss was computed."""
    observed: bool = False
    """True if the user has passed the loss to the probe."""

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the unweighted loss at ``parameters``, a scalar tensor."""
        return self.losses(parameters, [_stay])[0]

    def losses(self, parameters: Parameters, moves: Sequence[Callable[[], object]]) -> list[Tensor]:
        """Return the unweighted loss after each of ``moves``.

        Args:
            parameters: Tensors by the names of ``model.named_parameters()``.
            moves: Functions that write to ``parameters``.
        """
        traits = self.state.loss_module.traits
        if not traits.differentiates:
            try:
                return self.state.evaluate_at(self._loss, parameters, moves)
            except RuntimeError as error:
                # The loss may contain derivatives, as a gradient penalty does; autograd has no type for this error.
                if torch.is_grad_enabled() or "require" not in str(error) or "grad" not in str(error):
                    raise
        points = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        losses = self.state.evaluate_at(self._loss_with_grad, points, moves)
        traits.differentiates = True
        return losses

    def gradient(self, leaves: Parameters) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the unweighted loss, and the weighted gradient.

        Args:
            leaves: Parameters that require gradients.

        Returns:
            The loss, and its gradient with respect to each leaf, in their order.

        Raises:
            RuntimeError: The loss cannot be differentiated this way, or depends on no leaf.
        """

        def differentiate(model: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
            # Within the evaluation, so that recomputation (checkpoints) finds the same tensors.
            loss = self._loss(model)
            gradient = self.state.loss_module.space.gradient(self.weighted(loss), leaves)
            if any(part is None for part in gradient) and _has_reentrant_checkpoint(loss):
                raise RuntimeError("reentrant checkpoints hide parameters from torch.autograd.grad")
            if all(part is None for part in gradient):
                raise NoDependenceError("The loss depends on no parameter that is in autograd's graph.")
            return loss.detach(), tuple(
                torch.zeros_like(x) if part is None else part for x, part in zip(leaves.values(), gradient, strict=True)
            )

        return self.state.evaluate_at(differentiate, leaves, [_stay])[0]

    @property
    def recorded(self) -> Tensor | None:
        """Result of the forward pass as `scalar` would return it."""
        return None if self.value is None else self._reduced(self.value)

    def weighted(self, loss: Tensor) -> Tensor:
        """Return one or several losses times the weight."""
        return loss if self.weight is None or self.weight.numel() > 1 else self.weight * loss

    def scalar(self, model: nn.Module) -> Tensor:
        """Return ``closure(model)``, reduced by the weights if it is not.

        Raises:
            LandscapeError: The closure does not return a tensor with one element.
        """
        loss = self.closure(model)
        loss = self._reduced(loss) if isinstance(loss, Tensor) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LandscapeError(
                f"The loss must be a scalar, a tensor with one element, got {got}. Return the mean or the sum from the "
                "criterion or closure."
            )
        # A copy: the loss could be (a view of) a parameter, and points share their memory.
        return loss.reshape(()).clone()

    def _loss(self, model: nn.Module) -> Tensor:
        return self.state.loss_module.space.evaluate(self.scalar)

    def _loss_with_grad(self, model: nn.Module) -> Tensor:
        with torch.enable_grad():
            return self._loss(model).detach()

    def _reduced(self, loss: Tensor) -> Tensor:
        is_weighted = self.weight is not None and self.weight.numel() == loss.numel() > 1
        return (self.weight.reshape(loss.shape) * loss).sum() if is_weighted else loss  # pyright: ignore


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Return True if the graph has a reentrant checkpoint.

    Its parameters are not in the graph.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(loss))


def _stay() -> None:
    pass


@dataclass(frozen=True)
class Objective:
    """The loss of one update, given the parameters.

    It is the sum over the terms, one for each backward pass, of ``weight * loss``. A call changes nothing in the live
    model: parameters and buffers are replaced for the call, attributes of modules and RNG state are restored.
    """

    terms: Sequence[LossTerm]

    @classmethod
    def of(cls, model: nn.Module, closure: Closure, moved: Collection[str] | None = None) -> "Objective":
        """Return the objective ``closure(model)`` in the current state.

        Parameters that are not ``moved`` (default: frozen ones) are copied, because the closure may write to them.
        """
        loss_module = LossModule(model)
        parameters = model.named_parameters()
        loss_module.traits.written_parameters = {
            id(p) for n, p in parameters if (not p.requires_grad if moved is None else n not in moved)
        }
        return cls([LossTerm(closure, ForwardSnapshot.capture(loss_module))])

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the loss at ``parameters``, a scalar tensor.

        Args:
            parameters: Tensors by the names of ``model.named_parameters()``. The others stay where they are.
        """
        with self.rng_restored():
            return self.weighted_sum([term(parameters) for term in self.terms])

    @property
    def loss_module(self) -> LossModule:
        """The model and its criterion."""
        return self.terms[0].state.loss_module

    @property
    def space(self) -> ParameterSpace:
        """The model's parameters."""
        return self.loss_module.space

    def training_loss(self) -> Tensor:
        """Return the loss that the update's own forward passes gave."""
        return self.weighted_sum([value.reshape(()) for term in self.terms if (value := term.recorded) is not None])

    def value_and_gradient(self, leaves: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its gradient.

        Args:
            leaves: Parameters that require gradients.

        Raises:
            RuntimeError: The loss cannot be differentiated this way, or depends on none of them.
        """
        with torch.enable_grad():
            losses, gradients = zip(*(term.gradient(leaves) for term in self.terms), strict=True)
        sums = gradients[0]
        for further in gradients[1:]:
            sums = [one + other for one, other in zip(sums, further, strict=True)]
        return self.weighted_sum(losses), dict(zip(leaves, sums, strict=True))

    def weighted_sum(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of one loss per term.

        The losses may all have the same further dimensions.
        """
        pairs = zip(self.terms, losses, strict=True)
        return stacked([term.weighted(loss) for term, loss in pairs]).sum(0)

    @contextmanager
    def rng_restored(self) -> Iterator[None]:
        """Restore the RNG state after the body, which calls terms."""
        before = RngState.capture(list(self.terms[0].state.random.accelerators))
        # Without gradients, torch's transformers take another path in evaluation mode, with other numbers for padding.
        fast = torch.backends.mha.get_fastpath_enabled()
        # Compiled code is specialized on live parameters: replacing them would recompile it at every point.
        with torch.compiler.set_stance("force_eager"):
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                with self.space.raise_deferred():
                    yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
                before.restore()

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules of model, criterion and foreign modules."""
        return self.loss_module.modules()

    def reduced_precision(self) -> bool:
        """Return True if forward passes compute below single precision."""
        autocast = any(state.enabled for term in self.terms for state in term.state.autocast)
        parameters = (parameter for term in self.terms for parameter in term.state.loss_module.parameters())
        return autocast or any(parameter.dtype.itemsize < 4 for parameter in parameters)
