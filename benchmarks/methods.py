"""Methods to compute the losses along a ray: those of this package, and common alternatives."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.side_effects import SideEffects
from benchmarks.workloads import BARE, Workload
from landscape import LandscapeProbe, ray_losses


class NotRunError(RuntimeError):
    """A method does not apply; the message states why."""


class Workbench:
    """A workload on a device: model, batch, optimizer and gradient.

    The learning rate is 0, so every round measures the same point.
    """

    def __init__(self, workload: Workload, device: str) -> None:
        torch.manual_seed(0)
        self.step_sizes, self.autocast_type, self.device = workload.step_sizes, workload.autocast, device
        self.model = workload.model().to(device)
        self.inputs, self.targets = (tensor.to(device) for tensor in workload.batch())
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        before = SideEffects.snapshot(self.model)
        self.update()
        self.gradient = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        before.restore(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.grad = self.gradient[name].clone() if name in self.gradient else None
        self.start = SideEffects.snapshot(self.model)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(torch.device(self.device).type, self.autocast_type, self.autocast_type is not None):
            yield

    def loss(self, model: nn.Module, criterion: nn.Module | None = None) -> Tensor:
        with self.autocast():
            return (criterion or self.criterion)(model(self.inputs), self.targets)

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model).backward()
        self.optimizer.step()


class ProbedCopy:
    """Copy of a workbench's model, trained with a probe.

    It has its own criterion, which the probe is told if it is ``given``, so hooks do not affect the original.
    """

    def __init__(self, workbench: Workbench, given: bool = False, **options: Any) -> None:
        self.workbench, self.model, self.criterion = workbench, copy.deepcopy(workbench.model), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        options = {"step_sizes": workbench.step_sizes} | options
        self.probe = LandscapeProbe(self.model, self.optimizer, self.criterion if given else None, **options)
        self.probe.attach()

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.workbench.loss(self.model, self.criterion).backward()
        self.optimizer.step()

    def warm_up(self) -> str:
        """Update beyond the first checks; return the engine's name."""
        for _ in range(4):
            self.update()
        return str(self.probe.frame()["engine"].iloc[-1])


@torch.no_grad()
def bare(workbench: Workbench) -> None:
    """Run K forward passes, the base of all ratios."""
    for _ in workbench.step_sizes:
        workbench.loss(workbench.model)


def ray(workbench: Workbench, engine: str) -> Tensor:
    return ray_losses(workbench.model, workbench.loss, workbench.gradient, workbench.step_sizes, engine=engine)


@torch.no_grad()
def in_place(workbench: Workbench) -> Tensor:
    losses = []
    for eta in workbench.step_sizes:
        _move(workbench.model, workbench, eta)
        losses.append(workbench.loss(workbench.model))
        _move(workbench.model, workbench, -eta)
    return torch.stack(losses)


@torch.no_grad()
def deepcopy(workbench: Workbench) -> Tensor:
    losses = []
    for eta in workbench.step_sizes:
        model = copy.deepcopy(workbench.model)
        _move(model, workbench, eta)
        losses.append(workbench.loss(model))
    return torch.stack(losses)


def _move(model: nn.Module, workbench: Workbench, eta: float) -> None:
    for name, parameter in model.named_parameters():
        if name in workbench.gradient:
            parameter.sub_(workbench.gradient[name], alpha=eta)


@torch.no_grad()
def plain_vmap(workbench: Workbench, buffers: bool = False) -> Tensor:
    """Evaluate all points as one model with stacked parameters.

    With ``buffers``, buffers are stacked too, and all points share their random numbers.
    """
    points = len(workbench.step_sizes)
    etas = torch.tensor(workbench.step_sizes, device=workbench.device)
    stacked = {}
    for name, parameter in workbench.model.named_parameters():
        gradient = workbench.gradient.get(name, torch.zeros_like(parameter))
        stacked[name] = torch.addcmul(parameter, etas.view(-1, *[1] * gradient.dim()), gradient, value=-1)
    if buffers:
        stacked |= {n: b.expand(points, *b.shape).clone() for n, b in workbench.model.named_buffers()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return workbench.loss(partial(functional_call, workbench.model, tensors))  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return vmap(loss, randomness="same" if buffers else "error")(stacked)


def loss_landscapes(workbench: Workbench) -> Tensor:
    try:
        from loss_landscapes import linear_interpolation
        from loss_landscapes.metrics import Loss
    except ImportError as error:
        raise NotRunError('not run: needs loss-landscapes (pip install ".[bench]")') from error
    end = copy.deepcopy(workbench.model)
    with torch.no_grad():
        _move(end, workbench, workbench.step_sizes[-1])
    metric = Loss(workbench.criterion, workbench.inputs, workbench.targets)
    with workbench.autocast():
        losses = linear_interpolation(workbench.model, end, metric, len(workbench.step_sizes), deepcopy_model=True)
    return torch.from_numpy(losses)


def evaluation_loop(workbench: Workbench) -> Tensor:
    """Assign each point's weights to a copy in evaluation mode.

    This is the loop of PyHessian's tutorial on loss landscapes.
    """
    copied = copy.deepcopy(workbench.model).eval()
    losses = []
    for eta in workbench.step_sizes:
        for (name, there), here in zip(copied.named_parameters(), workbench.model.parameters(), strict=True):
            if name in workbench.gradient:
                there.data = here.data - eta * workbench.gradient[name]
        losses.append(workbench.loss(copied).item())  # The tutorial does not disable gradients.
    return torch.tensor(losses)


@dataclass(frozen=True)
class Method:
    """Method to compute the losses along a ray.

    Attributes:
        name: Name of its row in tables and charts.
        run: Returns the losses (K,), or None if it computes none.
        note: Remark below the table.
        replaces: Name of another method; this one runs only if that fails.
    """

    name: str
    run: Callable[[Workbench], Tensor | None]
    note: str = ""
    replaces: str = ""


METHODS = [
    Method(BARE, bare),
    *(Method(f"landscape, {name}", partial(ray, engine=name)) for name in ("loop", "tape")),
    Method("in-place loop", in_place),
    Method("deepcopy per point", deepcopy),
    Method("vmap", plain_vmap),
    Method("vmap, buffers stacked", partial(plain_vmap, buffers=True), replaces="vmap"),
    Method("loss-landscapes", loss_landscapes),
    Method("loop of PyHessian's tutorial", evaluation_loop, note="measures evaluation mode, which is another function"),
]
