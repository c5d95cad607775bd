"""The paper's models; each takes ``norm``, which makes a normalization layer for a number of channels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.errors import LandscapeError
from landscape.norms.weight_standardization import standardize_weights

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
        standardize_weights(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (M, classes)."""
        return self.layers(inputs)


class ResNet(nn.Module):
    """The residual network for small images: three stages of n blocks with 16, 32 and 64 channels, 6n + 2 layers.

    He et al. 2016 (arXiv:1512.03385), section 4.2, with parameter-free shortcuts (option A). With 56 layers and
    BatchNorm it has 0.85 million parameters.

    Args:
        depth: Number of layers, 6n + 2: 20, 32, 44, 56, ...
        channels: Channels of the images; a batch is (M, channels, H, W).
        classes: Number of classes; the output is (M, classes) logits.
        norm: ``norm(channels)`` gives a normalization layer, as :func:`landscape.make_norm` makes them.

    Raises:
        LandscapeError: Another depth.
    """

    def __init__(self, depth: int, channels: int, classes: int, norm: Norm) -> None:
        super().__init__()
        blocks = _blocks(depth, 2)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.layers = nn.Sequential(
            *(_convolution(channels, 16), norm(16), nn.ReLU()),
            *(_Residual(before, after, norm) for before, after in zip([16, *widths], widths, strict=False)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )
        standardize_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (M, classes)."""
        return self.layers(images)


class _Residual(nn.Module):
    """Two convolutions and a shortcut around them; more channels come with half the resolution."""

    def __init__(self, before: int, after: int, norm: Norm) -> None:
        super().__init__()
        self.stride = after // before
        self.added = after - before
        self.layers = nn.Sequential(
            _convolution(before, after, self.stride), norm(after), nn.ReLU(), _convolution(after, after), norm(after)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.layers(images) + self._shortcut(images))

    def _shortcut(self, images: Tensor) -> Tensor:
        """The images themselves; where shapes change, every second pixel, and zeros for more channels (option A)."""
        if not self.added:
            return images
        return F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    # A ResNet keeps torch's own initial weights: those of He et al. double the variance in each block without a norm,
    # and 27 blocks then start at a loss of 1e4, where the paper's baseline could not be trained at all.
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


class WideResNet(nn.Module):
    """The wide residual network for small images: three stages of n blocks with 16k, 32k and 64k channels.

    WRN-(6n + 4)-k of Zagoruyko & Komodakis 2016 (arXiv:1605.07146), section 2, with normalization and activation before
    each convolution and without dropout. WRN-28-10 with BatchNorm has 36.5 million parameters. Convolutions start at
    the weights of He et al. 2015 (arXiv:1502.01852), equation 14, as in the authors' code, and logits without a shift.

    Args:
        depth: Number of layers, 6n + 4: 10, 16, 22, 28, 40, ...
        width: The factor k.
        channels: Channels of the images; a batch is (M, channels, H, W).
        classes: Number of classes; the output is (M, classes) logits.
        norm: ``norm(channels)`` gives a normalization layer, as :func:`landscape.make_norm` makes them.

    Raises:
        LandscapeError: Another depth.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, norm: Norm) -> None:
        super().__init__()
        blocks = _blocks(depth, 4)
        last = 64 * width
        self.layers = nn.Sequential(
            _convolution(channels, 16),
            *_wide_stage(blocks, 16, 16 * width, 1, norm),
            *_wide_stage(blocks, 16 * width, 32 * width, 2, norm),
            *_wide_stage(blocks, 32 * width, last, 2, norm),
            *(norm(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        standardize_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (M, classes)."""
        return self.layers(images)


def _wide_stage(blocks: int, before: int, after: int, stride: int, norm: Norm) -> list[nn.Module]:
    """Blocks of which the first changes the number of channels and the resolution."""
    rest = [_PreActivated(after, after, 1, norm) for _ in range(blocks - 1)]
    return [_PreActivated(before, after, stride, norm), *rest]


class _PreActivated(nn.Module):
    """Two convolutions, each of normalized and activated images, and a shortcut around them."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.activation = nn.Sequential(norm(before), nn.ReLU())
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None
        self.layers = nn.Sequential(
            _convolution(before, after, stride), norm(after), nn.ReLU(), _convolution(after, after)
        )

    def forward(self, images: Tensor) -> Tensor:
        active = self.activation(images)
        return self.layers(active) + (images if self.shortcut is None else self.shortcut(active))


def _blocks(depth: int, outside: int) -> int:
    """Blocks of two layers in each of three stages, with some layers outside of them."""
    blocks, rest = divmod(depth - outside, 6)
    if blocks < 1 or rest:
        raise LandscapeError(
            f"depth={depth}: this network has 6n + {outside} layers, with n from 1 on. Give such a depth."
        )
    return blocks


MODELS: dict[str, Callable[[torch.Size, int, Norm], nn.Module]] = {
    "simplenet": lambda shape, classes, norm: SimpleNet(shape.numel(), classes, norm),
    "resnet20": lambda shape, classes, norm: ResNet(20, shape[0], classes, norm),
    "resnet56": lambda shape, classes, norm: ResNet(56, shape[0], classes, norm),
    "wrn-28-10": lambda shape, classes, norm: WideResNet(28, 10, shape[0], classes, norm),
}
"""Models by name, each made of the shape of one input, the number of classes and a norm."""
