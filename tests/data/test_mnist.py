"""MNIST as torchvision, Kaggle and people's own gzip lay it out."""

import gzip
import hashlib

import numpy as np
import pytest

from landscape.data import mnist
from landscape.data.download import Source
from landscape.data.mnist import read_mnist
from landscape.errors import LandscapeError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
LABELS = np.array([0, 9, 3, 3, 1, 7], np.uint8)
FILES = {
    "t10k-images-idx3-ubyte": bytes([0, 0, 8, 3]) + np.array([6, 4, 5], ">u4").tobytes() + IMAGES.tobytes(),
    "t10k-labels-idx1-ubyte": bytes([0, 0, 8, 1]) + np.array([6], ">u4").tobytes() + LABELS.tobytes(),
}
PUBLISHED = Source("mnist", (), {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})


def kaggle(name):
    return name.replace("-idx", ".idx")


LAYOUTS = {
    "as published": lambda name: name,
    "of torchvision, root": lambda name: f"MNIST/raw/{name}",
    "of torchvision, root/MNIST": lambda name: f"raw/{name}",
    "of torchvision, packed": lambda name: f"MNIST/raw/{name}.gz",
    "of Kaggle": kaggle,
    "of Kaggle, in folders": lambda name: f"{name}/{name}",
    "of Kaggle, packed": lambda name: f"{kaggle(name)}.gz",
    "packed again": lambda name: f"{name}.gz",
    "packed again, of this package": lambda name: f"mnist/{name}.gz",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout):
    for name, content in FILES.items():
        path = tmp_path / LAYOUTS[layout](name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1, mtime=7) if path.suffix == ".gz" else content)
    before = sorted(tmp_path.rglob("*"))
    images, labels = read_mnist("t10k", tmp_path, PUBLISHED)
    np.testing.assert_array_equal(images[:, 0], IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("", b"other"),
        (".gz", gzip.compress(b"other", mtime=0)),
        (".gz", b"not gzip"),
        (".gz", gzip.compress(FILES["t10k-images-idx3-ubyte"], mtime=0)[:-9]),
        (".gz", gzip.compress(FILES["t10k-images-idx3-ubyte"], mtime=0)[:12] + bytes(99)),
        (".gz", gzip.compress(bytes(2000), mtime=0)),
    ],
)
def test_other_content(tmp_path, monkeypatch, suffix, content):
    monkeypatch.setattr(mnist, "MAX_BYTES", 1000)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(content)
    with pytest.raises(LandscapeError, match=f"{path} is damaged"):
        read_mnist("t10k", tmp_path, PUBLISHED)
    assert path.read_bytes() == content
