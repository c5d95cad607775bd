"""Workloads of ``benchmarks.rays``: models with a batch of random data, step sizes and a goal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landscape import make_norm
from landscape.training.models import ResNet, SimpleNet

BARE = "bare forward passes"
PROBE = "landscape, whole probe"
PROBED, UNPROBED = "update with the probe", "update"


@dataclass(frozen=True)
class Workload:
    """A model, a batch, step sizes and a goal.

    Attributes:
        name: Name on the command line.
        description: Description in the report.
        model: Creates the model.
        batch: Creates the inputs and targets.
        points: Number K of step sizes.
        goal: Upper bound of the ratio of the row ``judged`` to the row ``base``.
        judged: Row that the goal applies to.
        base: Row that all ratios are relative to.
        stride: Step size of the first point; the others are its multiples, which every tool supports.
        autocast: Data type of autocast, if any.
        cuda: Run on CUDA only.
    """

    name: str
    description: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    points: int
    goal: float | None
    judged: str = PROBE
    base: str = BARE
    stride: float = 0.1
    autocast: torch.dtype | None = None
    cuda: bool = False

    @property
    def step_sizes(self) -> list[float]:
        return [self.stride * k for k in range(1, self.points + 1)]


class Transformer(nn.Module):
    """Causal language model, (M, T) to (M * T, vocabulary)."""

    def __init__(self, dropout: float, vocabulary: int = 1000, length: int = 128, width: int = 256) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 8, 1024, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.logits = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)
        self.register_buffer("order", torch.arange(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions(self.order)
        return self.logits(self.layers(hidden, mask=self.mask, is_causal=True)).flatten(0, 1)


def _mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3072, 2048), (2048, 2048)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


def _simplenet(norm: str, groups: int | None = None) -> Callable[[], nn.Module]:
    return lambda: SimpleNet(784, 10, _norm(norm, groups))


def _resnet56(norm: str, groups: int | None = None) -> Callable[[], nn.Module]:
    return lambda: ResNet(56, 3, 10, _norm(norm, groups))


def _norm(name: str, groups: int | None) -> Callable[[int], nn.Module]:
    return make_norm(name) if groups is None else make_norm(name, groups=groups)


def _images(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(shape), torch.randint(10, shape[:1]))


def _tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(1000, (32, 129))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


_MNIST, _CIFAR = _images(512, 784), _images(128, 3, 32, 32)
_SIMPLENET, _RESNET = "SimpleNet 784-512-300-10, batch 512", "ResNet-56, batch 128 of 3x32x32"
_TRANSFORMER = "Transformer of 6 layers of width 256, causal, batch 32 x 128 tokens"
_LIST = [
    Workload("simplenet-none", f"{_SIMPLENET}, no norm", _simplenet("none"), _MNIST, 8, 0.45),
    Workload("simplenet-batch", f"{_SIMPLENET}, BatchNorm", _simplenet("batch"), _MNIST, 8, 0.48),
    Workload("simplenet-ghost", f"{_SIMPLENET}, GhostNorm G=16", _simplenet("ghost", 16), _MNIST, 8, 0.50),
    Workload("mlp", "MLP 3072-2048-2048-10, BatchNorm, batch 32", _mlp, _images(32, 3072), 8, 0.4),
    Workload("resnet56-batch", f"{_RESNET}, BatchNorm", _resnet56("batch"), _CIFAR, 4, 0.67),
    Workload("resnet56-ghost", f"{_RESNET}, GhostNorm G=8", _resnet56("ghost", 8), _CIFAR, 4, 0.82),
    Workload("transformer", f"{_TRANSFORMER}, dropout 0.1", lambda: Transformer(0.1), _tokens, 8, 0.6),
    Workload("transformer-nodropout", f"{_TRANSFORMER}, dropout 0", lambda: Transformer(0.0), _tokens, 8, 1.0),
    Workload(
        *("cuda-simplenet", f"{_SIMPLENET}, BatchNorm", _simplenet("batch"), _MNIST, 8, 1.5, PROBED, UNPROBED),
        cuda=True,
    ),
    Workload(
        *("cuda-resnet56", "ResNet-56, batch 512 of 3x32x32, BatchNorm, bfloat16 autocast", _resnet56("batch")),
        *(_images(512, 3, 32, 32), 4, 0.6),
        autocast=torch.bfloat16,
        cuda=True,
    ),
]
WORKLOADS = {workload.name: workload for workload in _LIST}
