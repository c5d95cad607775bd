"""Models in which a module, parameter or buffer has several names, which must stay one object."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lab import ENGINES, STEP_SIZES, batches, check_rows, check_same_training
from torch import nn

from landscape import LandscapeError, ray_losses


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU()
        self.layers = nn.Sequential(nn.Linear(6, 8), self.act, nn.Linear(8, 8), self.act, nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList([nn.Linear(6, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, 3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def repeated():
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
    return nn.Sequential(*[block] * 3, nn.Linear(6, 3))


class Alias(nn.Module):
    """A model with a second name for a part of a submodule."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.encoder = self.model[0]

    def forward(self, x):
        return self.model[2](self.model[1](self.encoder(x)))


class Wrapper(nn.Module):
    """A wrapper that holds the model twice, as that of Lightning Fabric."""

    def __init__(self):
        super().__init__()
        self.original = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.forward_module = self.original

    def forward(self, x):
        return self.forward_module(x)


class TiedParameter(nn.Module):
    """Two layers with one weight, which has a third name and is in a list, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.weight = self.a.weight
        self.kept = nn.ParameterList([self.a.weight, self.c.bias])

    def forward(self, x):
        return self.c(F.linear(torch.tanh(self.b(self.a(x))), self.kept[0] + self.weight))


class TwoNamesInOneModule(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.register_parameter("kernel", self.weight)

    def forward(self, x):
        return F.linear(x, self.kernel, self.bias) + F.linear(x, self.weight)


class TiedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.b.running_mean = self.a.running_mean
        self.register_buffer("mean", self.a.running_mean)

    def forward(self, x):
        return self.c(self.b(self.a(x)) + self.mean)


class Heads(nn.Module):
    """Deep supervision as in MONAI's DynUNet: heads in a list, and all layers again as a chain of skips."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.heads = nn.ModuleList([nn.Linear(8, 3)])
        self.skips = nn.ModuleDict({"down": self.down, "next": nn.ModuleDict({"up": self.up, "head": self.heads[0]})})

    def forward(self, x):
        hidden = self.skips["down"](x).relu()
        return self.head(self.skips["next"]["up"](hidden)) + self.skips["next"]["head"](hidden)


class Hidden(nn.Module):
    """A model with a layer in a Python list, too, where it has no name."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.list = [self.layer]
        self.list_of_parameters = [self.head.weight]

    def forward(self, x):
        return self.head(self.list[0](x).relu())


class Recurrent(nn.Module):
    """An LSTM, which keeps its weights in a list, under two names."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.cell, self.head = self.lstm, nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x[:, None])[0][:, -1])


class Normed(nn.Module):
    """Parametrized layers under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
        self.both = nn.ModuleList([self.a, self.b, self.a])

    def forward(self, x):
        for layer in (self.both[2], self.both[0], self.b):
            x = layer(x)
        return x


class Learned(nn.Module):
    """A criterion with a trained weight."""

    def __init__(self, weight=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3)) if weight is None else weight

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.weight, targets)


class WithCriterion(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.criterion = nn.Linear(6, 3), Learned()

    def forward(self, x):
        return self.net(x)


class WithModel(nn.Module):
    """A criterion that holds the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets) + sum(p.square().sum() for p in self.model.parameters())


def tied_to_criterion():
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3))
    return model, Learned(model[1].bias)


MODELS = {
    "activation": SharedActivation,
    "norm": SharedNorm,
    "repeated block": repeated,
    "alias": Alias,
    "wrapper": Wrapper,
    "tied parameter": TiedParameter,
    "two names in one module": TwoNamesInOneModule,
    "tied buffer": TiedBuffer,
    "heads": Heads,
    "hidden": Hidden,
    "recurrent": Recurrent,
    "parametrized": Normed,
}


def parts(name):
    """Return a model and its criterion."""
    if name == "criterion that is a part":
        model = WithCriterion()
        return model.double(), model.criterion
    if name == "criterion that holds the model":
        model = Alias().double()
        return model, WithModel(model)
    if name == "weight of the criterion":
        model, criterion = tied_to_criterion()
        return model.double(), criterion
    return MODELS[name]().double(), nn.CrossEntropyLoss()


NAMES = [*MODELS, "criterion that is a part", "criterion that holds the model", "weight of the criterion"]


def trial(lab, name, observed):
    model, criterion = parts(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with lab.attached(model, optimizer, None if observed else criterion):
        for x, y in batches():
            lab.copy_modules(model, criterion)
            optimizer.zero_grad()
            total = lambda m, x, y: criterion(m(x), y)  # noqa: E731
            loss = lab.observe(total, x, y) if observed else total(model, x, y)
            loss.backward()
            lab.record_update(loss, lambda m, c, x=x, y=y: c(m(x), y))
            optimizer.step()
    lab.record_state(model, criterion)


@pytest.mark.parametrize("observed", [False, True], ids=["criterion", "observed"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_probe_keeps_aliases(name, engine, observed):
    check_rows(functools.partial(trial, name=name, observed=observed), engine=engine)


@pytest.mark.parametrize("direction", ["gradient", "update"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_keep_aliases(name, direction):
    result = check_same_training(
        functools.partial(trial, name=name, observed=False), gradients=True, direction=direction
    )
    assert len(result.frame) == len(result.losses)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_ray_losses_keep_aliases(name, engine):
    def train_single(lab):
        model, criterion = parts(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lab.optimizer = optimizer
        for x, y in batches(2):
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if lab.probed:
                direction = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                closure = lambda m, x=x, y=y: criterion(m(x), y)  # noqa: E731
                assert ray_losses(model, closure, direction, STEP_SIZES, engine=engine).isfinite().all()
            optimizer.step()
        lab.record_state(model, criterion)

    check_same_training(train_single)


@pytest.mark.parametrize("where", ["closure", "list", "cache"])
def test_weights_outside_of_module(where):
    """All points of the ray would be equal to the training loss."""

    class Cached(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.doubled, self.bias)

    def train_elsewhere(lab):
        model, criterion = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Cached(8, 3)).double(), nn.CrossEntropyLoss()
        model[2].doubled = 2 * model[2].weight
        weight, kept = model[0].weight, [model[0].weight]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss_of(m, x, y):
            if where == "cache":
                return criterion(m(x), y)
            outside = weight if where == "closure" else kept[0]
            return criterion(F.linear(F.linear(x, outside).tanh(), m[2].weight), y)

        with lab.attached(model, optimizer):
            for x, y in batches(1):
                lab.observe(loss_of, x, y).backward(retain_graph=True)
                optimizer.step()

    with pytest.raises(LandscapeError, match=r"0\.weight|2\.weight"):
        check_same_training(train_elsewhere)
