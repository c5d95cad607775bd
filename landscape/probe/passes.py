"""The losses whose gradient is in ``.grad`` when the optimizer makes its step."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from landscape.distributed.parameter_space import local
from landscape.probe.backward_hook import BackwardPass, running
from landscape.probe.composition import Composition
from landscape.probe.messages import DIRECT_PARAMETER, NO_STEP, NONLINEAR, STALE_GRADIENTS, UNKNOWN_LOSS
from landscape.ray.objective import LossTerm

MAX_UNUSED = 25
"""Losses without an update after which `BackwardPasses` warns, if there was no update at all."""

# How losses and backward passes are matched, for one update of two accumulated losses:
#
#     loop                            here
#     loss = criterion(model(x), y)   register_loss: mark loss.grad_fn with the key of this object, hook the loss
#     (loss / 2).backward()           begin: note the versions of .grad
#                                     hook:  the roots contain a marked loss, so this pass is of it; 1/2 is its weight
#                                     end:   .grad was written to, so the loss becomes a term
#     the same for the second loss    begin: .grad is not cleared, so the first term stays
#     optimizer.step()                pop, with both terms; then finish_update
#
# A pass that writes to .grad without a marked loss is another loss, which makes the update one of no known loss. A pass
# that leaves .grad as it is differentiates other parameters, or inputs, and is ignored.


class CapturedUpdate(NamedTuple):
    """The losses of an update."""

    terms: list[LossTerm]
    """Losses whose gradient the optimizer gets."""
    problem: str | None = None
    """Reason why they are not the loss that was differentiated."""
    differentiated: Tensor | None = None
    """Value of the differentiated tensors, without the scale of a loss scaler."""


class PendingLoss:
    """The term of a loss, until the update is made.

    The hook of the loss refers to it, not to the term, because the loop may keep the loss.
    """

    def __init__(self, term: LossTerm) -> None:
        self.term: LossTerm | None = term


class BackwardPasses:
    """Keeps the losses whose gradient is in ``.grad``.

    A loss becomes a term at the end of a backward pass that went through it. If gradients are None or zero when the
    next pass begins, the loop has cleared them, and the terms so far are discarded::

        forward, backward, zero_grad, forward, backward, step        # only the second loss is a term
        forward, backward, forward, zero_grad, backward, step        # only the second loss
        forward, backward, forward, backward, step                   # both, as under accumulation

    ``torch.autograd.grad`` does not write to ``.grad``, so its losses are no terms.

    Args:
        parameters: Returns the parameters of the optimizer.
        name_of: Returns the name of a parameter in the model.
        is_due: Returns True if the update is to be probed.
        defers_reduction: Returns True if a backward pass keeps gradients outside of ``.grad``, for a later pass that
            reduces them over ranks.
        scale: Multiplies a tensor by the loss scale.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        name_of: Callable[[Tensor], str],
        is_due: Callable[[], bool],
        defers_reduction: Callable[[], bool],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self._parameters, self._name_of, self._is_due = parameters, name_of, is_due
        self._defers_reduction, self._scale = defers_reduction, scale
        self._key = f"landscape-{id(self)}"
        self._captured = CapturedUpdate([])
        self._pending: weakref.WeakSet[PendingLoss] = weakref.WeakSet()
        self._grads_unreduced = False
        """True if the last pass has kept gradients outside of ``.grad``."""
        self._versions_after_step: list[Any] = []
        self._versions_after_pass: list[Any] = []
        self._zero_after_pass = False
        """True if the last pass has left a gradient of zero, which then does not mean that it was cleared."""
        self.was_cleared = False
        """True if the gradients of the last update were cleared before its step."""
        self._thread = threading.get_ident()
        """Thread of the loop; passes of other threads are of other trainings."""
        self.has_unseen_pass = False
        """True if a loss was differentiated without ``torch.autograd.backward``, as by ``torch.autograd.grad``."""
        self._unused: int | None = 0
        """Number of captured losses that were discarded before the first update; None after it."""

    def register_loss(self, term: LossTerm, loss: Tensor) -> None:
        """Register a loss, a term after its backward pass.

        Until then only the loss holds the term, so that both are freed if there is no such pass.
        """
        self._thread = threading.get_ident()
        if loss.grad_fn is not None:
            metadata: Any = loss.grad_fn.metadata
            metadata[self._key] = True

        pending = PendingLoss(term)
        self._pending.add(pending)

        @unserializable_hook
        def receive_gradient(gradient: Tensor) -> None:
            self.has_unseen_pass |= not running
            for backward in tuple(running):
                if (term := pending.term) is not None and self._key in backward.versions and self._contains(backward):
                    gradient = gradient.detach().reshape(() if gradient.numel() == 1 else gradient.shape)
                    weight = gradient / self._scale(torch.ones_like(gradient))
                    backward.terms.setdefault(self._key, []).append((term, weight))

        loss.register_hook(receive_gradient)

    def depends_on_parameters(self, values: Iterable[Any]) -> bool:
        """Return True if a value depends on the optimizer's parameters."""
        nodes = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
        return bool(nodes and self._composition(nodes, key="").direct)

    def has_terms(self) -> bool:
        """Return True if ``.grad`` holds a captured loss's gradient."""
        return bool(self._captured.terms) and not self._grads_are_none()

    def pop(self) -> CapturedUpdate:
        """Return and drop the losses of the next step."""
        self.was_cleared = bool(self._captured.terms) and self._grads_are_none()
        if self._grads_are_none():
            self._discard()
        captured, self._captured, self._unused = self._captured, CapturedUpdate([]), None
        return captured

    def peek(self) -> CapturedUpdate:
        """Return a copy of the present losses."""
        return self._captured._replace(terms=[replace(term) for term in self._captured.terms])

    def finish_update(self) -> None:
        """Drop losses and mark gradients as used."""
        self.mark_gradients_used()
        self._grads_unreduced, self._unused, self.has_unseen_pass = False, None, False
        for pending in self._pending:
            pending.term = None
        self._pending.clear()

    def mark_gradients_used(self) -> None:
        """Note that the present gradients are of no later update."""
        self._versions_after_step = self._gradient_versions()

    def warn_if_no_step(self) -> None:
        """Warn if the optimizer made no step with captured losses."""
        if self._unused or (self._unused is not None and self._captured.terms):
            self._unused = None
            warnings.warn(NO_STEP, stacklevel=3)

    def begin(self, backward: BackwardPass) -> None:
        """Discard losses whose gradients were cleared since the last pass."""
        if threading.get_ident() != self._thread or not self._is_due():
            return
        backward.versions[self._key] = versions = self._gradient_versions()
        if self._captured.terms or self._captured.problem:
            # Reading values would block until an accelerator is done; there a write through .data is not detected.
            is_unwritten = versions == self._versions_after_pass
            is_kept = is_unwritten and any(p.device.type != "cpu" for p in self._parameters())
            is_kept = is_kept or self._grads_unreduced or self._zero_after_pass
            if self._grads_are_none() or not (is_kept or not self._grads_are_zero()):
                self._discard()
        elif any(versions) and versions == self._versions_after_step and not self._grads_are_zero():
            self._captured = CapturedUpdate([], STALE_GRADIENTS)

    def end(self, backward: BackwardPass) -> None:
        """Make the losses of the pass terms."""
        versions = backward.versions.pop(self._key, None)
        if versions is None:
            return
        were_unreduced, self._grads_unreduced = self._grads_unreduced, self._defers_reduction()
        self._versions_after_pass = self._gradient_versions()
        if not self._grads_unreduced and self._versions_after_pass == versions:
            return  # The pass was one for other parameters, or for inputs.
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters())
        self._zero_after_pass = on_cpu and self._grads_are_zero()
        if backward.terms.get(self._key):
            self._add(backward)
        elif not (were_unreduced or self._grads_unreduced):
            self._captured = self._captured._replace(problem=self._captured.problem or UNKNOWN_LOSS)

    def _add(self, backward: BackwardPass) -> None:
        terms, problem, differentiated = self._captured
        for term, weight in backward.terms[self._key]:
            if all(term is not other for other in terms):
                terms.append(term)
            term.weight = weight if term.weight is None else term.weight + weight
        value = self._differentiated_value(backward)
        if differentiated is not None and value is not None:
            value = differentiated + value
        self._captured = CapturedUpdate(terms, problem or self._problem(backward.compositions[self._key]), value)

    def _discard(self) -> None:
        if self._unused is not None and self._captured.terms:
            self._unused += 1
            if self._unused == MAX_UNUSED:
                self.warn_if_no_step()
        for term in self._captured.terms:
            term.weight = None  # The loop may have kept the graph, and may differentiate the loss again.
        self._captured = CapturedUpdate([])

    def _contains(self, backward: BackwardPass) -> bool:
        """Return True if the pass differentiates captured losses."""
        if self._key not in backward.compositions:
            nodes = [root.grad_fn if isinstance(root, Tensor) else root.node for root in backward.roots]
            composition = self._composition(nodes, self._key)
            backward.compositions[self._key] = composition if composition.reaches_loss else None
        return backward.compositions[self._key] is not None

    def _composition(self, nodes: list[Any], key: str) -> Composition:
        return Composition.of(nodes, key, {id(parameter) for parameter in self._parameters()})

    def _problem(self, composition: Composition | None) -> str | None:
        if composition is not None and composition.nonlinear is not None:
            return NONLINEAR.format(composition.nonlinear)
        if composition is not None and composition.direct:
            return DIRECT_PARAMETER.format(self._name_of(composition.direct[0]))
        return None

    def _differentiated_value(self, backward: BackwardPass) -> Tensor | None:
        if not all(isinstance(root, Tensor) for root in backward.roots):
            return None
        pairs = zip(backward.roots, backward.factors, strict=True)
        values = [root.detach().sum() if by is None else (root.detach() * by.detach()).sum() for root, by in pairs]
        value = torch.stack([value.to(values[0]) for value in values]).sum()
        return value / self._scale(torch.ones_like(value))

    def _gradient_versions(self) -> list[tuple[int, int] | None]:
        """Return address and number of writes of each gradient."""
        gradients = [parameter.grad for parameter in self._parameters()]
        values = [None if gradient is None else _values(gradient) for gradient in gradients]
        return [None if tensor is None else (tensor.data_ptr(), tensor._version) for tensor in values]

    def _grads_are_none(self) -> bool:
        return not self._grads_unreduced and all(parameter.grad is None for parameter in self._parameters())

    def _grads_are_zero(self) -> bool:
        """Return True if all gradients are zero."""
        # The first gradient is mostly not zero, and ends the search.
        gradients = (parameter.grad for parameter in self._parameters() if parameter.grad is not None)
        return not any(bool(_values(gradient).any()) for gradient in gradients)


def _values(gradient: Tensor) -> Tensor:
    return local(gradient)._values() if gradient.is_sparse else local(gradient)
