"""Augmentation of batches of images on their own device, which the host does not wait for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


def augmentation(names: Sequence[str]) -> Augment:
    """Return a function that augments a batch, by one gather.

    Each image gets its own random values, from torch's global RNG of the CPU, whatever the device of the images.

    Args:
        names: Names from `AUGMENTATIONS`, for square images (N, C, size, size), applied in the order of that tuple.
            ``crop`` pads with zeros by an eighth of the side and crops at random (4 pixels on CIFAR, He et al. 2016).
            ``flip`` mirrors half of the images. ``cutout`` sets a square of half the side to zero, the mean of the
            training set. Its center is any pixel, so that a part of it may lie outside of the image (DeVries & Taylor
            2017, arXiv:1708.04552).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> augment = augmentation(["cutout"])
        >>> augment(torch.ones(1, 1, 4, 4))[0, 0]
        tensor([[1., 1., 0., 0.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    return lambda images: _augmented(images, frozenset(names)) if names else images


def _augmented(images: Tensor, names: frozenset[str]) -> Tensor:
    count, channels, size = images.shape[:3]
    margin, place = size // 8, torch.arange(size, device=images.device)
    top, left, flipped, row, column = _random(names, count, size, margin).to(images.device, non_blocking=True)
    # Pixel (i, j) of an augmented image is pixel (rows[i], columns[j]) of the image, or 0 if that is outside of it.
    rows = place + (top - margin)[:, None]
    columns = torch.where(flipped[:, None] == 1, size - 1 - place, place) + (left - margin)[:, None]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    cut = _near(place, row, size)[:, :, None] & _near(place, column, size)[:, None, :]
    index = rows.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None, :]
    pixels = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)
    keep = inside & ~cut if "cutout" in names else inside
    return pixels.masked_fill_(~keep[:, None], 0)


def _random(names: frozenset[str], count: int, size: int, margin: int) -> Tensor:
    """Return random numbers on the host, (5, N).

    They are the corner of the crop, 1 for a flip, and the center of the cut.
    """
    host = {"device": "cpu", "dtype": torch.int64}
    numbers = torch.zeros(5, count, pin_memory=torch.cuda.is_available(), **host)
    numbers[:2] = torch.randint(2 * margin + 1, (2, count), **host) if "crop" in names else margin
    if "flip" in names:
        numbers[2] = torch.randint(2, (count,), **host)
    if "cutout" in names:
        numbers[3:] = torch.randint(size, (2, count), **host)
    return numbers


def _near(place: Tensor, center: Tensor, size: int) -> Tensor:
    """Return where a side of the square is, (N, size)."""
    half = size // 4
    return (place >= (center - half)[:, None]) & (place < (center + half)[:, None])
