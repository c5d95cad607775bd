"""The ways to measure the losses along a ray: this package's, and what people do without it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.side_effects import Footprint
from benchmarks.workloads import BARE, Workload
from landscape import LandscapeProbe, ray_losses
from landscape.ray.engines.registry import ENGINES, OPT_IN


class NotRunError(RuntimeError):
    """There is no sense in this way here, and the message says why."""


class Setting:
    """A workload made real: a model at one point, with its gradient there, and twins of it trained with probes.

    Learning rates are 0, so that every round sees the same point.
    """

    def __init__(self, workload: Workload, device: str) -> None:
        torch.manual_seed(0)
        self.step_sizes, self.autocast_type, self.device = workload.step_sizes, workload.autocast, device
        self.model = workload.model().to(device)
        self.inputs, self.targets = (tensor.to(device) for tensor in workload.batch())
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        before = Footprint.of(self.model)
        self.update()
        self.gradient = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        before.restore(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.grad = self.gradient[name].clone() if name in self.gradient else None
        self.start = Footprint.of(self.model)

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


class Twin:
    """A copy of a setting's model that is trained with a probe; its hooks are on a criterion of its own."""

    def __init__(self, setting: Setting, engine: str) -> None:
        self.setting, self.model, self.criterion = setting, copy.deepcopy(setting.model), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        step_sizes = setting.step_sizes
        self.probe = LandscapeProbe(self.model, self.optimizer, self.criterion, step_sizes=step_sizes, engine=engine)
        self.probe.attach()

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.setting.loss(self.model, self.criterion).backward()
        self.optimizer.step()

    def settle(self) -> str:
        """Update until the probe has found its engine, and what is compiled on first use is; the engine's name."""
        for _ in range(8):
            self.update()
            if "engine" in (frame := self.probe.frame()):
                engine = str(frame["engine"].iloc[-1])
                for _ in range(2 * (engine in OPT_IN)):
                    self.update()
                return engine
        return "undecided"


@torch.no_grad()
def bare(setting: Setting) -> None:
    """K forward passes where the model is, which is what every ratio is of."""
    for _ in setting.step_sizes:
        setting.loss(setting.model)


def ray(setting: Setting, engine: str) -> Tensor:
    if engine == "channels_last" and not any(tensor.dim() in (4, 5) for tensor in setting.gradient.values()):
        raise NotRunError("not run: no convolutions, so it is the affine engine")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The engine", UserWarning)  # a refusal: the loop would be timed in its place
        return ray_losses(setting.model, setting.loss, setting.gradient, setting.step_sizes, engine=engine)


@torch.no_grad()
def in_place(setting: Setting) -> Tensor:
    losses = []
    for eta in setting.step_sizes:
        _move(setting.model, setting, eta)
        losses.append(setting.loss(setting.model))
        _move(setting.model, setting, -eta)
    return torch.stack(losses)


@torch.no_grad()
def deepcopy(setting: Setting) -> Tensor:
    losses = []
    for eta in setting.step_sizes:
        model = copy.deepcopy(setting.model)
        _move(model, setting, eta)
        losses.append(setting.loss(model))
    return torch.stack(losses)


def _move(model: nn.Module, setting: Setting, eta: float) -> None:
    for name, parameter in model.named_parameters():
        if name in setting.gradient:
            parameter.sub_(setting.gradient[name], alpha=eta)


@torch.no_grad()
def plain_vmap(setting: Setting, buffers: bool = False) -> Tensor:
    """All points as one model with stacked parameters; ``buffers`` stacks these too, and shares the random numbers."""
    points = len(setting.step_sizes)
    etas = torch.tensor(setting.step_sizes, device=setting.device)
    stacked = {}
    for name, parameter in setting.model.named_parameters():
        gradient = setting.gradient.get(name, torch.zeros_like(parameter))
        stacked[name] = torch.addcmul(parameter, etas.view(-1, *[1] * gradient.dim()), gradient, value=-1)
    if buffers:
        stacked |= {n: b.expand(points, *b.shape).clone() for n, b in setting.model.named_buffers()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return setting.loss(partial(functional_call, setting.model, tensors))  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return vmap(loss, randomness="same" if buffers else "error")(stacked)


def loss_landscapes(setting: Setting) -> Tensor:
    try:
        from loss_landscapes import linear_interpolation
        from loss_landscapes.metrics import Loss
    except ImportError as error:
        raise NotRunError('not run: needs loss-landscapes (pip install ".[bench]")') from error
    end = copy.deepcopy(setting.model)
    with torch.no_grad():
        _move(end, setting, setting.step_sizes[-1])
    metric = Loss(setting.criterion, setting.inputs, setting.targets)
    with setting.autocast():
        losses = linear_interpolation(setting.model, end, metric, len(setting.step_sizes), deepcopy_model=True)
    return torch.from_numpy(losses)


def evaluation_loop(setting: Setting) -> Tensor:
    """As PyHessian's tutorial walks: a copy in evaluation mode is given each point's weights, and its loss is read."""
    copied = copy.deepcopy(setting.model).eval()
    losses = []
    for eta in setting.step_sizes:
        for (name, there), here in zip(copied.named_parameters(), setting.model.parameters(), strict=True):
            if name in setting.gradient:
                there.data = here.data - eta * setting.gradient[name]
        losses.append(setting.loss(copied).item())  # with gradients on, as there
    return torch.tensor(losses)


@dataclass(frozen=True)
class Way:
    """A way to measure a ray: ``run`` gives the K losses, if it has any."""

    name: str
    run: Callable[[Setting], Tensor | None]
    note: str = ""
    replaces: str = ""
    """A way in whose place this one is tried if that fails."""


WAYS = [
    Way(BARE, bare),
    *(Way(f"landscape, {name}", partial(ray, engine=name)) for name in ENGINES if name not in OPT_IN),
    Way("in-place loop", in_place),
    Way("deepcopy per point", deepcopy),
    Way("vmap", plain_vmap),
    Way("vmap, buffers stacked", partial(plain_vmap, buffers=True), replaces="vmap"),
    Way("loss-landscapes", loss_landscapes),
    Way("loop of PyHessian's tutorial", evaluation_loop, note="measures evaluation mode, which is another function"),
]
