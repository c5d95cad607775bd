"""The models of the paper; each takes ``norm``, which makes a normalization layer for a number of channels."""

from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class SimpleNet(nn.Module):
    """Two hidden layers of 512 and 300 neurons, normalized before the activation.

    Dimitriou & Arandjelovic 2020, section 3.1 (the MNIST experiment).

    Args:
        features: Number of inputs F; a batch is (M, F) or anything that flattens to it.
        classes: Number of classes; the output is (M, classes) logits.
        norm: ``norm(channels)`` gives a normalization layer, as :func:`landscape.make_norm` makes them.
    """

    def __init__(self, features: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, 512),
            norm(512),
            nn.ReLU(),
            nn.Linear(512, 300),
            norm(300),
            nn.ReLU(),
            nn.Linear(300, classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (M, classes)."""
        return self.layers(inputs)


MODELS: dict[str, Callable[[int, int, Norm], nn.Module]] = {"simplenet": SimpleNet}
"""Models by name, each made of the number of inputs, the number of classes and a norm."""
