"""What goes wrong on accelerators alone, as far as a CPU can show it; ``tests/device`` has the rest."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import LandscapeError, LandscapeProbe, ray_losses
from landscape.probe.checks import CaptureChecks
from landscape.ray.peak_memory import MemoryLimitError, PeakMemory, memory_limit

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
CRITERION = nn.CrossEntropyLoss()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, criterion=None, updates=3, make=lambda p: torch.optim.SGD(p, lr=0.1), **options):
    optimizer = make(model.parameters())
    with LandscapeProbe(model, optimizer, criterion, **{"step_sizes": [0.05, 0.1]} | options) as probe:
        for _ in range(updates):
            optimizer.zero_grad()
            CRITERION(model(X), Y).backward()
            optimizer.step()
    return probe


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}


def train_with_scaler(make, overflows=(), probed=True, unscales=False, **options):
    """Train with gradients that overflow in some updates; return the probe and the parameters after each update."""
    model, states = mlp(), []
    optimizer, scaler = make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    probe = LandscapeProbe(model, optimizer, step_sizes=[0.05, 0.1], **options)
    if probed:
        probe.attach()
    else:
        probe.detach()
    for update in range(6):
        optimizer.zero_grad()
        loss = scaler.scale(CRITERION(model(X), Y))
        (loss * (float("inf") if update in overflows else 1.0)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    probe.detach()
    return probe, states


@pytest.mark.parametrize("options", [{}, {"direction": "update"}, {"gradients": True}], ids=str)
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizer_that_skips_an_overflow(name, unscales, options):
    probe, states = train_with_scaler(FUSED[name], (2, 3), unscales=unscales, **options)
    assert torch.equal(states[1], states[3])
    frame = probe.frame()
    assert list(frame["step"]) == [0, 1, 4, 5]
    assert frame[["loss", "grad_norm", "slope", "loss_min", "loss_max"]].notna().all(axis=None)
    assert probe.last()["step"] == 5
    bare = train_with_scaler(FUSED[name], (2, 3), probed=False, unscales=unscales)[1]
    assert all(map(torch.equal, states, bare))


def test_last_update_is_skipped():
    probe, _ = train_with_scaler(FUSED["Adam"], (0, 4, 5))
    assert probe.last()["step"] == 3
    assert list(probe.frame()["step"]) == [1, 2, 3]
    assert train_with_scaler(FUSED["SGD"], range(6))[0].last() == {}


class Replayed(torch.autograd.Function):
    """A captured graph: it reads its weights where they were at the capture, whatever it is given."""

    @staticmethod
    def forward(ctx, x, weight, captured):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.numpy() @ captured.detach().numpy().T)  # unseen, as what a graph launches

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.t() @ ctx.saved_tensors[0], None


class Captured(nn.Module):
    """A module around a captured graph; ``touches`` reads the present weights, to no effect."""

    def __init__(self, touches):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.touches = nn.Parameter(0.1 * torch.randn(3, 6)), touches
        self.captured = [self.weight]

    def forward(self, x):
        y = Replayed.apply(x, self.weight, self.captured[0])
        return y + 0.0 * self.weight.detach().sum() if self.touches else y


class Hidden(nn.Module):
    """A module whose forward pass is a closure over its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        weight, bias = self.layer.weight, self.layer.bias
        self.compute = lambda x: F.linear(x, weight, bias)

    def forward(self, x):
        return self.compute(x)


@pytest.mark.parametrize("make", [Hidden, lambda: Captured(False)], ids=["closure", "graph"])
def test_loop_refuses_a_loss_of_other_parameters(make):
    with pytest.raises(LandscapeError, match="weight"):
        train(make(), CRITERION, engine="loop")


def test_loop_that_ignores_parameters_is_warned_of():
    """It reads them, and has a gradient, so that nothing but a constant ray shows it."""
    with pytest.warns(UserWarning, match="Step 0: the loss is 1.1") as caught:
        frame = train(Captured(True), CRITERION, engine="loop").frame()
    assert len(caught) == 1
    assert len(frame) == 3
    assert (frame["loss_min"] == frame["loss_max"]).all()


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("make", [Hidden, lambda: Captured(False)], ids=["closure", "graph"])
def test_ray_losses_refuse_a_loss_of_other_parameters(make, engine):
    model = make()
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(LandscapeError, match="weight"):
        ray_losses(model, lambda model: CRITERION(model(X), Y), direction, [0.1, 0.2], engine=engine)


def test_loss_that_no_call_reads_but_that_moves():
    """Kernels that torch does not see may read parameters, too."""

    class Unseen(nn.Linear):
        def forward(self, x):
            return torch.from_numpy(x.numpy() @ self.weight.numpy().T)

    model = Unseen(6, 3, bias=False)
    direction = {"weight": torch.randn_like(model.weight)}
    losses = ray_losses(model, lambda model: CRITERION(model(X), Y), direction, [0.0, 1.0], engine="loop")
    assert losses[0] != losses[1]


def test_constant_losses_of_read_parameters_are_kept():
    model = nn.Linear(6, 3)
    direction = {"weight": torch.ones_like(model.weight)}
    losses = ray_losses(model, lambda model: 0 * model(X).sum() + 1, direction, [0.0, 1.0], engine="loop")
    assert losses.tolist() == [1, 1]


@pytest.mark.parametrize("engine", ["loop", "tape"])
def test_ray_of_nan_is_warned_of(engine):
    """A step size that leaves the domain of the loss, which training does not."""
    weight = nn.Parameter(torch.ones(1))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    options = {"step_sizes": [5.0, 6.0], "engine": engine}
    with LandscapeProbe(model, optimizer, **options) as probe:
        for _ in range(2):
            optimizer.zero_grad()
            probe.observe(lambda model: model[0].log().add(2.0).square().sum()).backward()
            optimizer.step()
        with pytest.warns(UserWarning, match="Step 0.*NaN") as caught:
            frame = probe.frame()
    assert len(caught) == 1
    assert frame["loss"].notna().all()
    assert frame["loss_min"].isna().all()


def test_memory_limit_stops_at_once():
    made = []

    def fill():
        for _ in range(5):
            made.append(torch.ones(100))

    with pytest.raises(MemoryLimitError), PeakMemory(1000):
        fill()
    assert len(made) == 2
    with memory_limit(None), memory_limit(10_000):
        torch.ones(1000)


class Counted(nn.Module):
    """A model that needs much memory for its derivative, and counts its passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.passes = nn.Linear(6, 3), []

    def forward(self, x):
        self.passes.append(torch.is_grad_enabled())
        y = self.layer(x)
        for _ in range(30):
            y = (y.repeat(1, 50) * 1.01).sin().view(16, 50, 3).mean(1)
        return y


def test_max_memory_bounds_the_first_checks():
    """A derivative holds all that a ray computes one after the other, which here is more than the limit."""
    needed = []
    for limit in (None, 40_000):
        model = Counted()
        warned = pytest.warns(UserWarning, match="max_memory=40000") if limit else nullcontext()
        with warned as caught:
            probe = train(model, CRITERION, engine="loop", max_memory=limit)
        assert len(probe.frame()) == 3
        needed.append(sum(model.passes))
        facts = probe.trace._metadata["checks"]
        assert (facts["gradient"] is None) == (limit is not None)
        assert facts["loss_at_zero"] is not None
        assert not limit or len(caught) == 1
    assert needed == [4, 4]  # Three of training, and one that is differentiated or was stopped.
    with pytest.raises(LandscapeError, match="max_memory=5000"):
        train(Counted(), CRITERION, engine="loop", max_memory=5000)


@pytest.mark.parametrize("limit", [None, 3_000_000])
def test_max_memory_bounds_the_comparison_of_engines(limit):
    """The loop would copy frozen parameters, which the tape need not."""
    model = Counted()
    model.frozen = nn.Parameter(torch.ones(1_000_000), requires_grad=False)
    frame = train(model, CRITERION, max_memory=limit).frame()
    assert set(frame["engine"]) == {"tape"}
    assert model.passes.count(True) == 3
    assert (model.passes.count(False) == 0) == (limit is not None)


def test_checks_without_memory_are_not_repeated():
    checks = CaptureChecks(max_memory=1)
    with pytest.warns(UserWarning, match="max_memory=1"):
        assert checks._bounded(lambda: torch.ones(100)) is None
    assert checks._first_checks_left == 1


@pytest.mark.parametrize("options", [{}, {"gradients": True}, {"direction": "update"}], ids=str)
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_default_device_does_not_matter(engine, options):
    """Tensors that are made without a device would be on "meta", and have no values."""
    frames = []
    for default in ("cpu", "meta"):
        layers = [nn.Linear(6, 400), nn.BatchNorm1d(400), nn.Dropout(), nn.Linear(400, 400), nn.Linear(400, 3)]
        model = nn.Sequential(*layers)
        torch.manual_seed(0)
        for module in model:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.set_default_device(default)
        try:
            frames.append(train(model, CRITERION, engine=engine, overhead=100.0, **options).frame())
        finally:
            torch.set_default_device(None)
    assert frames[0]["losses"].map(list).tolist() == frames[1]["losses"].map(list).tolist()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_of_products_is_recorded(precision, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        train(mlp(), trace=tmp_path / "run")
    finally:
        torch.set_float32_matmul_precision(before)
    found = json.loads((tmp_path / "run/run.json").read_text())["float32_precision"]
    assert (found["cuda.matmul"] == "tf32") == (precision == "high")


class Quantized(nn.Linear):
    """A layer whose weights are rounded in the forward pass alone, so that small steps change nothing."""

    def forward(self, x):
        rounded = (self.weight * 2).round() / 2
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias.detach())


@pytest.mark.parametrize("engine", ["loop", "tape"])
def test_straight_through_estimators_are_measured(engine):
    """Their rays are constant in truth, which is recorded; the warning names them."""
    model = Quantized(6, 3)
    nn.init.constant_(model.weight, 0.4)
    with pytest.warns(UserWarning, match="quantized") as caught:
        frame = train(model, CRITERION, engine=engine, updates=1).frame()
    assert len(caught) == 1
    assert frame["losses"].map(list).tolist() == [[loss] * 2 for loss in frame["loss"]]
