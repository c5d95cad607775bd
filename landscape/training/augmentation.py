"""Augmentation of batches of images on their own device, which the host does not wait for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Augment = Callable[[Tensor], Tensor]


def augmentation(names: Sequence[str]) -> Augment:
    """Return a function that applies the augmentations in order.

    Each image gets its own random values, from torch's global RNG of its device.

    Args:
        names: Names from `AUGMENTATIONS`, for square images (N, C, size, size). ``crop`` pads with zeros by an eighth
            of the side and crops at random (4 pixels on CIFAR, He et al. 2016). ``flip`` mirrors half of the images.
            ``cutout`` sets a square of half the side to zero, the mean of the training set (DeVries & Taylor 2017; here
            the square lies within the image).
    """
    steps = [_STEPS[name] for name in names]

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def _crop(images: Tensor) -> Tensor:
    size = images.shape[-1]
    margin = size // 8
    windows = pad(images, [margin] * 4).unfold(2, size, 1).unfold(3, size, 1)
    top, left = _corners(images, 2 * margin)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _flip(images: Tensor) -> Tensor:
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def _cutout(images: Tensor) -> Tensor:
    size, side = images.shape[-1], images.shape[-1] // 2
    place, start = torch.arange(size, device=images.device), _corners(images, size - side)[..., None]
    rows, columns = (start <= place) & (place < start + side)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def _corners(images: Tensor, largest: int) -> Tensor:
    """Return random places from 0 to ``largest``, (2, N)."""
    return torch.randint(largest + 1, (2, len(images)), device=images.device)


_STEPS: dict[str, Augment] = {"crop": _crop, "flip": _flip, "cutout": _cutout}
