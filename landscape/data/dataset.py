"""Image data sets by name: load verified files, normalize pixels, split off a validation set.

``digits`` (``digits.npz`` beside this file) is the test set of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, licence CC BY 4.0: 1,797 images of 8 x 8 pixels
from 0 to 16, in the order of ``sklearn.datasets.load_digits``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from landscape.data.download import ImagesAndLabels
from landscape.data.mnist import read_mnist
from landscape.errors import LandscapeError
from landscape.files import expand_user, is_url


@dataclass(frozen=True, eq=False)
class Samples:
    """Images with their classes, on one device.

    ``samples[index]`` selects samples by a slice, a boolean mask (N,) or an index tensor.

    Attributes:
        inputs: Normalized images, float32 (N, C, H, W). Your own may have any shape, or be int64.
        targets: Classes 0, 1, ..., int64 (N,). Your own may be numbers, float32 (N, ...).

    Examples:
        >>> samples = load_dataset("digits").test
        >>> len(samples), samples.inputs.shape, samples.targets.dtype
        (297, torch.Size([297, 1, 8, 8]), torch.int64)
        >>> len(samples[:10]), samples[samples.targets == 3].targets.unique()
        (10, tensor([3]))
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor | slice) -> "Samples":
        return Samples(self.inputs[index], self.targets[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, entirely on one device.

    Attributes:
        name: Name of the data set, as passed to :func:`load_dataset`.
        classes: Number of classes; targets are 0 to ``classes - 1``. Numbers per sample if these are the targets.
        mean: Mean of each channel over the training set, in raw pixel values.
        std: Biased standard deviation of each channel over the training set, in raw pixel values; inputs are
            ``(pixels - mean) / std``.
        train: Training samples.
        validation: Samples that :meth:`split` held out of the training set; empty before.
        test: Test samples; empty if their files are not available.

    Examples:
        >>> digits = load_dataset("digits")
        >>> digits.classes, len(digits.train), len(digits.validation), len(digits.test)
        (10, 1500, 0, 297)
        >>> pixels = digits.train.inputs[0] * digits.std[0] + digits.mean[0]
        >>> pixels[0, 0].round().tolist()
        [0.0, 0.0, 5.0, 13.0, 9.0, 1.0, 0.0, 0.0]
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Samples
    validation: Samples
    test: Samples

    def split(self, validation: int, train: int | None = None) -> "Dataset":
        """Split the training set into training and validation samples.

        The split is stratified by class, if targets are classes (both parts keep the share of each), and deterministic:
        equal numbers give equal samples, so runs that are compared share their split.

        Args:
            validation: Number of samples to hold out.
            train: Number of the remaining samples to keep; by default all of them.

        Raises:
            LandscapeError: The training set has too few samples, or none would remain to train on.

        Examples:
            >>> digits = load_dataset("digits").split(validation=300, train=500)
            >>> len(digits.train), len(digits.validation), len(digits.test)
            (500, 300, 297)
            >>> digits.validation.targets.bincount().tolist()
            [30, 30, 30, 31, 30, 30, 30, 30, 29, 30]
        """
        last = len(self.train) if train is None else validation + train
        if last > len(self.train) or validation >= last:
            raise LandscapeError(
                f"validation={validation}, train={train}: must fit into the {len(self.train)} training samples of "
                f"{self.name!r} and leave some to train on. Use smaller numbers."
            )
        is_class = not self.train.targets.is_floating_point() and self.train.targets.ndim == 1
        # Numbers are one class, whose order is random.
        order = stratified(self.train.targets if is_class else self.train.targets.new_zeros(len(self.train)))
        # Samples keep the order of the files, so that a split into all and nothing is the data set itself.
        held_out, kept = order[:validation].sort().values, order[validation:last].sort().values
        return replace(self, train=self.train[kept], validation=self.train[held_out])


def stratified(targets: Tensor) -> Tensor:
    """Return a fixed random order (N,) that interleaves the classes.

    Every contiguous part of the order contains each class in its share of the whole. The n samples of a class get the
    random positions ``(i + u_i) / n`` in [0, 1), one in each interval of length 1/n, and all positions are sorted.
    """
    random = torch.rand(len(targets), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(targets.device)
    position = torch.empty(len(targets), device=targets.device)
    for label in targets.unique():
        members = (targets == label).nonzero()[:, 0]
        members = members[random[members].argsort()]
        position[members] = (torch.arange(len(members), device=targets.device) + random[members]) / len(members)
    return position.argsort()


def load_dataset(name: str, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """Load a data set by name, with normalized pixels.

    Channel c of an image is ``(pixels - mean[c]) / std[c]``, by the mean and the biased standard deviation of the
    channel over all training pixels. Every file is verified by its SHA-256 hash before it is parsed.

    ================  ========  ======  ================  =================================================
    name              training  test    images            source
    ================  ========  ======  ================  =================================================
    ``digits``        1,500     297     (N, 1, 8, 8)      Alpaydin & Kaynak 1998; part of this package
    ``mnist``         50,000    10,000  (N, 1, 28, 28)    LeCun et al. 1998; the first 50,000 training images
    ``cifar10``       50,000    10,000  (N, 3, 32, 32)    Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar
    ``cifar10-half``  50,000    10,000  (N, 3, 16, 16)    CIFAR-10, means of 2 x 2 pixels: for a laptop
    ``cifar100``      50,000    10,000  (N, 3, 32, 32)    Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar
    ================  ========  ======  ================  =================================================

    Args:
        name: ``"digits"``, ``"mnist"``, ``"cifar10"``, ``"cifar10-half"`` or ``"cifar100"``.
        data_dir: Folder that contains the published files, packed or unpacked, directly or in a subfolder. Missing
            files are downloaded into its subfolder ``name``. Default: the user's cache folder.
        device: Device of the tensors.

    Raises:
        LandscapeError: The name is unknown, or a file is damaged, or missing and cannot be downloaded.

    Examples:
        >>> digits = load_dataset("digits")
        >>> digits.train.inputs.shape, digits.test.inputs.shape
        (torch.Size([1500, 1, 8, 8]), torch.Size([297, 1, 8, 8]))
        >>> digits.train.inputs.std(correction=0).round(decimals=4)
        tensor(1.)
        >>> load_dataset("minst")
        Traceback (most recent call last):
        landscape.errors.LandscapeError: name='minst': unknown data set. Use digits, mnist, cifar10, cifar10-half or
        cifar100.
    """
    if not isinstance(name, str) or name not in LOADERS:
        *others, last = LOADERS
        raise LandscapeError(f"name={name!r}: unknown data set. Use {', '.join(others)} or {last}.")
    classes, load = LOADERS[name]
    folder = data_dir
    try:
        folder = _data_folder(name, data_dir)
        train, test = load(folder)
    except OSError as error:
        raise LandscapeError(f"cannot read or download the files of {name!r} in {folder}: {error}.") from error
    return _normalized(name, classes, train, test, device)


def _data_folder(name: str, data_dir: str | Path | None) -> Path:
    """Return the folder of the files of a data set.

    Raises:
        LandscapeError: It is a URL, or there is no home folder for the cache.
        FileNotFoundError: There is no home folder for ``~``.
    """
    if name == "digits":  # The files are in this package: no folder is needed, such as that of a user without a home.
        return Path()
    if data_dir is not None:
        if is_url(data_dir):  # It is not printed, since it may hold a password.
            raise LandscapeError("data_dir: must be a folder on this machine, not a URL. Copy the files to a folder.")
        folder = expand_user(data_dir)
        if not folder.is_dir():  # It may be mistyped, so it is not created.
            raise LandscapeError(f"data_dir={str(data_dir)!r}: is no folder. Correct it, or create it for downloads.")
        return folder
    import pooch  # on first use, as it warns in notebooks without ipywidgets

    try:
        return Path(pooch.os_cache("landscape"))
    except RuntimeError as error:
        raise LandscapeError(
            f"data_dir=None: the home folder of this user, for the cache, is not known. Use a folder for {name!r}."
        ) from error


def _normalized(
    name: str, classes: int, train: ImagesAndLabels, test: ImagesAndLabels, device: str | torch.device
) -> Dataset:
    # Pixels are normalized on the CPU, so that training starts from the same bits on every device.
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
    # The images are grouped by writer, so most of the last 297 are by writers absent from the training set.
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def _load_mnist(folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    images, labels = read_mnist("train", folder)
    return (images[:50_000], labels[:50_000]), read_mnist("t10k", folder)


def _load_half(folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """Return CIFAR-10 in half the resolution."""
    train, test = ((_half(images), labels) for images, labels in read_cifar(CIFAR10, folder))
    return train, test


def _half(images: np.ndarray) -> np.ndarray:
    """Return the means of 2 x 2 pixels."""
    count, channels, height, width = images.shape
    return images.reshape(count, channels, height // 2, 2, width // 2, 2).mean((3, 5), dtype=np.float32)


def _cifar(cifar: Cifar) -> tuple[int, Callable[[Path], tuple[ImagesAndLabels, ImagesAndLabels]]]:
    return cifar.labels[-1], lambda folder: read_cifar(cifar, folder)


LOADERS: dict[str, tuple[int, Callable[[Path], tuple[ImagesAndLabels, ImagesAndLabels]]]] = {
    "digits": (10, _load_digits),
    "mnist": (10, _load_mnist),
    "cifar10": _cifar(CIFAR10),
    "cifar10-half": (CIFAR10.labels[-1], _load_half),
    "cifar100": _cifar(CIFAR100),
}
"""Number of classes of each data set, and the function that reads its training and test set from a folder."""
