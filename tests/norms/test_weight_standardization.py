import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from rays import ENGINES, STEP_SIZES, moved_losses
from torch import nn
from torch.nn.utils import parametrize

from landscape import LandscapeError, LandscapeProbe, convert_norms, make_norm, ray_losses
from landscape.norms.weight_standardization import WeightStandardization, standardize_weights
from landscape.training.models import ResNet, SimpleNet, WideResNet

GHOST = make_norm("ghost-ws", groups=2)
SEQ = make_norm("seq-ws", groups=2, channel_groups=4)
MODELS = {
    "SimpleNet": lambda norm: SimpleNet(192, 3, norm),
    "ResNet-20": lambda norm: ResNet(20, 3, 3, norm),
    "WRN-10-1": lambda norm: WideResNet(10, 1, 3, 3, norm),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def standardized_layers(model):
    """Return the names of the layers with standardized weights."""
    return [name for name, layer in model.named_modules() if parametrize.is_parametrized(layer, "weight")]


def slow(weight, eps=1e-5):
    """Standardize one output channel after the other."""
    return torch.stack([(row - row.mean()) / (row.var(correction=0) + eps).sqrt() for row in weight])


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3), (4, 3, 3, 2), (2, 3, 1, 2, 2)])
def test_weight_standardization_formula(shape):
    weight = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    standardize = WeightStandardization()
    torch.testing.assert_close(standardize(weight), slow(weight))
    torch.testing.assert_close(standardize(weight / 1000), slow(weight / 1000))  # Here eps is not negligible.
    assert torch.autograd.gradcheck(standardize, weight)
    assert torch.autograd.gradgradcheck(standardize, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_standardization_half_precision(dtype):
    weight = (torch.rand(8, 100) + 10).to(dtype)
    torch.testing.assert_close(WeightStandardization()(weight), slow(weight.double()).to(dtype))


@pytest.mark.parametrize("norm", [GHOST, SEQ])
def test_standardize_weights_outputs(norm):
    model = standardize_weights(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())).double()
    x, (conv, normalize, _) = torch.randn(6, 3, 5, 5, dtype=torch.float64), model
    original = model.get_parameter("0.parametrizations.weight.original")
    expected = F.conv2d(x, slow(original), conv.bias)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(model(x), normalize(expected).relu())
    fast, twin = (torch.autograd.grad(y.pow(3).sum(), original) for y in (conv(x), expected))
    torch.testing.assert_close(fast, twin)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", [GHOST, SEQ])
def test_models_standardized_layers(model, norm):
    built = MODELS[model](norm)
    *hidden, _ = [name for name, layer in built.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert standardized_layers(built) == hidden
    assert not standardized_layers(MODELS[model](make_norm("ghost", groups=2)))


@pytest.mark.parametrize("model", MODELS)
def test_convert_norms_equals_built(model):
    torch.manual_seed(1)
    built = MODELS[model](GHOST)
    torch.manual_seed(1)
    converted = convert_norms(MODELS[model](make_norm("batch")), GHOST)
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(converted(x), built(x), rtol=0, atol=0)
    built.load_state_dict(converted.state_dict())


def test_convert_norms_optimizer():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    convert_norms(model, GHOST)
    assert {*map(id, model.parameters())} == {*map(id, parameters)}
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.shape == (8, 6))
    assert name == "0.parametrizations.weight.original"
    before = weight.detach().clone()
    F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_standardize_weights_selection():
    model = nn.Sequential(
        *(nn.Linear(6, 6), nn.ConvTranspose1d(1, 1, 1), nn.Linear(1, 6), nn.GroupNorm(2, 6), nn.Linear(6, 6)),
        *(nn.Sequential(nn.Linear(6, 6, bias=False), GHOST(6)), nn.Linear(6, 3), nn.BatchNorm1d(3)),
    )
    assert standardized_layers(standardize_weights(model)) == ["0", "4", "5.0"]


def test_standardize_weights_idempotent():
    model = nn.Sequential(nn.Linear(6, 6), GHOST(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    standardize_weights(model)
    convert_norms(model, GHOST)
    assert [len(model[i].parametrizations["weight"]) for i in (0, 2)] == [1, 1]


def test_standardize_weights_parametrized():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    expected = slow(linear.weight)
    standardize_weights(nn.Sequential(linear, GHOST(4)))
    torch.testing.assert_close(linear.weight, expected)


def test_standardized_model_deepcopy():
    model = SimpleNet(6, 3, GHOST)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(6, 6)
    assert not torch.equal(model(x), twin(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(x), twin(x))


def test_standardize_weights_lazy():
    with pytest.raises(LandscapeError, match=r"LazyLinear.*Run one batch"):
        standardize_weights(nn.Sequential(nn.LazyLinear(6), GHOST(6)))


def case_of(model):
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    return Case(MODELS[model](SEQ).double(), lambda model: F.cross_entropy(model(inputs), targets))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_standardized_model_ray_losses(model, engine):
    case = case_of(model)
    expected = moved_losses(case, case.direction(), STEP_SIZES)
    losses = ray_losses(case.model, case.closure, case.direction(), STEP_SIZES, engine=engine)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_standardized_model_probe(model, engine):
    case, criterion = case_of(model), nn.CrossEntropyLoss()
    model, unprobed, expected = case.model, copy.deepcopy(case.model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1, 0.4], engine=engine) as probe:
        for _ in updates(model, optimizer, criterion):
            pass
    for before, gradient in updates(unprobed, torch.optim.SGD(unprobed.parameters(), lr=0.1), criterion):
        expected.append(moved_losses(before, gradient, [0.1, 0.4]).detach())
    losses = torch.tensor(np.stack(probe.frame().losses), dtype=torch.float64)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for name, tensor in unprobed.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def updates(model, optimizer, criterion):
    """Run 3 updates of a training loop; yield a copy of the model before each, with its batch, and the gradient."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        inputs, targets = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 3
        before = Case(copy.deepcopy(model), lambda model, x=inputs, y=targets: criterion(model(x), y))
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        yield before, {name: parameter.grad for name, parameter in model.named_parameters()}
        optimizer.step()
