"""Data sets by name: hash-checked files in, normalized images out.

``digits`` (``digits.npz`` beside this file) is the test set of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, licence CC BY 4.0: 1,797 images of 8 x 8 pixels
from 0 to 16, in the order of ``sklearn.datasets.load_digits``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pooch
import torch
from torch import Tensor

from landscape.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from landscape.data.download import ImagesAndLabels
from landscape.data.mnist import read_mnist
from landscape.errors import LandscapeError


@dataclass(frozen=True, eq=False)
class Samples:
    """Images (N, C, H, W), standardized float32, and their classes (N,), int64, on one device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, which: Tensor | slice) -> "Samples":
        return Samples(self.inputs[which], self.targets[which])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, whole on one device.

    Attributes:
        name: The name that it was loaded by.
        classes: Number of classes; targets are 0 to ``classes - 1``.
        mean: Mean of each channel's pixels over the training set, in raw pixel values.
        std: Their (biased) standard deviations; inputs are ``(pixels - mean) / std``.
        train: What is trained on.
        validation: What was held out of the training set by :meth:`split`; empty before.
        test: The test set; empty where it is not to be had.
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Samples
    validation: Samples
    test: Samples

    def split(self, validation: int, train: int | None = None) -> "Dataset":
        """Hold out some of the training set, and train on some of the rest, with the share of each class kept.

        The same samples for everyone who asks for the same numbers: runs that are compared share their split.

        Args:
            validation: How many samples are held out.
            train: How many of the others stay; by default all.

        Raises:
            LandscapeError: The training set has not as many.
        """
        last = len(self.train) if train is None else validation + train
        if last > len(self.train) or validation >= last:
            raise LandscapeError(
                f"{train or 'all other'} samples to train on and {validation} held out of the {len(self.train)} of "
                f"{self.name!r}: there are not that many; take fewer."
            )
        order = stratified(self.train.targets)
        # In the order of the files, so that all of a data set is that data set.
        held_out, kept = order[:validation].sort().values, order[validation:last].sort().values
        return replace(self, train=self.train[kept], validation=self.train[held_out])


def stratified(targets: Tensor) -> Tensor:
    """A fixed random order (N,) of samples in which the share of each class is the same from beginning to end."""
    random = torch.rand(len(targets), generator=torch.Generator().manual_seed(0)).to(targets.device)
    place = torch.empty(len(targets), device=targets.device)
    for label in targets.unique():
        own = (targets == label).nonzero()[:, 0]
        own = own[random[own].argsort()]
        place[own] = (torch.arange(len(own), device=targets.device) + random[own]) / len(own)
    return place.argsort()


def load_dataset(name: str, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """Load a data set, each channel normalized by the mean and standard deviation of its training pixels.

    Args:
        name: ``"digits"`` (1,500 training and 297 test images, (N, 1, 8, 8), embedded), ``"mnist"`` (the first 50,000
            of the 60,000 training images and the 10,000 test images, (N, 1, 28, 28)), ``"cifar10"`` or ``"cifar100"``
            (50,000 and 10,000, (N, 3, 32, 32)).
        data_dir: Folder with the data set's files as they are published, packed or unpacked, in it or in a subfolder.
            Files that are missing are fetched into its subfolder ``name``. Default: the user's cache folder.
        device: Where the tensors are put.

    Raises:
        LandscapeError: If there is no such data set, or a file is damaged, or missing and not to be had.
    """
    if not isinstance(name, str) or name not in LOADERS:
        raise LandscapeError(f"there is no data set {name!r}; choose one of: {', '.join(LOADERS)}")
    classes, load = LOADERS[name]
    folder = Path(pooch.os_cache("landscape") if data_dir is None else data_dir).expanduser()
    try:
        train, test = load(folder)
    except OSError as error:
        raise LandscapeError(f"cannot get the files of {name!r} in {folder}: {error}") from error
    return _normalized(name, classes, train, test, device)


def _normalized(
    name: str, classes: int, train: ImagesAndLabels, test: ImagesAndLabels, device: str | torch.device
) -> Dataset:
    # On the CPU whatever the device is, so that a seed starts from the same bits everywhere.
    images, targets = zip(
        *[(torch.from_numpy(part[0].astype(np.float32)), part[1]) for part in (train, test)], strict=True
    )
    std, mean = torch.std_mean(images[0], (0, 2, 3), correction=0, keepdim=True)
    parts = [
        Samples(inputs.sub_(mean).div_(std).to(device), torch.from_numpy(labels.astype(np.int64)).to(device))
        for inputs, labels in zip(images, targets, strict=True)
    ]
    return Dataset(
        name, classes, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), parts[0], parts[0][:0], parts[1]
    )


def _load_digits(_folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = file["images"].reshape(-1, 1, 8, 8), file["targets"]
    # The images are grouped by writer, so most of the last 297 are by hands that were not trained on.
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def _load_mnist(folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    images, labels = read_mnist("train", folder)
    return (images[:50_000], labels[:50_000]), read_mnist("t10k", folder)


def _cifar(cifar: Cifar) -> tuple[int, Callable[[Path], tuple[ImagesAndLabels, ImagesAndLabels]]]:
    return cifar.labels[-1], lambda folder: read_cifar(cifar, folder)


LOADERS: dict[str, tuple[int, Callable[[Path], tuple[ImagesAndLabels, ImagesAndLabels]]]] = {
    "digits": (10, _load_digits),
    "mnist": (10, _load_mnist),
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
}
"""Number of classes, and what reads training and test set from a folder."""
