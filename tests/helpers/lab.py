"""A small training, run with a probe and without one, beside references that are computed in the obvious way."""

import copy
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from landscape import LandscapeProbe

STEP_SIZES = [0.0, 0.05, 0.1, 0.4]
ENGINES = ["loop", "affine", "stacked", "auto"]
UPDATES = 4


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(updates=UPDATES, seed=2):
    """Inputs and targets of every update."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        yield torch.randn(12, 6, dtype=torch.float64, generator=generator), torch.arange(12) % 3


@dataclass
class Result:
    """What a training leaves behind: its losses and its bits, and what the probe has recorded and said."""

    frame: pd.DataFrame | None = None
    losses: list[float] = field(default_factory=list)
    """Of every update that was made, as the loop computed them."""
    references: list[list[float]] = field(default_factory=list)
    """Of every update, the losses along the ray, by moved copies of the model."""
    state: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, list[int]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


class Lab:
    """What a trial trains in: it attaches a probe, or none, and looks at what is left.

    A trial calls ``before(*modules)`` before the forward pass of an update and ``update(loss, total)`` before its step,
    with ``total(*modules)`` the loss that is differentiated, as a function of the modules.
    """

    def __init__(self, probed, **options):
        self.probed, self.options, self.result = probed, {"step_sizes": STEP_SIZES} | options, Result()
        self.probe = None

    @contextmanager
    def attached(self, model, optimizer, criterion=None, **options):
        self.model, self.optimizer = model, optimizer
        if self.probed:
            self.probe = LandscapeProbe(model, optimizer, criterion, **self.options | options)
            with self.probe:
                yield self
            self.result.frame = self.probe.frame()
        else:
            yield self

    def observe(self, closure, *args, **kwargs):
        if self.probe is None:
            return closure(self.model, *args, **kwargs)
        return self.probe.observe(closure, *args, **kwargs)

    def before(self, *modules):
        """Copy the modules, the first of which is the probed model, and the random stream."""
        self._copies, self._stream = copy.deepcopy(modules), torch.get_rng_state()

    def update(self, loss, total):
        """The update that is about to be made: its loss, and what that is as a function of the modules."""
        self.result.losses.append(float(loss))
        now, held = torch.get_rng_state(), {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None and id(p) in held}
        row = []
        for eta in STEP_SIZES:
            moved = copy.deepcopy(self._copies)
            named = dict(moved[0].named_parameters())
            with torch.no_grad():
                for name, gradient in gradients.items():
                    named[name] -= eta * gradient.detach().to_dense()
            torch.set_rng_state(self._stream)
            row.append(total(*moved).item())
        torch.set_rng_state(now)
        self.result.references.append(row)

    def left(self, *modules):
        """Remember all that the modules and the optimizer hold."""
        state, objects = self.result.state, self.result.objects
        seen = {id(self.optimizer): 0}
        for place, module in enumerate(modules):
            for path, part in module.named_modules(remove_duplicate=False):
                for owner in (part._parameters, part._buffers):
                    for name, tensor in owner.items():
                        objects[f"{place}.{path}.{name}"] = seen.setdefault(id(tensor), len(seen))
                        if tensor is not None:
                            state[f"{place}.{path}.{name}"] = tensor.detach().clone()
                            gradient = None if tensor.grad is None else tensor.grad.detach().to_dense()
                            state[f"{place}.{path}.{name}.grad"] = gradient if gradient is None else gradient.clone()
                objects[f"{place}.{path}.training"] = part.training
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        objects["optimizer"] = [seen.get(id(parameter), -1) for parameter in held]
        for place, parameter in enumerate(held):
            for name, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{place}.{name}"] = value
        state["stream"] = torch.get_rng_state()


def run(trial, probed, **options):
    """The result of ``trial(lab)``, in which warnings are heard and not raised."""
    torch.manual_seed(0)
    lab = Lab(probed, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trial(lab)
    lab.result.said = [str(warning.message) for warning in said if "landscape" in warning.filename or probed]
    return lab.result


def check_untouched(trial, **options):
    """Every bit, and every object that a name leads to, is as in a training without a probe."""
    probed, bare = run(trial, True, **options), run(trial, False, **options)
    assert probed.objects == bare.objects
    assert probed.state.keys() == bare.state.keys()
    for name, value in bare.state.items():
        other = probed.state[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same or (value is other is None), name
    assert probed.losses == bare.losses
    return probed


def check_rows(trial, missing=(), rel=1e-9, **options):
    """The training is untouched, and each row but the ``missing`` ones is what the references say."""
    result = check_untouched(trial, **options)
    steps = [step for step in range(len(result.losses)) if step not in missing]
    assert list(result.frame["step"]) == steps
    for step, (_, row) in zip(steps, result.frame.iterrows(), strict=True):
        assert math.isclose(row["loss"], result.losses[step], rel_tol=rel), step
        for got, expected in zip(row["losses"], result.references[step], strict=True):
            assert math.isclose(got, expected, rel_tol=rel), (step, list(row["losses"]), result.references[step])
    return result
