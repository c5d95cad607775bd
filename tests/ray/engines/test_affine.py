"""The affine engine: layers of the training forward pass, and random numbers, are evaluated once."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from landscape import LandscapeError, LandscapeProbe, ray_losses
from landscape.ray.engines.products import LONG_SUM

STEP_SIZES = [0.1 * k for k in range(1, 9)]


class Calls(TorchFunctionMode):
    """Count products of whole batches with a weight of some shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.linear and tuple(args[1].shape) == self.shape and len(args[0]) > 1
        return func(*args, **(kwargs or {}))


class Draws(TorchDispatchMode):
    """Count the masks of dropout."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.bernoulli_.float
        return func(*args, **(kwargs or {}))


class Twice(nn.Module):
    """A first layer that is called on two inputs, and followed by an activation in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu_() + self.first(inputs[:1]))


class Feeding(nn.Module):
    """A layer whose input is memory that is overwritten at every point."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.memory = torch.zeros(12, 8, dtype=torch.float64)

    def forward(self, inputs):
        with torch.no_grad():
            self.memory.copy_(self.first(inputs).relu())
        return self.second(self.memory) + self.second(self.first(inputs))


MODELS = {
    "feeding": Feeding,
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "in place": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "twice": Twice,
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 3), nn.Dropout(0.4)),
}


def rows(make, engine, updates=4, accumulate=1, change=lambda model: None, mode=None, observe=False):
    torch.manual_seed(0)
    model, criterion = make().double(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = None if observe else criterion
    with LandscapeProbe(model, optimizer, own, step_sizes=STEP_SIZES, engine=engine) as probe:
        for update in range(updates):
            optimizer.zero_grad()
            for _ in range(accumulate):
                x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
                closure = lambda model, x, y: criterion(model(x), y)  # noqa: E731
                loss = probe.observe(closure, x, y) if observe else criterion(model(x), y)
                (loss / accumulate).backward()
            if update == updates - 1 and mode is not None:
                with mode:
                    optimizer.step()
            else:
                change(model)
                optimizer.step()
    return np.array(probe.frame().losses.map(list).tolist())


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["affine", "stacked"])
@pytest.mark.filterwarnings("ignore:The engine 'stacked' does not fit")
def test_layers_of_the_training_pass_match_loop(engine, name, accumulate, observe):
    options = {"accumulate": accumulate, "observe": observe}
    expected = rows(MODELS[name], "loop", **options)
    np.testing.assert_allclose(rows(MODELS[name], engine, **options), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "products"), [("plain", 1), ("no bias", 1), ("in place", 1)])
def test_first_layer_takes_one_product_more(name, products):
    calls = Calls((8, 6))
    rows(MODELS[name], "affine", mode=calls)
    assert calls.count == products


@pytest.mark.filterwarnings("ignore:At step size 0|The optimizer's gradient")
def test_weights_written_since_forward_raise():
    def change(model):
        with torch.no_grad():
            model[0].weight.mul_(1.5)

    with pytest.raises(LandscapeError, match="written to between"):
        rows(MODELS["plain"], "affine", change=change, observe=True)


def test_dropout_masks_are_drawn_twice():
    model, x = MODELS["dropout"](), torch.randn(12, 6)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with Draws() as draws:
        ray_losses(model, lambda model: model(x).square().mean(), direction, STEP_SIZES, engine="affine")
    assert draws.count == 2 * 2


class Wild(nn.Module):
    """Draws in every way there is, and other numbers at the third point than at the first."""

    def __init__(self, far):
        super().__init__()
        self.layer, self.far = nn.Linear(6, 6), far
        self.own = torch.Generator().manual_seed(5)

    def forward(self, inputs):
        hidden = F.dropout(self.layer(inputs), 0.5)
        if hidden.abs().mean() > self.far:
            hidden = hidden + torch.rand(hidden.shape, dtype=hidden.dtype)
        hidden = hidden * torch.empty_like(hidden).normal_()
        chosen = hidden[torch.multinomial(torch.ones(12), 5)]
        hidden = chosen + torch.empty_like(chosen).uniform_(0, 2) + torch.randn(chosen.shape, dtype=chosen.dtype)
        self.own.manual_seed(5)
        return F.dropout(hidden, 0.3) + torch.empty_like(hidden).bernoulli_(0.5, generator=self.own)


@pytest.mark.parametrize("far", [0.5, 1e9])
def test_random_numbers_match_loop(far):
    torch.manual_seed(0)
    model, x = Wild(far).double(), torch.randn(12, 6, dtype=torch.float64)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    losses = {}
    for engine in ("loop", "affine"):
        torch.manual_seed(1)
        losses[engine] = ray_losses(model, lambda m: m(x).square().mean(), direction, STEP_SIZES, engine=engine)
    torch.testing.assert_close(losses["affine"], losses["loop"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["loop", "affine", "stacked"])
@pytest.mark.parametrize("draw", [random.random, np.random.rand, np.random.randn])
def test_host_rng(engine, draw):
    """Points draw the same numbers, and the RNG state is restored."""
    model, x = nn.Linear(6, 3), torch.ones(12, 6)
    direction = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    draw()
    before = random.getstate(), np.random.get_state()[1:]  # noqa: NPY002
    losses = ray_losses(model, lambda model: model(x).mean() + draw(), direction, [1.0, 2.0, 3.0], engine=engine)
    after = random.getstate(), np.random.get_state()[1:]  # noqa: NPY002
    assert losses.unique().numel() == 1
    assert losses[0] == model(x).mean() + draw()
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("layer", "shape", "products"),
    [
        (nn.Linear(784, 32), (64, 784), 2),
        (nn.Linear(8, 32), (64, 8), 8),
        (nn.Linear(8, 512), (4, 8), 2),
        (nn.Conv2d(3, 16, 3), (4, 3, 16, 16), 8),
    ],
)
def test_products_are_shared_if_cheaper(monkeypatch, layer, shape, products):
    """They are for long sums, and for weights that are larger than the output."""
    monkeypatch.setattr("landscape.ray.engines.products.LONG_SUM", LONG_SUM)
    monkeypatch.setattr("landscape.ray.engines.products.LARGE", 1 << 30)
    calls, x = [], torch.randn(shape)
    direction = {name: torch.ones_like(parameter) for name, parameter in layer.named_parameters()}

    class Counted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func in (F.linear, F.conv2d))
            return func(*args, **(kwargs or {}))

    with Counted():
        ray_losses(layer, lambda layer: layer(x).square().mean(), direction, STEP_SIZES, engine="affine")
    assert sum(calls) == products
