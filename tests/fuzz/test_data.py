"""Fuzz tests of data set files: damaged files raise, and nothing is parsed before it is verified."""

import functools
import gzip
import hashlib
import io
import os
import struct
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nonsense import cases, soon, tree

from landscape.data.cifar import CIFAR10, parse_cifar
from landscape.data.dataset import load_dataset
from landscape.data.download import MAX_BYTES, Source, read_files
from landscape.data.mnist import MNIST, parse_idx
from landscape.errors import LandscapeError

SIZES = [0, 1, 2, 3, 255, 256, 2**16, 2**31, 2**32 - 1]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@st.composite
def damaged(draw, contents):
    """Draw a valid file with up to two random damages."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["cut", "longer", "changed", "size"]))
        if kind == "cut":
            del content[at:]
        elif kind == "longer":
            content += draw(st.binary(min_size=1, max_size=9))
        elif kind == "changed":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        else:
            at = 4 * draw(st.integers(0, 4))
            content[at : at + 4] = struct.pack(">I", draw(st.sampled_from(SIZES)))
    return bytes(content)


@st.composite
def idx_files(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    values = draw(st.binary(min_size=0, max_size=81))
    count = functools.reduce(int.__mul__, shape, 1)
    return (
        bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + (values * 81)[:count].ljust(count, b"x")
    )


def slow_idx(content, dimensions):
    """Read an idx file value by value: (shape, values by index), or None if it is invalid."""
    if len(content) < 4 + 4 * dimensions or content[:4] != bytes([0, 0, 8, dimensions]):
        return None
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    values = content[4 + 4 * dimensions :]
    if 0 in shape:
        return None if values else (shape, {})
    indices = [()]
    for size in shape:
        if len(indices) * size > len(values):
            return None
        indices = [(*index, last) for index in indices for last in range(size)]
    return (shape, dict(zip(indices, values, strict=True))) if len(values) == len(indices) else None


@cases(0.12)
@given(content=damaged(idx_files()), dimensions=st.integers(0, 4))
def test_parse_idx_matches_slow_reader(content, dimensions):
    expected = slow_idx(content, dimensions)
    with soon("idx files"):
        try:
            found = parse_idx(content, dimensions, "file")
        except LandscapeError:
            assert expected is None
        else:
            assert found.shape == expected[0]
            assert {index: found[index] for index in expected[1]} == expected[1]


@st.composite
def cifar_files(draw):
    labels = draw(st.sampled_from([(10,), (20, 100)]))
    records = draw(st.lists(st.tuples(*(st.integers(0, most) for most in labels)), max_size=3))
    pixels = draw(st.binary(min_size=1, max_size=7))
    return b"".join(bytes(record) + (pixels * 3072)[:3072] for record in records)


@cases(0.08)
@given(content=damaged(cifar_files()), labels=st.sampled_from([(10,), (20, 100)]))
def test_parse_cifar_matches_slow_reader(content, labels):
    size = len(labels) + 3072
    records = [content[start : start + size] for start in range(0, len(content), size)]
    valid = records and all(
        len(record) == size and all(label < classes for label, classes in zip(record, labels, strict=False))
        for record in records
    )
    with soon("CIFAR files"):
        try:
            images, targets = parse_cifar(content, labels, "file")
        except LandscapeError:
            assert not valid
        else:
            assert valid
            assert targets.tolist() == [record[len(labels) - 1] for record in records]
            for image, record in zip(images, records, strict=True):
                for offset in range(0, 3072, 97):
                    plane, rest = divmod(offset, 1024)
                    assert image[plane, rest // 32, rest % 32] == record[len(labels) + offset]


def sparse(path):
    with path.open("xb") as file:
        file.truncate(1 << 43)  # A sparse file, which uses no disk space.


def unreadable(path):
    path.write_bytes(b"x")
    path.chmod(0)


INVALID_FILES = {
    "text": lambda path: path.write_text("not found"),
    "an empty file": lambda path: path.touch(),
    "a gzip bomb": lambda path: path.write_bytes(gzip.compress(bytes(1 << 24))),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a symlink loop": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "larger than memory": sparse,
    "unreadable": unreadable,
}


@pytest.mark.parametrize("make", INVALID_FILES)
@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_load_dataset_invalid_files_raise_and_are_kept(tmp_path, name, make):
    for file in {"mnist": MNIST, "cifar10": CIFAR10.source}.get(
        name, Source(name, (), {"cifar-100-binary.tar.gz": ""})
    ).sha256:
        INVALID_FILES[make](tmp_path / file)
    before = set(tmp_path.iterdir())
    with soon("invalid files"), pytest.raises(LandscapeError, match=r"damaged|missing|cannot read"):
        load_dataset(name, tmp_path)
    assert before <= set(tmp_path.rglob("*"))
    assert all(path.is_dir() and not any(path.iterdir()) for path in set(tmp_path.rglob("*")) - before)


def member(name, content=b"escaped", **options):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for option, value in options.items():
        setattr(info, option, value)
    return info, io.BytesIO(content)


MEMBERS = {
    "above": member("../escaped"),
    "absolute": member("/tmp/escaped-by-landscape"),
    "link out": member("inside/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("inside/hard", b"", type=tarfile.LNKTYPE, linkname="../../escaped"),
    "device": member("inside/device", b"", type=tarfile.CHRTYPE),
    "wanted as a link": member("inside/a", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "wanted as a folder": member("inside/a", b"", type=tarfile.DIRTYPE),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_archive_is_not_extracted_to_disk(tmp_path, monkeypatch, name):
    folder = tmp_path / "below" / "data"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for info, content in [MEMBERS[name], *([] if "wanted" in name else [member("inside/a", b"data")])]:
            archive.addfile(info, content)
    (folder / "all.tar.gz").write_bytes(packed.getvalue())
    sha256 = {"all.tar.gz": hashlib.sha256(packed.getvalue()).hexdigest(), "a": ""}
    before = tree(tmp_path)
    if "wanted" in name:
        with pytest.raises(LandscapeError, match="no file inside/a"):
            read_files(["a"], folder, Source("set", (), sha256, "all.tar.gz", "inside"))
    else:
        assert read_files(["a"], folder, Source("set", (), sha256, "all.tar.gz", "inside")) == [b"data"]
    assert tree(tmp_path) == before
    assert not os.path.exists("/tmp/escaped-by-landscape")


def test_size_limit_exceeds_published_files():
    assert MAX_BYTES > 170_498_071  # The archive of CIFAR-10.
