"""A small training, run with a probe and without, and compared with a naive reference."""

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
ENGINES = ["loop", "auto"]
UPDATES = 4


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(updates=UPDATES, seed=2):
    """Yield the inputs and targets of each update."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        yield torch.randn(12, 6, dtype=torch.float64, generator=generator), torch.arange(12) % 3


@dataclass
class Result:
    """The result of a training: losses, final state, and the rows and warnings of the probe."""

    frame: pd.DataFrame | None = None
    losses: list[float] = field(default_factory=list)
    """Losses of all updates, as the loop computed them."""
    references: list[list[float]] = field(default_factory=list)
    """Losses along the ray of each update, computed with moved copies of the model."""
    state: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Lab:
    """The environment of a trial: it attaches a probe, or none, and records what the training does.

    A trial is a function that trains, and calls for each update::

        lab.copy_modules(model, ...)         # before the forward pass
        lab.record_update(loss, total)       # before the step; total(model, ...) is the loss

    and at the end ``lab.record_state(model, ...)``.
    """

    def __init__(self, probed, alone=False, **options):
        self.probed, self.options, self.result = probed, {"step_sizes": STEP_SIZES} | options, Result()
        self.probe, self.alone = None, alone

    @contextmanager
    def attached(self, model, optimizer, criterion=None, **options):
        self.model, self.optimizer = model, optimizer
        if self.probed:
            options = self.options | options
            if self.alone:
                criterion, options = None, options | {"engine": "tape", "grad_scaler": None}
            self.probe = LandscapeProbe(model, optimizer, criterion, **options)
            with self.probe:
                yield self
            self.result.frame = self.probe.frame()
        else:
            yield self

    def observe(self, closure, *args, **kwargs):
        if self.probe is None or self.alone:
            return closure(self.model, *args, **kwargs)
        return self.probe.observe(closure, *args, **kwargs)

    def copy_modules(self, *modules):
        """Copy the modules, of which the first is the probed model, and the RNG state."""
        self._copies, self._rng_state = copy.deepcopy(modules), torch.get_rng_state()

    def record_update(self, loss, total):
        """Record the loss of an update, and the losses along its ray by moved copies."""
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
            torch.set_rng_state(self._rng_state)
            row.append(total(*moved).item())
        torch.set_rng_state(now)
        self.result.references.append(row)

    def record_state(self, *modules):
        """Record all tensors of the modules and the optimizer, and which names share an object."""
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
        state["rng_state"] = torch.get_rng_state()


def run(trial, probed, **options):
    """Return the result of ``trial(lab)``, with warnings recorded instead of raised."""
    torch.manual_seed(0)
    lab = Lab(probed, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trial(lab)
    lab.result.warnings = [str(warning.message) for warning in caught if "landscape" in warning.filename or probed]
    return lab.result


def check_same_training(trial, **options):
    """Check that all bits, and the object of each name, are those of a training without a probe."""
    probed, bare = run(trial, True, **options), run(trial, False)
    assert probed.objects == bare.objects
    assert probed.state.keys() == bare.state.keys()
    for name, value in bare.state.items():
        other = probed.state[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same or (value is other is None), name
    assert probed.losses == bare.losses
    return probed


def check_rows(trial, missing=(), rel=1e-9, alone=True, alone_missing=(), **options):
    """Check that the training is the same, and that all rows but the ``missing`` ones equal the references.

    Unless ``alone`` is false, the same is checked of a probe that is told neither criterion nor closures.
    """
    result = _check_rows(trial, missing, rel, options)
    if alone:
        _check_rows(trial, alone_missing, rel, options | {"alone": True})
    return result


def _check_rows(trial, missing, rel, options):
    result = check_same_training(trial, **options)
    steps = [step for step in range(len(result.losses)) if step not in missing]
    assert list(result.frame["step"]) == steps, result.warnings
    for step, (_, row) in zip(steps, result.frame.iterrows(), strict=True):
        assert math.isclose(row["loss"], result.losses[step], rel_tol=rel), step
        for got, expected in zip(row["losses"], result.references[step], strict=True):
            assert math.isclose(got, expected, rel_tol=rel), (step, list(row["losses"]), result.references[step])
    return result
