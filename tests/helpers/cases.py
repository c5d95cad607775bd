"""Small models of many kinds, each with a loss, on which every engine is tested."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from landscape import make_norm
from landscape.training.models import ResNet, SimpleNet

NORMS = {"none": {}, "batch": {}, "ghost": {"groups": 3}, "seq": {"groups": 2, "channel_groups": 4}, "layer": {}}
Closure = Callable[[nn.Module], Tensor]


class Tied(nn.Module):
    """Transformer with attention, LayerNorm and an embedding tied to the output layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


class Recurrent(nn.Module):
    """LSTM, which keeps its weights in a separate list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.lstm(inputs.unflatten(1, (1, -1)))[0][:, -1])


class Branching(nn.Module):
    """Model with data-dependent control flow, a layer used twice, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        if hidden.mean() > 0:
            hidden = hidden + self.first(inputs)
        return {"logits": self.second(self.first(hidden).relu())}


class Writes(nn.Module):
    """Model with a linear layer whose input is overwritten in place by an output of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 3)
        self.memory = torch.zeros(12, 6, dtype=torch.float64)

    def forward(self, inputs):
        self.memory.copy_(self.first(inputs).detach())
        return self.second(self.memory)


class Clamped(nn.Module):
    """Model that changes a weight in place before its use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(inputs)


class ComputedBias(nn.Module):
    """Linear layer with a bias computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, bias=False)
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return F.linear(inputs, self.layer.weight, self.shift.exp())


class LateUse(nn.Module):
    """Model that uses a weight outside its layer, but only far from step size 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs + torch.stack([self.layer.weight]).sum() if outputs.abs().mean() > 0.7 else outputs


class UnseenUse(nn.Module):
    """Model that uses a weight in code hidden from TorchFunctionModes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, inputs):
        with torch._C.DisableTorchFunction():
            size = self.first.weight.sum()
        return self.second(self.first(inputs)) * size


@dataclass(frozen=True)
class Case:
    """Model in float64 and training mode, with a closure that returns its loss on a fixed batch."""

    model: nn.Module
    closure: Closure

    def direction(self) -> dict[str, Tensor]:
        """Return a random direction that moves every parameter."""
        generator = torch.Generator().manual_seed(2)
        return {
            name: 0.1
            * torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu").to(parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def _classifier(build: Callable[[], nn.Module], *shape: int) -> Callable[[], Case]:
    def case() -> Case:
        torch.manual_seed(0)
        model = build().double()
        inputs, targets = torch.randn(shape, dtype=torch.float64), torch.arange(shape[0]) % 3

        def closure(model):
            outputs = model(inputs)
            return F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, targets)

        return Case(model, closure)

    return case


def _renormalized() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 1)).double()
    tokens = torch.randint(0, 5, (7, 3))
    return Case(model, lambda model: model(tokens).square().mean())


def _language(dropout: float) -> Callable[[], Case]:
    def case() -> Case:
        torch.manual_seed(0)
        tokens = torch.randint(0, 11, (4, 7))

        def closure(model):
            return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        return Case(Tied(dropout).double(), closure)

    return case


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlp": _classifier(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 12, 6),
    "in-place": _classifier(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), 12, 6),
    "batch norm": _classifier(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), 12, 6),
    "dropout": _classifier(
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)), 12, 6
    ),
    "convolution": _classifier(_convolutional, 12, 3, 5, 5),
    "transposed": _classifier(
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(21, 3)), 12, 2, 3
    ),
    "recurrent": _classifier(Recurrent, 12, 6),
    "branching": _classifier(Branching, 12, 6),
    "frozen": _classifier(_frozen, 12, 6),
    "computed bias": _classifier(ComputedBias, 12, 6),
    "late use": _classifier(LateUse, 12, 6),
    "unseen use": _classifier(UnseenUse, 12, 6),
    "writes": _classifier(Writes, 12, 6),
    "clamped": _classifier(Clamped, 12, 6),
    "weight norm": _classifier(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.Linear(3, 3)), 12, 6
    ),
    "spectral norm": _classifier(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 3)), nn.Linear(3, 3)), 12, 6
    ),
    "renormalized": _renormalized,
    "transformer": _language(0.1),
    "transformer without dropout": _language(0.0),
    **{
        f"SimpleNet {norm}": _classifier(
            lambda norm=norm, options=options: SimpleNet(6, 3, make_norm(norm, **options)), 12, 6
        )
        for norm, options in NORMS.items()
    },
    **{
        f"ResNet-20 {norm}": _classifier(lambda norm=norm: ResNet(20, 3, 3, make_norm(norm, **NORMS[norm])), 6, 3, 8, 8)
        for norm in ("batch", "ghost", "seq")
    },
}
DIVERGING = {"late use"}
"""Cases whose code takes another course at some points, so that the tape cannot follow."""
