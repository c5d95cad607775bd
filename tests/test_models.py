import torch
from torch import nn

from landscape.models import SimpleNet


def test_simple_net_is_the_papers():
    model = SimpleNet(784, 10, nn.BatchNorm1d)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.out_features for layer in model.layers if isinstance(layer, nn.Linear)] == [512, 300, 10]
    assert model(torch.zeros(4, 1, 28, 28)).shape == (4, 10)
