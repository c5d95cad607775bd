import pytest
import torch
from torch import nn

from landscape import LandscapeError, make_norm
from landscape.training.models import MODELS, ResNet, SimpleNet, WideResNet


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_simple_net_layers():
    model = SimpleNet(784, 10, nn.BatchNorm1d)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.out_features for layer in model.layers if isinstance(layer, nn.Linear)] == [512, 300, 10]
    assert model(torch.zeros(4, 1, 28, 28)).shape == (4, 10)


@pytest.mark.parametrize(("depth", "expected"), [(20, 0.27), (56, 0.85)])
def test_resnet_parameters(depth, expected):
    with torch.device("meta"):
        model = ResNet(depth, 3, 10, nn.BatchNorm2d)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules()) == depth
    assert round(parameters(model) / 1e6, 2) == expected


@pytest.mark.parametrize(
    ("depth", "width", "expected"), [(28, 10, 36.5), (40, 4, 8.9), (16, 8, 11.0), (22, 8, 17.2), (40, 1, 0.6)]
)
def test_wide_resnet_parameters(depth, width, expected):
    with torch.device("meta"):
        model = WideResNet(depth, width, 3, 10, nn.BatchNorm2d)
    assert round(parameters(model) / 1e6, 1) == expected


def test_wide_resnet_shapes():
    with torch.device("meta"):
        model = MODELS["wrn-28-10"](torch.Size([3, 32, 32]), 10, nn.BatchNorm2d)
        assert parameters(model) == 36_479_194
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    shapes, x = [], torch.zeros(2, 3, 32, 32, device="meta")
    for layer in model.layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert [shapes.index(shape) for shape in ((160, 32, 32), (320, 16, 16), (640, 8, 8), (640, 1, 1))] == [1, 5, 9, 15]


def test_wide_resnet_block():
    """The block equals its definition, written out."""
    torch.manual_seed(0)
    model = WideResNet(10, 2, 3, 10, nn.BatchNorm2d).double()
    block, x = model.layers[1], torch.randn(4, 16, 8, 8, dtype=torch.float64)
    active = torch.relu(block.activation[0](x))
    first = nn.functional.conv2d(active, block.layers[0].weight, padding=1)
    second = nn.functional.conv2d(torch.relu(block.layers[1](first)), block.layers[3].weight, padding=1)
    torch.testing.assert_close(block(x), second + nn.functional.conv2d(active, block.shortcut.weight))
    same = model.layers[2].shortcut, WideResNet(10, 1, 3, 10, nn.BatchNorm2d).layers[1].shortcut
    assert same[0] is not None
    assert same[1] is None


def test_wide_resnet_initialization():
    torch.manual_seed(0)
    model = WideResNet(10, 4, 3, 10, nn.BatchNorm2d)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.weight[0, 0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert not model.layers[-1].bias.any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_models_on_all_shapes(name, shape):
    with torch.device("meta"):
        model = MODELS[name](torch.Size(shape), 7, make_norm("seq", groups=2, channel_groups=4))
        assert model(torch.zeros(6, *shape)).shape == (6, 7)


def test_residual_networks_train():
    torch.manual_seed(0)
    images, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    for model in (ResNet(20, 1, 4, nn.BatchNorm2d), WideResNet(10, 1, 1, 4, nn.BatchNorm2d)):
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(21, 3, 10, nn.BatchNorm2d), r"depth=21: must be 6n \+ 2"),
        (lambda: WideResNet(4, 1, 3, 10, nn.BatchNorm2d), r"depth=4: must be 6n \+ 4"),
        (lambda: WideResNet(26, 10, 3, 10, nn.BatchNorm2d), r"depth=26"),
    ],
)
def test_depth_is_checked(make, message):
    with pytest.raises(LandscapeError, match=message):
        make()
