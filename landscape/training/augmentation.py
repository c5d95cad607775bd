"""Augmentation of batches of images on their own device, by kornia."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from landscape.errors import MissingExtraError
from landscape.training.recipe import AUGMENTATIONS

Augment = Callable[[Tensor], Tensor]


def augmentation(names: Sequence[str], size: int) -> Augment:
    """Return a function that applies the augmentations in order.

    Each image gets its own random values, from torch's global RNG.

    Args:
        names: Names from `AUGMENTATIONS`. ``crop`` pads with zeros by an eighth of the side and crops at random (4
            pixels on CIFAR, He et al. 2016). ``flip`` mirrors half of the images. ``cutout`` sets a square of half the
            side to zero, the mean of the training set (DeVries & Taylor 2017; here the square lies within the image).
        size: Side of the images (N, C, size, size), in pixels.

    Raises:
        LandscapeError: kornia is not installed.
    """
    if not names:
        return lambda images: images
    all_steps = _steps(size)
    steps = [all_steps[name] for name in names]

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def _steps(size: int) -> dict[str, Any]:
    try:
        from kornia.augmentation import RandomCrop, RandomErasing, RandomHorizontalFlip
    except ImportError as error:
        raise MissingExtraError(f"Augmentation ({', '.join(AUGMENTATIONS)})", "augment") from error
    return {
        "crop": RandomCrop((size, size), padding=size // 8, cropping_mode="slice"),
        "flip": RandomHorizontalFlip(),
        "cutout": RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0.0),
    }
