"""Backward passes of the user's loop: which losses have their gradient in ``.grad``, and what was differentiated."""

import functools
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import unserializable_hook

from landscape.distributed.fsdp import local
from landscape.ray.objective import LossTerm

WHOLE = (
    "Hand over all of it by probe.observe, in a probe without a criterion: "
    "`loss = probe.observe(lambda model, inputs, targets: ..., inputs, targets)`"
)
STALE = (
    "Gradients were not cleared after the last step, so the optimizer gets a sum over several updates, which is the "
    "gradient of no loss at these parameters. Call optimizer.zero_grad() once for each update."
)
PATIENCE = 25
"""Losses of which no update comes, before there was one, after which that is said."""
_LINEAR = re.compile(
    r"(Add|Sub|Rsub|Neg|Sum|Mean|Stack|Cat|Unbind|Select|View|UnsafeView|ViewAs|Reshape|ReshapeAlias|Squeeze|Unsqueeze"
    r"|Expand|Permute|T|Transpose|Clone|Alias|ToCopy|Copy)Backwards?\d*|CopySlices"
)
_PRODUCT = re.compile(r"(Mul|Dot|Mv|Mm|Bmm)Backward\d*")
_QUOTIENT = re.compile(r"DivBackward\d*")


class Captured(NamedTuple):
    """What an update is made of."""

    terms: list[LossTerm]
    """The losses whose gradient the optimizer gets."""
    problem: str | None = None
    """Why they are not what was differentiated."""
    differentiated: Tensor | None = None
    """The value of what was differentiated, without the scale of a loss scaler."""


class AwaitedLoss:
    """What the hook of a loss holds: its term until the update is made, because the loop may keep the loss."""

    def __init__(self, term: LossTerm) -> None:
        self.term: LossTerm | None = term


class Passes:
    """Keeps the losses whose gradient is in ``.grad``.

    A hook on a loss tells that a pass goes through it; after the pass it is a term. When the next pass begins and
    gradients are gone or zero, an update never came of the terms so far, and they are forgotten::

        forward, backward, zero_grad, forward, backward, step        # the second loss alone is that of the update
        forward, backward, forward, zero_grad, backward, step        # the second loss alone
        forward, backward, forward, backward, step                   # both, as under accumulation

    What ``torch.autograd.grad`` differentiates is in no ``.grad``, and is no term.

    Args:
        parameters: The parameters of the optimizer.
        name_of: What the model calls one of them.
        wanted: Whether the update is to be probed.
        is_held_back: Whether a pass leaves gradients where they cannot be seen, for one that reduces them.
        scale: The factor that a loss scaler multiplies losses with, in the shape of the tensor that it is given.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        name_of: Callable[[Tensor], str],
        wanted: Callable[[], bool],
        is_held_back: Callable[[], bool],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self._parameters, self._name_of, self._wanted = parameters, name_of, wanted
        self._is_held_back, self._scale = is_held_back, scale
        self._key = f"landscape-{id(self)}"
        self._captured = Captured([])
        self._held: weakref.WeakSet[AwaitedLoss] = weakref.WeakSet()
        self._held_back = False
        self._after_step: list[Any] = []
        self._after_pass: list[Any] = []
        self._was_zero = False
        """Whether the gradient was zero at the end of the last pass, without having been cleared."""
        self.is_cleared = False
        """Whether the gradients of the losses of the last update were cleared before its step."""
        self._thread = threading.get_ident()
        """In which the loop runs; passes of other threads are of other trainings."""
        self.is_elsewhere = False
        """Whether a loss was differentiated in a way that is not seen, such as by ``torch.autograd.grad``."""
        self._wasted: int | None = 0
        """Number of captured losses of which no update came; None after there was one."""

    def await_(self, term: LossTerm, loss: Tensor) -> None:
        """Make the loss a term once a backward pass has gone through it; until then the loss alone holds it."""
        self._thread = threading.get_ident()
        if loss.grad_fn is not None:
            metadata: Any = loss.grad_fn.metadata
            metadata[self._key] = True

        held = AwaitedLoss(term)
        self._held.add(held)

        @unserializable_hook
        def through(gradient: Tensor) -> None:
            self.is_elsewhere |= not _under_way
            for one in tuple(_under_way):
                if (term := held.term) is not None and self._key in one.watched and self._composed(one):
                    gradient = gradient.detach().reshape(() if gradient.numel() == 1 else gradient.shape)
                    weight = gradient / self._scale(torch.ones_like(gradient))
                    one.terms.setdefault(self._key, []).append((term, weight))

        loss.register_hook(through)

    def carries(self, values: Iterable[Any]) -> bool:
        """Whether one of the values was computed from parameters of the optimizer, by what autograd remembers."""
        nodes = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
        return bool(nodes and composition(nodes, "", {id(parameter) for parameter in self._parameters()})[1])

    def has_terms(self) -> bool:
        """Whether there are losses whose gradient the optimizer would get now."""
        return bool(self._captured.terms) and not self._are_gone()

    def take(self) -> Captured:
        """What the update that is about to be made is made of; nothing of it is kept."""
        self.is_cleared = bool(self._captured.terms) and self._are_gone()
        if self._are_gone():
            self._forget()
        captured, self._captured, self._wasted = self._captured, Captured([]), None
        return captured

    def peek(self) -> Captured:
        """What the update would be made of now, as it is now."""
        return self._captured._replace(terms=[replace(term) for term in self._captured.terms])

    def step_made(self) -> None:
        """The optimizer has made its step, so what is left of gradients is used."""
        self.look()
        self._held_back, self._wasted, self.is_elsewhere = False, None, False
        for held in self._held:
            held.term = None
        self._held.clear()

    def look(self) -> None:
        """What is in gradients now is of no update to come."""
        self._after_step = self._marks()

    def tell_of_waste(self) -> None:
        """Warn if losses were differentiated, but no step of the optimizer was seen."""
        if self._wasted or (self._wasted is not None and self._captured.terms):
            self._wasted = None
            warnings.warn(
                "Losses were differentiated, but the optimizer that the probe was given has made no step, so nothing "
                "is recorded. Give the probe the optimizer whose step() the loop calls. Sharpness-aware minimization "
                "in two calls (first_step, second_step) cannot be probed; by optimizer.step(closure) it can.",
                stacklevel=3,
            )

    def begin(self, one: "Pass") -> None:
        """A pass begins; what it is about is found out when it goes through a loss."""
        if threading.get_ident() != self._thread or not self._wanted():
            return
        one.watched[self._key] = marks = self._marks()
        if self._captured.terms or self._captured.problem:
            # To look at values, an accelerator would have to be waited for; there a write through .data is not seen.
            is_sure = marks == self._after_pass and any(p.device.type != "cpu" for p in self._parameters())
            if self._are_gone() or not (is_sure or self._held_back or self._was_zero or not self._are_zero()):
                self._forget()
        elif any(marks) and marks == self._after_step and not self._are_zero():
            self._captured = Captured([], STALE)

    def end(self, one: "Pass") -> None:
        """A pass has ended: its losses are terms now."""
        before = one.watched.pop(self._key, None)
        if before is None:
            return
        was_held_back, self._held_back = self._held_back, self._is_held_back()
        self._after_pass = self._marks()
        if not self._held_back and self._after_pass == before:
            return  # it was about other parameters, or inputs
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters())
        self._was_zero = on_cpu and self._are_zero()
        if one.terms.get(self._key):
            self._add(one)
        elif not (was_held_back or self._held_back):
            problem = f"A backward pass that went through no captured loss has added to the gradient. {WHOLE}."
            self._captured = self._captured._replace(problem=self._captured.problem or problem)

    def _add(self, one: "Pass") -> None:
        terms, problem, differentiated = self._captured
        for term, weight in one.terms[self._key]:
            if all(term is not known for known in terms):
                terms.append(term)
            term.weight = weight if term.weight is None else term.weight + weight
        value = self._value(one)
        if differentiated is not None and value is not None:
            value = differentiated + value
        self._captured = Captured(terms, problem or self._problem(*one.compositions[self._key]), value)

    def _forget(self) -> None:
        if self._wasted is not None and self._captured.terms:
            self._wasted += 1
            if self._wasted == PATIENCE:
                self.tell_of_waste()
        for term in self._captured.terms:
            term.weight = None  # its graph may have been kept, to be differentiated again
        self._captured = Captured([])

    def _composed(self, one: "Pass") -> bool:
        """Whether the pass differentiates something that is made of captured losses."""
        if self._key not in one.compositions:
            nodes = [root.grad_fn if isinstance(root, Tensor) else root.node for root in one.roots]
            leads, *rest = composition(nodes, self._key, {id(parameter) for parameter in self._parameters()})
            one.compositions[self._key] = rest if leads else None
        return one.compositions[self._key] is not None

    def _problem(self, loose: Sequence[Tensor], other: str | None) -> str | None:
        if other is not None:
            return f"What was differentiated is no weighted sum of the captured losses, but their {other}. {WHOLE}."
        if loose:
            return (
                f"What was differentiated depends on {self._name_of(loose[0])!r} by more than the captured losses (a "
                f"penalty, a second loss). {WHOLE}."
            )
        return None

    def _value(self, one: "Pass") -> Tensor | None:
        if not all(isinstance(root, Tensor) for root in one.roots):
            return None
        pairs = zip(one.roots, one.factors, strict=True)
        values = [root.detach().sum() if by is None else (root.detach() * by.detach()).sum() for root, by in pairs]
        value = torch.stack([value.to(values[0]) for value in values]).sum()
        return value / self._scale(torch.ones_like(value))

    def _marks(self) -> list[Any]:
        """Where each gradient is, and how often it was written to; None where there is none."""
        gradients = (parameter.grad for parameter in self._parameters())
        return [None if gradient is None else _mark(gradient) for gradient in gradients]

    def _are_gone(self) -> bool:
        return not self._held_back and all(parameter.grad is None for parameter in self._parameters())

    def _are_zero(self) -> bool:
        """Whether all gradients are zero; it ends with the first that is not, which is mostly the first."""
        gradients = (parameter.grad for parameter in self._parameters() if parameter.grad is not None)
        return not any(bool(_values(gradient).any()) for gradient in gradients)


def _mark(gradient: Tensor) -> tuple[int, int]:
    gradient = _values(gradient)
    return gradient.data_ptr(), gradient._version


def _values(gradient: Tensor) -> Tensor:
    return local(gradient)._values() if gradient.is_sparse else local(gradient)


def composition(roots: Sequence[Any], key: str, walked: Container[int]) -> tuple[bool, list[Tensor], str | None]:
    """How the tensors that ``roots`` have computed are made of captured losses, by autograd's graph.

    Args:
        roots: Nodes of the graph.
        key: What the nodes of captured losses have among their ``metadata``.
        walked: Parameters, by id, of which nothing else may depend.

    Returns:
        Whether they depend on a captured loss; the walked parameters that they depend on in another way; and an
        operation on captured losses, if there is one, that is more than a weighted sum.
    """
    leads: dict[Any, bool] = {}
    loose: list[Tensor] = []
    other: str | None = None
    waiting = [(node, False) for node in roots if node is not None]
    while waiting:
        node, is_seen = waiting.pop()
        if is_seen:
            ways = [leads.get(child, False) for child, _ in node.next_functions]
            leads[node] = any(ways)
            if leads[node] and not _is_weighted_sum(node.name(), ways):
                other = re.sub(r"Backward\d*$", "", node.name()).lower()
        elif node not in leads:
            leads[node] = key in node.metadata
            if node.name() == "torch::autograd::AccumulateGrad":
                loose += [node.variable] if id(node.variable) in walked else []
            elif not leads[node]:
                waiting.append((node, True))
                waiting += [(child, False) for child, _ in node.next_functions if child is not None]
    return any(leads[node] for node in roots if node is not None), loose, other


def _is_weighted_sum(name: str, ways: Sequence[bool]) -> bool:
    """Whether a function is linear in those of its arguments that depend on captured losses."""
    if _PRODUCT.fullmatch(name):
        return sum(ways) == 1
    if _QUOTIENT.fullmatch(name):
        return not any(ways[1:])
    return _LINEAR.fullmatch(name) is not None


@dataclass(eq=False)
class Pass:
    """A backward pass: what it differentiates, by which factors, and what those who watch know of it."""

    roots: Sequence[Any]
    factors: Sequence[Tensor | None]
    watched: dict[str, list[Any]] = field(default_factory=dict)
    compositions: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, list[tuple[LossTerm, Tensor]]] = field(default_factory=dict)


_under_way: list[Pass] = []
_watching: list[Passes] = []
_backward: Callable[..., Any] = torch.autograd.backward
"""What ``torch.autograd.backward`` is while nothing is watched."""


@functools.wraps(torch.autograd.backward)
def _seen(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # a pass within a pass, as of checkpoints, belongs to it
        return _backward(tensors, grad_tensors, *args, **kwargs)
    roots: Any = [tensors] if isinstance(tensors, Tensor | GradientEdge) else list(tensors)
    factors = [grad_tensors] if isinstance(grad_tensors, Tensor) else [*(grad_tensors or [None] * len(roots))]
    one, watching = Pass(roots, factors), tuple(_watching)
    for passes in watching:
        passes.begin(one)
    _under_way.append(one)
    try:
        _backward(roots, grad_tensors, *args, **kwargs)
    finally:
        _under_way[:] = [other for other in _under_way if other is not one]
    for passes in watching:
        passes.end(one)


def watch(passes: Passes) -> None:
    """See what backward passes differentiate: in autograd's graph, no way leads from a loss to what is made of it."""
    global _backward
    unwatch(passes)
    _watching.append(passes)
    if torch.autograd.backward is not _seen:
        _backward, torch.autograd.backward = torch.autograd.backward, _seen


def unwatch(passes: Passes) -> None:
    """See it no more."""
    _watching[:] = [other for other in _watching if other is not passes]
    if not _watching and torch.autograd.backward is _seen:
        torch.autograd.backward = _backward
