"""Models that could mislead an engine or be changed by the probe: rows equal the loop's, the training is unchanged."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from landscape import LandscapeError, LandscapeProbe, ray_losses

STEP_SIZES = [0.2 * k for k in range(1, 6)]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(
    make, engine, updates=4, closure=None, before=lambda model, step: None, between=lambda model: None, **options
):
    """Return the losses of each update, and the final state; ``engine=None`` trains without a probe."""
    torch.manual_seed(0)
    model, criterion = make().double(), nn.CrossEntropyLoss()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    probe = LandscapeProbe(
        model, optimizer, None if closure else criterion, step_sizes=STEP_SIZES, engine=engine or "loop", **options
    )
    if engine:
        probe.attach()
    else:
        probe.detach()
    for step in range(updates):
        before(model, step)
        x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
        optimizer.zero_grad()
        (probe.observe(closure, x, y) if closure else criterion(model(x), y)).backward()
        between(model)
        optimizer.step()
    probe.detach()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} | {"rng_state": torch.get_rng_state()}
    return probe.frame().set_index("step")["losses"].map(list).to_dict() if engine else {}, state


class Momentum(nn.Module):
    """A momentum encoder that its forward pass writes to, in place or through ``.data``."""

    def __init__(self, how, frozen):
        super().__init__()
        self.how, self.query, self.key = how, nn.Linear(6, 3), nn.Linear(6, 3)
        for mine, other in zip(self.query.parameters(), self.key.parameters(), strict=True):
            other.data.copy_(mine.data)
            other.requires_grad_(not frozen)

    def forward(self, x):
        with torch.no_grad():
            for mine, other in zip(self.query.parameters(), self.key.parameters(), strict=True):
                if self.how == "rebound":
                    other.data = other.data * 0.9 + mine.data * 0.1
                elif self.how == "through data":
                    other.data.mul_(0.9).add_(mine.data, alpha=0.1)
                else:
                    other.lerp_(mine, 0.1)
            target = self.key(x)
        return self.query(x) + target


@pytest.mark.filterwarnings("ignore:Step . is not in the trace. The forward pass writes")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", ["rebound", "through data", "in place"])
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_parameters_written_by_forward(engine, how, frozen):
    make = functools.partial(Momentum, how, frozen)
    losses, state = train(make, engine)
    _, expected = train(make, None)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert len(losses) == (3 if engine == "loop" else 4)  # At the first update the write is detected.


def rebind_forward(model, step):
    layer = model[0]
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


def hook_late(model, step):
    if step == 2:
        model[0].register_forward_hook(lambda module, args, outputs: 2 * outputs, prepend=True)


def freeze(model, step):
    model[0].requires_grad_(step < 2)


def normalize(model, step):
    if step == 0:
        nn.utils.parametrizations.weight_norm(model[2])


def old_weight_norm(model, step):
    if step == 0:
        model[2] = nn.utils.spectral_norm(model[2])


def adapt(model, step):
    if step == 2:
        model[0].register_parameter("lora", nn.Parameter(torch.zeros(1, dtype=torch.float64)))


CHANGES = {
    "forward of an instance": {"before": rebind_forward},
    "hook": {"before": hook_late},
    "frozen later": {"before": freeze},
    "old spectral norm": {"before": old_weight_norm},
    "one more parameter": {"before": adapt},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["auto"])
@pytest.mark.parametrize("name", CHANGES)
def test_layers_changed_during_training(name, engine):
    losses, _ = train(mlp, engine, closure=lambda m, x, y: F.cross_entropy(m(x), y), **CHANGES[name])
    expected, _ = train(mlp, "loop", closure=lambda m, x, y: F.cross_entropy(m(x), y), **CHANGES[name])
    assert losses.keys() == expected.keys() == set(range(4))
    for step in expected:
        assert losses[step] == pytest.approx(expected[step], rel=1e-10), step


def test_parameters_written_before_step():
    """A write through ``.data`` does not change versions, but the loss at step size 0."""

    def shrink(model):
        model[0].weight.data.mul_(0.9)

    with pytest.raises(LandscapeError, match="step size 0"):
        train(mlp, "loop", between=shrink)


def test_mean_teacher():
    """The same layer on the same input with other weights."""
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor, dtype=torch.float64) for name, tensor in mlp().named_parameters()}

    def closure(model, x, y):
        return F.cross_entropy(model(x), y) + F.mse_loss(functional_call(model, other, (x,)), model(x))

    losses, expected = (train(mlp, engine, closure=closure)[0] for engine in ("auto", "loop"))
    for step in expected:
        assert losses[step] == pytest.approx(expected[step], rel=1e-10)


class Renormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        self.a.weight.data = torch.renorm(self.a.weight.data, 2, 0, 0.5)
        return self.b(self.a(x).relu())


class Remembering(nn.Module):
    """A model whose layer reads a tensor that is written to through ``.data``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.memory = torch.zeros(12, 8, dtype=torch.float64)

    def forward(self, x):
        self.memory.data.copy_(self.a(x).detach())
        return self.b(self.memory)


class Conjugate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        torch.manual_seed(3)
        self.z = torch.randn(12, 6, dtype=torch.complex128)

    def forward(self, x):
        return self.a(self.z.imag) + 2 * self.a(self.z.conj().imag)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 2, 3, padding=1)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layers(x).flatten(1))


class ReseedingWithin(nn.Module):
    """A model that changes the RNG state between two draws."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = F.dropout(self.a(x), 0.5)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            mix = torch.randn(6, 6, dtype=torch.float64)
        state = torch.get_rng_state()
        torch.rand(3)
        torch.set_rng_state(state)
        return self.b(F.dropout(hidden @ mix, 0.5))


class Transposed(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 3), drop

    def forward(self, x):
        return self.b(self.drop(self.a(x).t().contiguous().t()))


class Normalized(nn.Module):
    """Dropout of a tensor that is contiguous, but need not be so where points are stacked."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.dropout(self.norm(self.a(x)), 0.5, True))


class Reseeding(nn.Module):
    """A model that seeds the RNG far from the origin."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.a(x)
        if hidden.abs().mean() > 0.9:
            torch.manual_seed(3)
        return self.b(F.dropout(hidden, 0.5))


def in_place(x):
    F.dropout(x, 0.5, inplace=True)
    return x


MODELS = {
    "renormalized": Renormalized,
    "remembering": Remembering,
    "conjugate": Conjugate,
    "dropping": Dropping,
    "seeding within": ReseedingWithin,
    "normalized": Normalized,
    "reseeding": Reseeding,
    **{
        f"transposed {name}": functools.partial(Transposed, drop)
        for name, drop in {
            "F.dropout": lambda x: F.dropout(x, 0.5),
            "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
            "native": lambda x: torch.native_dropout(x, 0.5, True)[0],
            "alpha": lambda x: F.alpha_dropout(x, 0.5, True),
            "in place": in_place,
            "bernoulli": lambda x: x * torch.empty_like(x).bernoulli_(),
        }.items()
    },
}


@pytest.mark.filterwarnings("ignore:The engine .* does not fit")
@pytest.mark.parametrize("engine", ["auto", "tape"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_on_misleading_models(name, engine):
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(12, 6, dtype=torch.float64)
    direction = {key: 0.3 * torch.randn_like(parameter) for key, parameter in model.named_parameters()}
    losses = {}
    for which in ("loop", engine):
        torch.manual_seed(1)
        losses[which] = ray_losses(model, lambda m: m(x).square().mean(), direction, STEP_SIZES, engine=which)
    torch.testing.assert_close(losses[engine], losses["loop"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", ["auto"])
@pytest.mark.parametrize("points", [1, 2, 5])
def test_loss_with_input_gradient(points, engine):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double(), torch.randn(12, 6).double()
    direction = {key: torch.randn_like(parameter) for key, parameter in model.named_parameters()}

    def penalty(model):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(z).sum() + z.sum(), z, create_graph=True)
        return slope.square().mean()

    def closure(model):
        return model(x).square().mean() + penalty(model)

    with pytest.warns(UserWarning, match="does not fit") if engine == "stacked" else nullcontext():
        losses = ray_losses(model, closure, direction, STEP_SIZES[:points], engine=engine)
    expected = ray_losses(model, closure, direction, STEP_SIZES[:points], engine="loop")
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


def test_gradients_under_autocast():
    """The cache of cast weights must not be shared by the points."""
    torch.manual_seed(0)
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    options = {"step_sizes": [1.0, 2.0, 4.0], "gradients": True}
    with torch.autocast("cpu", torch.bfloat16), LandscapeProbe(model, optimizer, criterion, **options) as probe:
        criterion(model(x), y).backward()
        optimizer.step()
    row = probe.frame().iloc[0]
    assert len(set(row["losses"])) == 3
    assert min(row["gradient_distances"]) > 0


def test_sparse_tensors():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.edges = nn.Linear(6, 3), torch.eye(12).double().to_sparse()

        def forward(self, x):
            return torch.sparse.mm(self.edges, self.layer(x))

    for engine in ("loop", "auto"):
        assert len(train(Graph, engine)[0]) == 4


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules():
    model, criterion = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.warns(UserWarning, match="optimizer holds parameters"):
        probe = LandscapeProbe(model, optimizer, criterion, step_sizes=STEP_SIZES)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    with probe:
        for step in range(3):
            model.zero_grad()
            criterion(model(x), y).backward()
            if step == 0:
                optimizer.add_param_group({"params": list(model.parameters())})
                with pytest.warns(UserWarning, match="Step 0 is not in the trace.*lazy"):
                    optimizer.step()
            else:
                optimizer.step()
    assert list(probe.frame()["step"]) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overhead": "10%"}, "overhead='10%'.*share"),
        ({"every": None}, "every=None.*whole number"),
        ({"every": "2"}, "every='2'.*whole number"),
        ({"max_memory": "1GB"}, "max_memory='1GB'.*bytes"),
        ({"max_memory": -1}, "max_memory=-1"),
        ({"steps_per_epoch": "a"}, "steps_per_epoch='a'"),
        ({"gradients": "no"}, "gradients='no'.*True or False"),
        ({"grad_scaler": 1}, "grad_scaler=1"),
        ({"engine": ["affine"]}, "engine=.*must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    model = nn.Linear(1, 1)
    with pytest.raises(LandscapeError, match=message):
        LandscapeProbe(model, torch.optim.SGD(model.parameters()), **{"step_sizes": [1.0]} | options)


def test_direction_none():
    model = nn.Linear(1, 1)
    with pytest.raises(LandscapeError, match="direction\\['weight'\\] must be a tensor, got NoneType"):
        ray_losses(model, lambda m: m(torch.ones(1)), {"weight": None, "bias": torch.ones(1)}, [1.0])


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_diverging_training(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 2))
    optimizer, criterion = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(128, 64), torch.arange(128) % 2
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1, 0.2], engine=engine) as probe:
        for step in range(12):
            if step == 8:
                with torch.no_grad():
                    model[0].weight.fill_(torch.nan)
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    losses = probe.frame()["loss_max"].to_numpy(float)
    assert len(losses) == 12
    assert [bool(loss != loss) for loss in losses] == [False] * 8 + [True] * 4
