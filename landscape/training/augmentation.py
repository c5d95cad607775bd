"""Batches of images augmented on the device that they are on, by kornia."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from landscape.errors import MissingExtraError
from landscape.training.recipe import AUGMENTATIONS

Augment = Callable[[Tensor], Tensor]


def augmentation(names: Sequence[str], size: int) -> Augment:
    """The augmentations one after the other, each drawn anew for every image from torch's global random stream.

    Args:
        names: Of `AUGMENTATIONS`: ``crop`` pads by an eighth of the side with zeros and crops at
            random (4 pixels on CIFAR, He et al. 2016); ``flip`` flips half of the images; ``cutout`` sets a
            square of half the side to zero, the mean of the training set (DeVries & Taylor 2017; here the square lies
            within the image).
        size: Side of the images (N, C, size, size).

    Raises:
        LandscapeError: kornia is not installed.
    """
    if not names:
        return lambda images: images
    steps = _steps(size)
    chosen = [steps[name] for name in names]

    def augment(images: Tensor) -> Tensor:
        for step in chosen:
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
