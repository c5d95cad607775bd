"""The points of a ray by code that :func:`torch.compile` made of the model, for those who ask for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from landscape.ray.engines.loop import loop
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray


class Compiled:
    """The loop, with the model compiled on the first ray, which takes as long as ``torch.compile`` does.

    It evaluates every point in full: whether a layer's input is the same at all points is found by looking at memory,
    which compiled code does not let be seen. Random numbers are those of the model by itself.
    """

    def __init__(self) -> None:
        self._compiled: Any = None

    def __call__(self, ray: Ray) -> Tensor:
        """The K losses; a RuntimeError where the model cannot be compiled."""
        terms = [
            replace(
                term,
                closure=lambda model, term=term: term.closure(self._of(model)),
                state=replace(term.state, detects_foreign_modules=False),
            )
            for term in ray.objective.terms
        ]
        with torch.compiler.set_stance("default"):
            return loop(replace(ray, objective=Objective(terms)))

    def _of(self, model: nn.Module) -> nn.Module:
        if self._compiled is None or self._compiled._orig_mod is not model:
            self._compiled = torch.compile(model, options={"fallback_random": True})
        return self._compiled
