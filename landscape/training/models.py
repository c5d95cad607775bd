"""Models of arXiv:2007.08554, each with any normalization layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape.errors import LandscapeError
from landscape.norms.weight_standardization import standardize_weights

Norm = Callable[[int], nn.Module]
"""Function that returns a normalization layer for a number of channels."""


class SimpleNet(nn.Module):
    """Fully connected network with two hidden layers.

    They have 512 and 300 neurons, each normalized before its ReLU (arXiv:2007.08554, section 3.1, on MNIST).

    Args:
        features: Number of inputs F; a batch has the shape (M, F), or one that flattens to it.
        classes: Number of classes C; the output has the shape (M, C) and holds logits.
        norm: Function that returns a normalization layer for a number of channels, from `landscape.make_norm`.

    Examples:
        >>> from landscape import make_norm
        >>> SimpleNet(784, 10, make_norm("ghost", groups=2))(torch.zeros(8, 1, 28, 28)).shape
        torch.Size([8, 10])
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
        """Return the logits (M, C)."""
        return self.layers(inputs)


class ResNet(nn.Module):
    """Residual network for small images, with 6n + 2 layers.

    It has 3 stages of n blocks with 16, 32 and 64 channels, and parameter-free shortcuts (option A) (He et al. 2016,
    arXiv:1512.03385, section 4.2). With 56 layers and BatchNorm it has 0.85 million parameters.

    Args:
        depth: Number of layers, 6n + 2: 20, 32, 44, 56, ...
        channels: Channels of the images; a batch has the shape (M, channels, H, W).
        classes: Number of classes C; the output has the shape (M, C) and holds logits.
        norm: Function that returns a normalization layer for a number of channels, from `landscape.make_norm`.

    Raises:
        LandscapeError: ``depth`` is not 6n + 2 with n >= 1.

    Examples:
        >>> from landscape import make_norm
        >>> ResNet(20, 3, 10, make_norm("batch"))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
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
        """Return the logits (M, C)."""
        return self.layers(images)


class _Residual(nn.Module):
    """Two convolutions with a shortcut."""

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
        """Return the images in the shape of the output."""
        # Option A: every second pixel, and channels of zeros on both sides.
        if not self.added:
            return images
        return F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    # A ResNet keeps torch's default initial weights. Those of He et al. double the variance in each block without a
    # norm, so 27 blocks start at a loss of 1e4, at which the paper's baseline cannot be trained.
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


class WideResNet(nn.Module):
    """Wide residual network WRN-(6n + 4)-k for small images.

    It has 3 stages of n blocks with 16k, 32k and 64k channels, with norm and activation before each convolution and
    without dropout (Zagoruyko & Komodakis 2016, arXiv:1605.07146, section 2). Convolutions are initialized by He et al.
    2015 (arXiv:1502.01852), equation 14, and the last bias is 0, as in the authors' code. WRN-28-10 with BatchNorm has
    36.5 million parameters.

    Args:
        depth: Number of layers, 6n + 4: 10, 16, 22, 28, 40, ...
        width: Factor k of the channels.
        channels: Channels of the images; a batch has the shape (M, channels, H, W).
        classes: Number of classes C; the output has the shape (M, C) and holds logits.
        norm: Function that returns a normalization layer for a number of channels, from `landscape.make_norm`.

    Raises:
        LandscapeError: ``depth`` is not 6n + 4 with n >= 1.

    Examples:
        >>> from landscape import make_norm
        >>> WideResNet(10, 2, 3, 10, make_norm("group", channel_groups=4))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
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
        """Return the logits (M, C)."""
        return self.layers(images)


def _wide_stage(blocks: int, before: int, after: int, stride: int, norm: Norm) -> list[nn.Module]:
    """Return the blocks of a stage; the first changes shapes."""
    rest = [_PreActivated(after, after, 1, norm) for _ in range(blocks - 1)]
    return [_PreActivated(before, after, stride, norm), *rest]


class _PreActivated(nn.Module):
    """Two convolutions, each after norm and activation, with a shortcut."""

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
    """Return the 2-layer blocks in each of 3 stages."""
    blocks, rest = divmod(depth - outside, 6)
    if blocks < 1 or rest:
        raise LandscapeError(
            f"depth={depth}: must be 6n + {outside} with n >= 1. Use {outside + 6}, {outside + 12}, {outside + 18}, ..."
        )
    return blocks


MODELS: dict[str, Callable[[torch.Size, int, Norm], nn.Module]] = {
    "simplenet": lambda shape, classes, norm: SimpleNet(shape.numel(), classes, norm),
    "resnet20": lambda shape, classes, norm: ResNet(20, shape[0], classes, norm),
    "resnet56": lambda shape, classes, norm: ResNet(56, shape[0], classes, norm),
    "wrn-28-10": lambda shape, classes, norm: WideResNet(28, 10, shape[0], classes, norm),
}
"""Functions (shape of one input, classes, norm) -> model, by name."""
