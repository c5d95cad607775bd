import gzip
import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from landscape.data.cifar import CIFAR10, CIFAR100, parse_cifar, read_cifar
from landscape.data.dataset import LOADERS, load_dataset
from landscape.errors import LandscapeError

RANDOM = np.random.default_rng(0)


def records(count, labels):
    """Return a binary file with its images and label bytes."""
    images = RANDOM.integers(0, 256, (count, 3, 32, 32), np.uint8)
    targets = np.stack([RANDOM.integers(0, classes, count, np.uint8) for classes in labels], 1)
    content = b"".join(label.tobytes() + image.tobytes() for label, image in zip(targets, images, strict=True))
    return content, images, targets


def make_files(cifar, counts):
    names = [*cifar.train, cifar.tests[0]]
    return {name: records(count, cifar.labels) for name, count in zip(names, counts, strict=True)}


def with_hashes(cifar, contents):
    """Replace the published hashes by those of the given files."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return replace(cifar, source=replace(cifar.source, sha256=hashes, mirrors=()))


def make_archive(cifar, contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{cifar.source.inside}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


CASES = pytest.mark.parametrize(("cifar", "counts"), [(CIFAR10, (3, 1, 2, 4, 5, 6)), (CIFAR100, (7, 4))], ids=str)


@CASES
@pytest.mark.parametrize("subfolder", ["", "{0.name}", "{0.inside}", "{0.name}/{0.inside}"])
def test_read_cifar_unpacked(tmp_path, cifar, counts, subfolder):
    files = make_files(cifar, counts)
    folder = tmp_path / subfolder.format(cifar.source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _, _) in files.items():
        (folder / name).write_bytes(content)
    (images, labels), test = read_cifar(with_hashes(cifar, {n: c for n, (c, _, _) in files.items()}), tmp_path)
    parts = list(files.values())
    np.testing.assert_array_equal(images, np.concatenate([part[1] for part in parts[:-1]]))
    np.testing.assert_array_equal(labels, np.concatenate([part[2][:, -1] for part in parts[:-1]]))
    np.testing.assert_array_equal(test[0], parts[-1][1])
    np.testing.assert_array_equal(test[1], parts[-1][2][:, -1])


@CASES
def test_read_cifar_archive_stays_packed(tmp_path, cifar, counts):
    files = {name: content for name, (content, _, _) in make_files(cifar, counts).items()}
    (tmp_path / cifar.source.archive).write_bytes(archive := make_archive(cifar, files))
    (images, _), test = read_cifar(with_hashes(cifar, {cifar.source.archive: archive}), tmp_path)
    assert (len(images), len(test[0])) == (sum(counts[:-1]), counts[-1])
    assert [path.name for path in tmp_path.iterdir()] == [cifar.source.archive]


@CASES
def test_read_cifar_without_test_file(tmp_path, cifar, counts):
    files = {name: content for name, (content, _, _) in make_files(cifar, counts).items()}
    for name in cifar.train:
        (tmp_path / name).write_bytes(files[name])
    train, test = read_cifar(with_hashes(cifar, files), tmp_path)
    assert (len(train[0]), test[0].shape, test[1].shape) == (sum(counts[:-1]), (0, 3, 32, 32), (0,))


def test_read_cifar_test_file_from_archive(tmp_path):
    files = {name: content for name, (content, _, _) in make_files(CIFAR100, (7, 4)).items()}
    (tmp_path / "train.bin").write_bytes(files["train.bin"])
    (tmp_path / CIFAR100.source.archive).write_bytes(archive := make_archive(CIFAR100, files))
    _, test = read_cifar(with_hashes(CIFAR100, files | {CIFAR100.source.archive: archive}), tmp_path)
    assert len(test[0]) == 4


def test_read_cifar_damaged_archive(tmp_path):
    (tmp_path / CIFAR10.source.archive).write_bytes(b"not an archive")
    with pytest.raises(LandscapeError, match=r"damaged: SHA-256 .*expected c4a38c"):
        read_cifar(CIFAR10, tmp_path)


def test_read_cifar_archive_unavailable(tmp_path):
    cifar = replace(CIFAR100, source=replace(CIFAR100.source, mirrors=("http://127.0.0.1:1/",)))
    with pytest.raises(LandscapeError, match=r"cifar-100-binary\.tar\.gz is missing.*data_dir"):
        read_cifar(cifar, tmp_path)


CONTENT, IMAGES, LABELS = records(3, (20, 100))


def test_parse_cifar_record():
    images, labels = parse_cifar(CONTENT, (20, 100), "file")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS[:, 1])
    assert images[1, 2, 3, 4] == CONTENT[3074 + 2 + 2 * 1024 + 3 * 32 + 4]


@pytest.mark.parametrize(
    ("content", "labels", "message"),
    [
        (b"", (10,), "0 bytes, expected .* 3073 bytes"),
        (CONTENT[:-1], (20, 100), "9221 bytes, expected .* 3074"),
        (CONTENT, (10,), "expected .* 3073"),
        (b"\x0a" + bytes(3072), (10,), r"labels \[10\], expected less than \[10\]"),
        (b"\x14\x63" + bytes(3072), (20, 100), r"labels \[20, 99\], expected less than \[20, 100\]"),
    ],
)
def test_parse_cifar_damaged(content, labels, message):
    with pytest.raises(LandscapeError, match=message):
        parse_cifar(content, labels, "train.bin")


def test_load_dataset_cifar100(tmp_path, monkeypatch):
    files = {name: content for name, (content, _, _) in make_files(CIFAR100, (300, 40)).items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cifar = with_hashes(CIFAR100, files)
    monkeypatch.setitem(LOADERS, "cifar100", (100, lambda folder: read_cifar(cifar, folder)))
    dataset = load_dataset("cifar100", tmp_path)
    assert (dataset.classes, dataset.train.inputs.shape, len(dataset.test)) == (100, (300, 3, 32, 32), 40)
    assert dataset.train.targets.dtype == torch.int64
    pixels = dataset.train.inputs[:, 1] * dataset.std[1] + dataset.mean[1]
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)


def test_read_cifar_ignores_file_without_hash(tmp_path):
    records = bytes([3, 42]) + bytes(3072)
    source = replace(
        CIFAR100.source,
        mirrors=(),
        sha256={name: hashlib.sha256(records).hexdigest() for name in CIFAR100.source.sha256},
    )
    (tmp_path / "train.bin").write_bytes(records)
    (tmp_path / "test.bin.gz").write_bytes(gzip.compress(records))
    train_set, test_set = read_cifar(replace(CIFAR100, source=source), tmp_path)
    assert (len(train_set[0]), len(test_set[0])) == (1, 0)


@pytest.mark.parametrize("place", ["{}", "{}.tar.gz", "cifar10/{}", "itself"])
def test_python_version_is_named(tmp_path, place):
    cifar = replace(CIFAR10, source=replace(CIFAR10.source, mirrors=()))
    folder = tmp_path / "cifar-10-batches-py" if place == "itself" else tmp_path
    if place == "{}.tar.gz":
        (tmp_path / "cifar-10-python.tar.gz").touch()
    else:
        path = folder if place == "itself" else tmp_path / place.format("cifar-10-batches-py")
        path.mkdir(parents=True)
        (path / "data_batch_1").touch()
    with pytest.raises(LandscapeError, match=r"cifar-10-.*Python version.*cifar-10-binary\.tar\.gz"):
        read_cifar(cifar, folder)


def test_python_version_beside_the_binary_one(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / CIFAR100.source.archive).write_bytes(b"not an archive")
    with pytest.raises(LandscapeError, match=r"damaged"):
        read_cifar(CIFAR100, tmp_path)
