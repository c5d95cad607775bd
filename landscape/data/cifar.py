"""CIFAR-10 and CIFAR-100 by A. Krizhevsky, V. Nair and G. Hinton, read from the official binary version."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from landscape.data.download import ImagesAndLabels, Source, find_file, read_files
from landscape.errors import LandscapeError

SHAPE = (3, 32, 32)
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)


@dataclass(frozen=True)
class Cifar:
    """Files and record layout of CIFAR-10 or CIFAR-100."""

    source: Source
    train: tuple[str, ...]
    tests: tuple[str, ...]
    """Alternative files with test images, in order of preference; all of them are optional."""
    labels: tuple[int, ...]
    """Number of classes of each label byte; the last is the target (CIFAR-100 has 20 superclasses before it)."""
    python: tuple[str, ...]
    """Folder and archive of the Python version, which torchvision downloads and which is not read."""


CIFAR10 = Cifar(
    Source(
        "cifar10",
        MIRRORS,
        {
            "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            # The first 1,000 records of the file above, for a machine that has no others.
            "test_batch_first1000.bin": "8314c96d7cd65618193bab23acdd5d4c4af15bf6dd00a1781d55beedf3be1ef5",
        },
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
    ),
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin", "test_batch_first1000.bin"),
    (10,),
    ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
)
CIFAR100 = Cifar(
    Source(
        "cifar100",
        MIRRORS,
        {
            "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
    ),
    ("train.bin",),
    ("test.bin",),
    (20, 100),
    ("cifar-100-python", "cifar-100-python.tar.gz"),
)


def read_cifar(cifar: Cifar, folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """Read training and test images with their labels.

    Unpacked files take precedence over the archive. Without an archive, missing test images leave the test set empty,
    since a loss landscape needs none. If training files are missing, the archive is read, or downloaded first.

    Returns:
        Images, uint8 (N, 3, 32, 32), and labels, uint8 (N,), for training, then for the test.

    Raises:
        LandscapeError: A file is damaged, or missing and cannot be downloaded; or the Python version is there instead.
    """
    unpacked = all(find_file(name, folder, cifar.source) for name in cifar.train)
    tests = [name for name in cifar.tests if find_file(name, folder, cifar.source)][:1] if unpacked else cifar.tests[:1]
    if unpacked and not tests and find_file(cifar.source.archive, folder, cifar.source):
        tests = cifar.tests[:1]
    names = [*cifar.train, *tests]
    try:
        contents = read_files(names, folder, cifar.source)
    except LandscapeError as error:
        if path := _python_version(cifar, folder):
            raise LandscapeError(
                f"{path} is the Python version of {cifar.source.name}: pickles, which are not read, since they can run "
                f"code. Put the binary version into {folder}: {MIRRORS[0]}{cifar.source.archive}."
            ) from error
        raise
    parts = [parse_cifar(content, cifar.labels, name) for name, content in zip(names, contents, strict=True)]
    split = len(cifar.train)
    return _concatenate(parts[:split]), _concatenate(parts[split:])


def _python_version(cifar: Cifar, folder: Path) -> Path | None:
    """Return the path of the Python version, or None."""
    if any(find_file(name, folder, cifar.source) for name in cifar.source.sha256):
        return None  # The error is about a file of the binary version.
    paths = [parent / name for parent in (folder, folder / cifar.source.name) for name in cifar.python]
    return next((path for path in [*paths, folder] if path.name in cifar.python and path.exists()), None)


def _concatenate(parts: list[ImagesAndLabels]) -> ImagesAndLabels:
    images = np.concatenate([np.empty((0, *SHAPE), np.uint8), *(images for images, _ in parts)])
    return images, np.concatenate([np.empty(0, np.uint8), *(labels for _, labels in parts)])


def parse_cifar(content: bytes, labels: tuple[int, ...], name: str) -> ImagesAndLabels:
    """Return the images and labels of a binary file.

    The file consists of records without a header: one byte per label, then 3,072 bytes of pixels, the red plane before
    the green and the blue one (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        content: The whole file.
        labels: Number of classes of each label byte; the last label is returned.
        name: Name of the file in error messages.

    Returns:
        Images, uint8 (N, 3, 32, 32), and labels, uint8 (N,); views of ``content``.

    Raises:
        LandscapeError: The file is empty or ends within a record, or a label is out of range.

    Examples:
        >>> record = bytes([7]) + bytes(3072)
        >>> images, labels = parse_cifar(record * 2, (10,), "data_batch_1.bin")
        >>> images.shape, labels.tolist()
        ((2, 3, 32, 32), [7, 7])
    """
    size = len(labels) + int(np.prod(SHAPE))
    if not content or len(content) % size:
        raise LandscapeError(
            f"{name} is damaged: {len(content)} bytes, expected one or more records of {size} bytes. Replace the file."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    found, allowed = records[:, : len(labels)], np.array(labels)
    if (found >= allowed).any():
        raise LandscapeError(
            f"{name} is damaged: largest labels {found.max(0).tolist()}, expected less than {list(labels)}. "
            "Replace the file."
        )
    return records[:, len(labels) :].reshape(-1, *SHAPE), found[:, -1]
