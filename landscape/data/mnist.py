"""MNIST by Y. LeCun, C. Cortes and C. J. C. Burges, read from its original idx files."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from landscape.data.download import ImagesAndLabels, Source, read_files
from landscape.errors import LandscapeError

CLASSES = 10
MAX_BYTES = 1 << 26
"""Maximum size in bytes of an unpacked file; the largest one has 47 million."""
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


def read_mnist(part: str, folder: Path, source: Source = MNIST) -> ImagesAndLabels:
    """Read the images and labels of one part of MNIST.

    Args:
        part: ``"train"`` or ``"t10k"``.
        folder: Folder of the files, packed or unpacked, or with the subfolders and names of torchvision or Kaggle;
            missing files are downloaded into its subfolder ``mnist``.
        source: Names, hashes and mirrors of the files.

    Returns:
        Images, uint8 (N, 1, H, W), and labels, uint8 (N,).

    Raises:
        LandscapeError: A file is damaged, or missing and cannot be downloaded, or images and labels differ in number.
    """
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    contents = [_read(name, folder, source) for name in names]
    images, labels = parse_idx(contents[0], 3, names[0]), parse_idx(contents[1], 1, names[1])
    if len(images) != len(labels):
        raise LandscapeError(
            f"{names[0]} holds {len(images)} images, but {names[1]} holds {len(labels)} labels. Replace both files."
        )
    if (labels >= CLASSES).any():
        raise LandscapeError(
            f"{names[1]} is damaged: largest label {labels.max()}, expected 0 to {CLASSES - 1}. Replace the file."
        )
    return images[:, None], labels


def _read(name: str, folder: Path, source: Source) -> bytes:
    """Return the content of a file, found or downloaded.

    Its content is verified, not its packing: files that were compressed again have other bytes.
    """
    places = "", "mnist", "MNIST/raw", "raw", name  # torchvision's ``root``, ``root/MNIST``; Kaggle's folders
    names = name, name.replace("-idx", ".idx"), f"{name}.gz", f"{name.replace('-idx', '.idx')}.gz"
    found = (path for place in places for each in names if (path := folder / place / each).is_file())
    path = next(found, None) if name in source.sha256 else None
    if path is None:
        return read_files([name], folder, source)[0]
    content, expected = _unpacked(path), source.sha256[name]
    if (actual := hashlib.sha256(content).hexdigest()) != expected:
        raise LandscapeError(
            f"{path} is damaged: its content has the SHA-256 {actual}, expected {expected} for {name}. "
            "Replace it by the original, or delete it to download it again."
        )
    return content


def _unpacked(path: Path) -> bytes:
    """Return the content of a file, without gzip."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LandscapeError(f"{path} is damaged: {error}. Replace it by the original, or delete it.") from error
    if len(content) > MAX_BYTES:
        raise LandscapeError(f"{path} is damaged: more than {MAX_BYTES} bytes. Replace the file.")
    return content


def parse_idx(content: bytes, dimensions: int, name: str) -> np.ndarray:
    """Return the uint8 array of an idx file.

    The format of MNIST (http://yann.lecun.com/exdb/mnist): the magic number 0x0000080D for D dimensions, D big-endian
    sizes of 4 bytes each, and the values in C order.

    Args:
        content: The whole file.
        dimensions: Expected number of dimensions D.
        name: Name of the file in error messages.

    Returns:
        A read-only uint8 view of ``content`` with D dimensions.

    Raises:
        LandscapeError: The magic number differs, or the sizes do not match the length of the file.

    Examples:
        >>> content = bytes([0, 0, 8, 1]) + bytes([0, 0, 0, 3]) + bytes([5, 0, 4])
        >>> parse_idx(content, 1, "train-labels-idx1-ubyte").tolist()
        [5, 0, 4]
    """
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise LandscapeError(
            f"{name} is not an idx file: it starts with {content[:4].hex()}, expected {magic.hex()}. Replace the file."
        )
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    size = start + math.prod(shape)
    if len(content) != size:
        raise LandscapeError(
            f"{name} is damaged: {len(content)} bytes, expected {size} for the sizes {shape}. Replace the file."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
