"""The points of a ray by code that :func:`torch.compile` made of the model, for those who ask for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.affine import affine
from landscape.objective import Base, Term
from landscape.walk import Ray, Walk


class Compiled:
    """Compiles the model on its first ray, which takes as long as ``torch.compile`` does, and once more on its second.

    From the second update of a run on, linear layers that all points share are sums of two products, as in affine
    evaluation. Random numbers are those of the model by itself.
    """

    def __init__(self) -> None:
        self._begun = False
        self._forwards: dict[str, Callable[..., Tensor]] = {}
        self._compiled: nn.Module | None = None

    def __call__(self, ray: Ray) -> Tensor:
        """The K losses; a RuntimeError where the model cannot be compiled."""
        if not self._begun:
            self._begun = True
            affine(ray)  # which finds out what is shared
        with torch.compiler.set_stance("default"):
            return ray.objective.total([torch.stack(self._term_losses(term, ray)) for term in ray.objective.terms])

    def _term_losses(self, term: Term, ray: Ray) -> list[Tensor]:
        walk = Walk(ray)
        layers = self._layers(term, walk)
        skipped = {name for layer in layers for name in layer.base.parameters}

        def move(eta: float) -> None:
            walk.move(eta, skipped)
            for layer in layers:
                layer.stand_in(eta)

        replay = replace(term, closure=lambda model: term.closure(self._of(model)))
        return replay.losses(walk.point, [partial(move, eta) for eta in ray.step_sizes])

    def _layers(self, term: Term, walk: Walk) -> "list[_Layer]":
        """The layers that the forward pass of the update has evaluated; those called twice are left to the model."""
        bases: dict[str, list[Base]] = {}
        for base in term.bases:
            bases.setdefault(next(iter(base.parameters)).rpartition(".")[0], []).append(base)
        layers = []
        for path, (base, *others) in bases.items():
            if not others:
                module = term.state.scene.model.get_submodule(path)
                # Always the same function, or else the model would be compiled anew.
                forward = self._forwards.setdefault(path, partial(_sum, module))
                layers.append(_Layer(module, forward, base, walk))
        return layers

    def _of(self, model: nn.Module) -> nn.Module:
        if self._compiled is None or self._compiled._orig_mod is not model:
            options: dict[str, Any] = {"fallback_random": True}
            self._compiled = torch.compile(model, options=options)  # pyright: ignore[reportAttributeAccessIssue]
        return self._compiled  # pyright: ignore[reportReturnType]


class _Layer:
    """A linear layer whose input does not depend on eta: a sum of what is known at theta and along the direction."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor], base: Base, walk: Walk) -> None:
        self.module, self.forward, self.base = module, forward, base
        slope = F.linear(base.inputs, *(walk.direction[name] for name in base.parameters))
        self.attributes = {"_base": base.outputs, "_slope": slope, "_eta": slope.new_empty(())}

    def stand_in(self, eta: float) -> None:
        """Let the module give its output at ``eta``; what a module holds is put back after the ray."""
        self.attributes["_eta"].fill_(eta)
        vars(self.module).update(self.attributes, _forward_hooks={}, forward=self.forward)


def _sum(layer: Any, inputs: Tensor) -> Tensor:
    return layer._base - layer._eta * layer._slope
