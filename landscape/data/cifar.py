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
    """One of the two data sets: its files, and what a record begins with."""

    source: Source
    train: tuple[str, ...]
    tests: tuple[str, ...]
    """Files with test images, the best first; none of them is needed."""
    labels: tuple[int, ...]
    """Classes of each label byte of a record; the last is the target (CIFAR-100 has 20 superclasses before it)."""


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
            # The first 1,000 records of the file above, for who has no more of it.
            "test_batch_first1000.bin": "8314c96d7cd65618193bab23acdd5d4c4af15bf6dd00a1781d55beedf3be1ef5",
        },
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
    ),
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin", "test_batch_first1000.bin"),
    (10,),
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
)


def read_cifar(cifar: Cifar, folder: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """Training and test images (N, 3, 32, 32) with their labels (N,).

    Files that were unpacked are taken as they are; a test file that is then missing leaves an empty test set, since a
    landscape needs none. Otherwise the archive is read, and fetched where it is missing.

    Raises:
        LandscapeError: A file is damaged or not to be had.
    """
    unpacked = all(find_file(name, folder, cifar.source) for name in cifar.train)
    tests = [name for name in cifar.tests if find_file(name, folder, cifar.source)][:1] if unpacked else cifar.tests[:1]
    if unpacked and not tests and find_file(cifar.source.archive, folder, cifar.source):
        tests = cifar.tests[:1]
    names = [*cifar.train, *tests]
    parts = [
        parse_cifar(content, cifar.labels, name)
        for name, content in zip(names, read_files(names, folder, cifar.source), strict=True)
    ]
    split = len(cifar.train)
    return _joined(parts[:split]), _joined(parts[split:])


def _joined(parts: list[ImagesAndLabels]) -> ImagesAndLabels:
    images = np.concatenate([np.empty((0, *SHAPE), np.uint8), *(images for images, _ in parts)])
    return images, np.concatenate([np.empty(0, np.uint8), *(labels for _, labels in parts)])


def parse_cifar(content: bytes, labels: tuple[int, ...], name: str) -> ImagesAndLabels:
    """Images (N, 3, 32, 32) and labels (N,) in a file of the binary version.

    Its records, one after the other and without a header, are a byte for each label and 3,072 bytes of pixels, the red
    plane before the green and the blue one (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        content: The whole file.
        labels: How many classes each label byte has; the last label is returned.
        name: What to call the file in an error.

    Raises:
        LandscapeError: The file is empty or ends within a record, or a label is out of range.
    """
    size = len(labels) + int(np.prod(SHAPE))
    if not content or len(content) % size:
        raise LandscapeError(
            f"{name} is damaged: {len(content)} bytes, expected whole records of {size} bytes; replace it"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    found, allowed = records[:, : len(labels)], np.array(labels)
    if (found >= allowed).any():
        raise LandscapeError(
            f"{name} holds the labels {found.max(0).tolist()}, allowed are less than {list(labels)}; replace it"
        )
    return records[:, len(labels) :].reshape(-1, *SHAPE), found[:, -1]
