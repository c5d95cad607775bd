"""Data sets by name: hash-checked files in, normalized tensors out.

``digits`` (``digits.npz`` beside this file) is the test set of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, licence CC BY 4.0: 1,797 images of 8 x 8 pixels
from 0 to 16, in the order of ``sklearn.datasets.load_digits``.

``mnist`` is the MNIST database by Y. LeCun, C. Cortes and C. J. C. Burges, read from its original idx files.
"""

import gzip
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from torch import Tensor

from landscape.errors import UserError

CLASSES = 10
TIMEOUT = (3, 15)
"""Seconds to wait for a connection (to each address of a mirror), and for the next bytes."""

Labelled = tuple[np.ndarray, np.ndarray]
"""Images (N, ...) and their labels (N,), both uint8."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, whole on one device.

    Attributes:
        name: The name that it was loaded by.
        classes: Number of classes; targets are 0 to ``classes - 1``.
        mean: Mean of all pixels of the training set, in raw pixel values.
        std: Their (biased) standard deviation; inputs are ``(pixels - mean) / std``.
        train_inputs: float32 (N, F).
        train_targets: int64 (N,).
        test_inputs: float32 (N', F).
        test_targets: int64 (N',).
    """

    name: str
    classes: int
    mean: float
    std: float
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from, and what they must be."""

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]


MNIST = Source(
    "mnist",
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
)


def load_dataset(name: str, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """Load a data set, flattened and normalized by the mean and standard deviation of its training pixels.

    Args:
        name: ``"digits"`` (1,500 training and 297 test images, (N, 64), embedded) or ``"mnist"`` (the first 50,000 of
            the 60,000 training images and the 10,000 test images, (N, 784)).
        data_dir: Folder with the data set's files, raw or gzipped, in it or in its subfolder ``name``. Files that are
            missing are fetched into that subfolder. Default: the user's cache folder.
        device: Where the tensors are put.

    Raises:
        UserError: If there is no such data set, or a file is damaged, or missing and not to be had.
    """
    if name not in LOADERS:
        raise UserError(f"there is no data set {name!r}; choose one of: {', '.join(LOADERS)}")
    folder = Path(pooch.os_cache("landscape") if data_dir is None else data_dir).expanduser()
    try:
        train, test = LOADERS[name](folder)
    except OSError as error:
        raise UserError(f"cannot get the files of {name!r} in {folder}: {error}") from error
    return _normalized(name, train, test, device)


def _normalized(name: str, train: Labelled, test: Labelled, device: str | torch.device) -> Dataset:
    # On the CPU whatever the device is, so that a seed starts from the same bits everywhere.
    train_inputs, test_inputs = (torch.from_numpy(images.astype(np.float32)).flatten(1) for images, _ in (train, test))
    train_targets, test_targets = (torch.from_numpy(labels.astype(np.int64)) for _, labels in (train, test))
    std, mean = torch.std_mean(train_inputs, correction=0)
    tensors = train_inputs.sub_(mean).div_(std), train_targets, test_inputs.sub_(mean).div_(std), test_targets
    return Dataset(name, CLASSES, mean.item(), std.item(), *(tensor.to(device) for tensor in tensors))


def _load_digits(_folder: Path) -> tuple[Labelled, Labelled]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = file["images"], file["targets"]
    # The images are grouped by writer, so most of the last 297 are by hands that were not trained on.
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def _load_mnist(folder: Path) -> tuple[Labelled, Labelled]:
    images, labels = read_labelled("train", folder, MNIST)
    return (images[:50_000], labels[:50_000]), read_labelled("t10k", folder, MNIST)


LOADERS: dict[str, Callable[[Path], tuple[Labelled, Labelled]]] = {"digits": _load_digits, "mnist": _load_mnist}


def read_labelled(part: str, folder: Path, source: Source) -> Labelled:
    """Images (N, H, W) and labels (N,) of one part, ``"train"`` or ``"t10k"``; a UserError if they do not match."""
    image_file, label_file = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images = parse_idx(read_file(image_file, folder, source), 3, image_file)
    labels = parse_idx(read_file(label_file, folder, source), 1, label_file)
    if len(images) != len(labels):
        raise UserError(f"{image_file} holds {len(images)} images, but {label_file} {len(labels)} labels; replace them")
    if (labels >= CLASSES).any():
        raise UserError(f"{label_file} holds the label {labels.max()}, expected 0 to {CLASSES - 1}; replace it")
    return images, labels


def read_file(name: str, folder: Path, source: Source) -> bytes:
    """Content of one file, unpacked: found in the folder or fetched, and hash-checked before anything interprets it."""
    places = [place / (name + suffix) for place in (folder, folder / source.name) for suffix in ("", ".gz")]
    path = next(filter(Path.is_file, places), None) or _fetch(places[-1], source)
    content = path.read_bytes()
    expected, found = source.sha256[path.name], hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{path} is damaged: SHA-256 {expected} expected, {found} found; "
            "put the original in its place, or delete it to have it fetched again"
        )
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _fetch(path: Path, source: Source) -> Path:
    """Download to the path from the first mirror that has the right file; pooch leaves no half and no wrong file."""
    expected, failures = source.sha256[path.name], []
    download: Any = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)  # pooch 1.9's types refuse its own class
    path.parent.mkdir(parents=True, exist_ok=True)
    for mirror in source.mirrors:
        try:
            pooch.retrieve(mirror + path.name, f"sha256:{expected}", path.name, path.parent, downloader=download)
            return path
        except (OSError, ValueError) as error:
            failures.append(f"{mirror}: {error}")
    raise UserError(
        f"{path} is missing and cannot be fetched; put the file there (SHA-256 {expected}) "
        f"or give the folder that holds it as data_dir; tried {'; '.join(failures)}"
    )


def parse_idx(content: bytes, dimensions: int, name: str) -> np.ndarray:
    """Array of unsigned bytes in an idx file (the format of MNIST, http://yann.lecun.com/exdb/mnist).

    Args:
        content: The whole file: the magic number 0x0000080D for D dimensions, D sizes of four bytes, big-endian, and
            the values in C order.
        dimensions: D.
        name: What to call the file in an error.

    Returns:
        A read-only uint8 view of ``content`` with D dimensions.

    Raises:
        UserError: If the magic number is another, or the sizes do not fit the length of the file.
    """
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise UserError(f"{name} is no idx file: it starts with {content[:4].hex()}, not {magic.hex()}; replace it")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    size = start + math.prod(shape)
    if len(content) != size:
        raise UserError(f"{name} is damaged: {len(content)} bytes, {size} expected for sizes {shape}; replace it")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
