"""The losses whose gradient is in ``.grad`` when the optimizer makes its step."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from landscape.distributed.parameter_space import local
from landscape.probe.backward_hook import BackwardPass, running
from landscape.probe.composition import Composition
from landscape.probe.messages import (
    DIRECT_PARAMETER,
    NO_STEP,
    NONLINEAR,
    NOT_RECORDED,
    STALE_GRADIENTS,
    UNKNOWN_LOSS,
)
from landscape.ray.engines.calls import Slot
from landscape.ray.engines.recorder import Recorder
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


class Root(NamedTuple):
    """The differentiated tensors of one backward pass."""

    slot: Slot
    """Their place in the recorded calls."""
    versions: list[int]
    """Number of writes to each parameter when the pass began."""


class CapturedUpdate(NamedTuple):
    """The losses of an update."""

    terms: list[LossTerm]
    """Losses whose gradient the optimizer gets, which can be computed again."""
    roots: list[Root]
    """Differentiated tensors, of which the calls were recorded."""
    problem: str | None = None
    """Reason why the gradient is that of no loss at these parameters."""
    terms_problem: str | None = None
    """Reason why the terms are not the loss that was differentiated."""
    roots_problem: str | None = None
    """Reason why the roots are not."""
    differentiated: Tensor | None = None
    """Value of the differentiated tensors."""
    gradients: dict[int, Tensor] | None = None
    """The gradient of the losses by the id of a parameter; empty if it is ``.grad`` still, None if it is unknown."""
    is_changed: bool = False
    """True if ``.grad`` was written to since the last pass."""

    def is_empty(self) -> bool:
        """Return True if no loss is known."""
        return not self.terms and not self.roots and not self.terms_problem

    def unscaled(self, scale: Tensor | None) -> "CapturedUpdate":
        """Divide weights and value by a loss scale."""
        if scale is None:
            return self
        for term in self.terms:
            term.weight = term.weight if term.weight is None else term.weight / scale.to(term.weight)
        value, gradients = self.differentiated, self.gradients
        if gradients is not None:
            gradients = {key: gradient / scale.to(gradient) for key, gradient in gradients.items()}
        return self._replace(differentiated=value if value is None else value / scale.to(value), gradients=gradients)


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
        recorder: Returns the recorder of the update, if its calls are recorded. It is stopped during backward passes.
        versions: Returns the number of writes to each parameter.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        name_of: Callable[[Tensor], str],
        is_due: Callable[[], bool],
        defers_reduction: Callable[[], bool],
        recorder: Callable[[], Recorder | None],
        versions: Callable[[], list[int]],
    ) -> None:
        self._parameters, self._name_of, self._is_due = parameters, name_of, is_due
        self._defers_reduction, self._recorder, self._versions = defers_reduction, recorder, versions
        self._key = f"landscape-{id(self)}"
        self._captured = CapturedUpdate([], [])
        self._pending: weakref.WeakSet[PendingLoss] = weakref.WeakSet()
        self._returned: list[tuple[CapturedUpdate, dict[int, Tensor]]] = []
        """What ``torch.autograd.grad`` has differentiated, with the gradient for each parameter, by id."""
        self._grads_unreduced = False
        """True if the last pass has kept gradients outside of ``.grad``."""
        self._versions_after_step: list[Any] = []
        self._versions_after_pass: list[Any] = []
        self._copies_gradients = True
        """True if the last update's gradients were changed between the backward pass and the step."""
        self._copies: dict[int, Tensor] | None = None
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
                    backward.terms.setdefault(self._key, []).append((term, gradient))

        loss.register_hook(receive_gradient)

    def use_thread(self) -> None:
        """Note that the loop runs in the present thread."""
        self._thread = threading.get_ident()

    def depends_on_parameters(self, values: Iterable[Any]) -> bool:
        """Return True if a value depends on the optimizer's parameters."""
        nodes = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
        return bool(nodes and self._composition(nodes, key="").direct)

    def has_terms(self) -> bool:
        """Return True if ``.grad`` holds a captured loss's gradient."""
        return not self._captured.is_empty() and not self._grads_are_none()

    def pop(self) -> CapturedUpdate:
        """Return and drop the losses of the next step."""
        if self._captured.is_empty() and self._captured.problem is None:
            self._captured = self._assigned() or self._captured
        self.was_cleared = not self._captured.is_empty() and self._grads_are_none()
        if self._grads_are_none():
            self._discard()
        captured, self._captured, self._unused = self._captured, CapturedUpdate([], []), None
        return captured if captured.is_empty() else self._with_gradients(captured)

    def _with_gradients(self, captured: CapturedUpdate) -> CapturedUpdate:
        """Add the gradient as the last pass has left it."""
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        copies, self._copies = self._copies, None
        # Hooks may have changed it within the pass.
        if self._grads_unreduced or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            return captured
        is_sharded = any(hasattr(parameter.grad, "to_local") for parameter in parameters)
        # Torch does not count writes to shards.
        self._copies_gradients = is_sharded or self._gradient_versions() != self._versions_after_pass
        return captured._replace(gradients=copies if self._copies_gradients else {}, is_changed=self._copies_gradients)

    def peek(self) -> CapturedUpdate:
        """Return a copy of the present losses."""
        captured = self._captured
        return captured._replace(terms=[replace(term) for term in captured.terms], roots=list(captured.roots))

    def finish_update(self) -> None:
        """Drop losses and mark gradients as used."""
        self.mark_gradients_used()
        self._returned.clear()
        self._grads_unreduced, self._unused, self.has_unseen_pass = False, None, False
        for pending in self._pending:
            pending.term = None
        self._pending.clear()

    def mark_gradients_used(self) -> None:
        """Note that the present gradients are of no later update."""
        self._versions_after_step = self._gradient_versions()

    def warn_if_no_step(self) -> None:
        """Warn if the optimizer made no step with captured losses."""
        if self._unused or (self._unused is not None and not self._captured.is_empty()):
            self._unused = None
            warnings.warn(NO_STEP, stacklevel=3)

    def begin(self, backward: BackwardPass) -> None:
        """Discard losses whose gradients were cleared since the last pass."""
        if threading.get_ident() != self._thread or not self._is_due():
            return
        backward.versions[self._key] = versions = self._gradient_versions()
        if not self._captured.is_empty() or self._captured.problem:
            # Reading values would block until an accelerator is done; there a write through .data is not detected.
            is_unwritten = versions == self._versions_after_pass
            is_kept = is_unwritten and any(p.device.type != "cpu" for p in self._parameters())
            is_kept = is_kept or self._grads_unreduced or self._zero_after_pass
            if self._grads_are_none() or not (is_kept or not self._grads_are_zero()):
                self._discard()
        elif any(versions) and versions == self._versions_after_step and not self._grads_are_zero():
            self._captured = CapturedUpdate([], [], STALE_GRADIENTS)
        if (recorder := self._recorder()) is not None:
            if all(isinstance(root, Tensor) for root in backward.roots):
                slot = recorder.add_root(backward.roots, backward.factors)
                backward.slots[self._key] = Root(slot, self._versions())
            recorder.stop()

    def end(self, backward: BackwardPass) -> None:
        """Make the losses of the pass terms."""
        versions = backward.versions.pop(self._key, None)
        if versions is None:
            return
        if (recorder := self._recorder()) is not None:
            recorder.start()
        were_unreduced, self._grads_unreduced = self._grads_unreduced, self._defers_reduction()
        self._versions_after_pass = self._gradient_versions()
        if not self._grads_unreduced and self._versions_after_pass == versions:
            return  # The pass was one for other parameters, or for inputs.
        if self._copies_gradients:
            held = {id(parameter): parameter.grad for parameter in self._parameters() if parameter.grad is not None}
            self._copies = {key: local(gradient).clone() for key, gradient in held.items()}
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters())
        self._zero_after_pass = on_cpu and self._grads_are_zero()
        if not backward.terms.get(self._key) and (were_unreduced or self._grads_unreduced):
            return
        self._add(backward)

    def note_gradients(self, backward: BackwardPass, inputs: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
        """Note gradients that the loop may assign to ``.grad``."""
        recorder, held = self._recorder(), {id(parameter) for parameter in self._parameters()}
        pairs = zip(inputs, gradients, strict=True)
        found = {id(tensor): gradient for tensor, gradient in pairs if gradient is not None and id(tensor) in held}
        if recorder is None or not found or threading.get_ident() != self._thread or not self._is_due():
            return
        if all(isinstance(root, Tensor) for root in backward.roots):
            root = Root(recorder.add_root(backward.roots, backward.factors), self._versions())
            value = self._differentiated_value(backward)
            self._returned.append((CapturedUpdate([], [root], differentiated=value), found))

    def _assigned(self) -> CapturedUpdate | None:
        """Return the loss whose gradient the loop has assigned.

        It is that of all parameters that have one.
        """
        gradients = {id(p): p.grad for p in self._parameters() if p.grad is not None}
        for captured, found in reversed(self._returned):
            is_assigned = {key: found.get(key) is gradient for key, gradient in gradients.items()}
            if gradients and all(is_assigned.values()):
                return captured
        return None

    def _add(self, backward: BackwardPass) -> None:
        captured = self._captured
        for term, weight in backward.terms.get(self._key, ()):
            if all(term is not other for other in captured.terms):
                captured.terms.append(term)
            term.weight = weight if term.weight is None else term.weight + weight
        root, roots_problem = backward.slots.get(self._key), captured.roots_problem
        if root is not None:
            captured.roots.append(root)
        elif roots_problem is None:
            roots_problem = NOT_RECORDED
        value, before = self._differentiated_value(backward), captured.differentiated
        self._captured = captured._replace(
            terms_problem=captured.terms_problem or self._problem(backward),
            roots_problem=roots_problem,
            differentiated=before if value is None else value if before is None else before + value.to(before),
        )

    def _discard(self) -> None:
        if self._unused is not None and not self._captured.is_empty():
            self._unused += 1
            if self._unused == MAX_UNUSED:
                self.warn_if_no_step()
        for term in self._captured.terms:
            term.weight = None  # The loop may have kept the graph, and may differentiate the loss again.
        if (recorder := self._recorder()) is not None:
            recorder.roots.clear()
        self._captured = CapturedUpdate([], [])

    def _contains(self, backward: BackwardPass) -> bool:
        """Return True if the pass differentiates captured losses."""
        if self._key not in backward.compositions:
            nodes = [root.grad_fn if isinstance(root, Tensor) else root.node for root in backward.roots]
            composition = self._composition(nodes, self._key)
            backward.compositions[self._key] = composition if composition.reaches_loss else None
        return backward.compositions[self._key] is not None

    def _composition(self, nodes: list[Any], key: str) -> Composition:
        return Composition.of(nodes, key, {id(parameter) for parameter in self._parameters()})

    def _problem(self, backward: BackwardPass) -> str | None:
        """Return the reason why terms are not the differentiated loss."""
        if not backward.terms.get(self._key):
            return UNKNOWN_LOSS
        composition = backward.compositions[self._key]
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
        return torch.stack([value.to(values[0]) for value in values]).sum()

    def _gradient_versions(self) -> list[tuple[int, int] | None]:
        return gradient_versions(self._parameters())

    def _grads_are_none(self) -> bool:
        return not self._grads_unreduced and all(parameter.grad is None for parameter in self._parameters())

    def _grads_are_zero(self) -> bool:
        """Return True if all gradients are zero."""
        # The first gradient is mostly not zero, and ends the search.
        gradients = (parameter.grad for parameter in self._parameters() if parameter.grad is not None)
        return not any(bool(_values(gradient).any()) for gradient in gradients)


def gradient_versions(parameters: Iterable[Tensor]) -> list[tuple[int, int] | None]:
    """Return address and number of writes of each gradient."""
    gradients = [parameter.grad for parameter in parameters]
    values = [None if gradient is None else _values(gradient) for gradient in gradients]
    return [None if tensor is None else (tensor.data_ptr(), tensor._version) for tensor in values]


def _values(gradient: Tensor) -> Tensor:
    return local(gradient)._values() if gradient.is_sparse else local(gradient)
