import functools
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import REAL_DATA
from sklearn.datasets import load_digits

from landscape.data import download
from landscape.data.dataset import _half, load_dataset, stratified
from landscape.data.download import Source, read_files
from landscape.data.mnist import MNIST, parse_idx, read_mnist
from landscape.errors import LandscapeError


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def read_file(name, folder, source):
    return read_files([name], folder, source)[0]


def make_source(files, *mirrors):
    return Source("mnist", mirrors, {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


PIXELS, DIGITS = (torch.from_numpy(np.asarray(array)) for array in load_digits(return_X_y=True))
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5))
LABELS = np.array([0, 9, 3, 3, 1, 7])
CONTENT = idx(IMAGES)


def test_digits_match_scikit_learn():
    digits = load_dataset("digits")
    pixels = torch.cat([digits.train.inputs, digits.test.inputs]) * digits.std[0] + digits.mean[0]
    torch.testing.assert_close(pixels.flatten(1).double(), PIXELS, rtol=0, atol=1e-4)
    assert torch.equal(torch.cat([digits.train.targets, digits.test.targets]), DIGITS)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1500, 0, 297)


FOLDERS = {"mnist": "mnist", "cifar10": "cifar-10-batches-bin"}
SHAPES = {
    "digits": ((1500, 1, 8, 8), (297, 1, 8, 8)),
    "mnist": ((50_000, 1, 28, 28), (10_000, 1, 28, 28)),
    "cifar10": ((50_000, 3, 32, 32), None),  # The test images are optional.
}


@pytest.mark.parametrize("name", SHAPES)
def test_load_dataset_shapes_and_moments(name):
    if name in FOLDERS and not (REAL_DATA / FOLDERS[name]).is_dir():
        pytest.skip(f"no folder {FOLDERS[name]} in {REAL_DATA}; set LANDSCAPE_DATA_DIR to its parent")
    dataset = load_dataset(name, REAL_DATA)
    std, mean = torch.std_mean(dataset.train.inputs.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-6, rtol=0)
    assert dataset.train.inputs.dtype == dataset.test.inputs.dtype == torch.float32
    assert dataset.train.targets.dtype == dataset.test.targets.dtype == torch.int64
    shapes = SHAPES[name]
    assert dataset.train.inputs.shape == shapes[0]
    assert shapes[1] is None or dataset.test.inputs.shape == shapes[1]
    assert set(dataset.train.targets.tolist()) == set(range(dataset.classes))


def test_test_images_normalized_by_training_set():
    train, test = PIXELS[:1500], PIXELS[1500:]
    expected = (test - train.mean()) / train.std(correction=0)
    torch.testing.assert_close(load_dataset("digits").test.inputs.flatten(1).double(), expected, rtol=0, atol=1e-6)


def test_stratified_keeps_class_shares():
    targets = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    order = stratified(targets)
    assert order.sort().values.equal(torch.arange(1000))
    for start, stop in ((0, 100), (100, 350), (350, 1000)):
        counts = targets[order[start:stop]].bincount(minlength=3)
        expected = torch.tensor([0.6, 0.3, 0.1]) * (stop - start)
        assert (counts - expected).abs().max() <= 2
    assert stratified(targets).equal(order)
    assert not order[:600].sort().values.equal(torch.arange(600))


def test_split_is_a_partition():
    digits = load_dataset("digits")
    parts = digits.split(300, 500)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (500, 300, 297)
    images = torch.cat([parts.train.inputs, parts.validation.inputs]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert parts.validation.targets.bincount().max() <= 32
    unsplit = digits.split(0)
    assert unsplit.train.inputs.equal(digits.train.inputs)
    assert unsplit.train.targets.equal(digits.train.targets)


@pytest.mark.parametrize(("validation", "train"), [(1500, None), (1000, 501), (0, 1501)])
def test_split_too_large(validation, train):
    with pytest.raises(LandscapeError, match=f"validation={validation}, train={train}.*1500.*'digits'"):
        load_dataset("digits").split(validation, train)


def test_load_dataset_unknown_name():
    with pytest.raises(LandscapeError, match=r"'minst'.*digits, mnist, cifar10, cifar10-half or cifar100"):
        load_dataset("minst")


def test_load_dataset_data_dir_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(LandscapeError, match=f"data_dir='{path}'"):
        load_dataset("mnist", path)


@pytest.mark.parametrize("shape", [(6,), (6, 4, 5), (0, 4, 5)])
def test_parse_idx_round_trip(shape):
    array = np.random.default_rng(0).integers(0, 256, shape)
    np.testing.assert_array_equal(parse_idx(idx(array), len(shape), "file"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with , expected 00000803"),
        (b"\x1f\x8b" + CONTENT, "starts with 1f8b0000, expected 00000803"),
        (idx(LABELS), "starts with 00000801, expected 00000803"),
        (CONTENT[:3], "starts with 000008, expected"),
        (CONTENT[:9], "9 bytes, expected 16"),
        (CONTENT[:-1], r"135 bytes, expected 136 .*\[6, 4, 5\]"),
        (CONTENT + b"\0", "137 bytes, expected 136"),
        (CONTENT[:4] + b"\xff" * 12 + CONTENT[16:], f"136 bytes, expected {16 + (2**32 - 1) ** 3}"),
    ],
)
def test_parse_idx_damaged(content, message):
    with pytest.raises(LandscapeError, match=f"train is .*{message}"):
        parse_idx(content, 3, "train")


@pytest.mark.parametrize(
    ("labels", "message"), [(LABELS[:5], "6 images.* 5 labels"), (LABELS + 1, "label 10, expected 0 to 9")]
)
def test_read_mnist_invalid_labels(tmp_path, labels, message):
    files = {"t10k-images-idx3-ubyte": CONTENT, "t10k-labels-idx1-ubyte": idx(labels)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LandscapeError, match=message):
        read_mnist("t10k", tmp_path, make_source(files))


@pytest.mark.parametrize("folder", ["", "mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_files_raw_or_gzipped(tmp_path, folder, suffix):
    content = gzip.compress(CONTENT) if suffix else CONTENT
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / f"a{suffix}").write_bytes(content)
    assert read_file("a", tmp_path, make_source({f"a{suffix}": content})) == CONTENT


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_files_damaged_file_is_kept(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"not gzip")
    source = make_source({path.name: b"expected"})
    with pytest.raises(LandscapeError) as caught:
        read_file("a", tmp_path, source)
    for part in (str(path), source.sha256[path.name], hashlib.sha256(b"not gzip").hexdigest()):
        assert part in str(caught.value)
    assert path.read_bytes() == b"not gzip"


class Mirror(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Suppress the log, so that the output stays clean."""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Yield the URL of a local mirror and the folder that it serves."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Mirror, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def test_download_from_second_mirror(tmp_path, mirror, capsys):
    (address, served), zipped = mirror, gzip.compress(CONTENT)
    (served / "a.gz").write_bytes(zipped)
    source = make_source({"a.gz": zipped}, address + "empty/", address)
    assert read_file("a", tmp_path / "new", source) == CONTENT
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["mnist", "a.gz"]
    assert "100%" in capsys.readouterr().err
    (served / "a.gz").unlink()
    assert read_file("a", tmp_path / "new", source) == CONTENT  # The file is not downloaded twice.


def test_download_failures_leave_nothing(tmp_path, mirror):
    address, served = mirror
    (served / "a.gz").write_bytes(b"wrong")
    source = make_source({"a.gz": b"right"}, address, address + "empty/", "http://127.0.0.1:1/")
    with pytest.raises(LandscapeError) as caught:
        read_file("a", tmp_path / "new", source)
    wrong, right = (hashlib.sha256(content).hexdigest() for content in (b"wrong", b"right"))
    for part in (str(tmp_path / "new" / "mnist"), wrong, right, "404", "refused"):
        assert part in str(caught.value)
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["mnist"]


def test_download_timeout(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(Mirror, "do_GET", lambda self: threading.Event().wait(0.5))
    monkeypatch.setattr(download, "TIMEOUT", (0.1, 0.1))
    with pytest.raises(LandscapeError, match="timed out"):
        read_file("a", tmp_path, make_source({"a.gz": b""}, mirror[0]))


def test_load_dataset_mnist_from_mirror(tmp_path, mirror, monkeypatch):
    address, served = mirror
    files = {"images-idx3-ubyte.gz": gzip.compress(CONTENT), "labels-idx1-ubyte.gz": gzip.compress(idx(LABELS))}
    files = {f"{part}-{name}": content for part in ("train", "t10k") for name, content in files.items()}
    assert set(files) <= set(MNIST.sha256)
    for name, content in files.items():
        (served / name).write_bytes(content)
    source = make_source(files, address)
    monkeypatch.setattr("landscape.data.dataset.read_mnist", functools.partial(read_mnist, source=source))
    dataset = load_dataset("mnist", tmp_path)
    expected = (IMAGES[:, None] - IMAGES.mean()) / IMAGES.std()
    torch.testing.assert_close(dataset.test.inputs.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert dataset.train.targets.tolist() == LABELS.tolist()


@pytest.fixture
def without_home(monkeypatch):
    """A user id without a name, an environment without HOME."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)


def test_digits_need_no_home(without_home):
    assert len(load_dataset("digits").train) == 1500
    assert len(load_dataset("digits", "~/data").train) == 1500


@pytest.mark.parametrize("data_dir", [None, "~/data"])
def test_cache_without_home(without_home, data_dir):
    with pytest.raises(LandscapeError, match="home folder"):
        load_dataset("mnist", data_dir)


@pytest.mark.parametrize("data_dir", ["s3://me:hidden@bucket/data", Path("gs://bucket/data")])
def test_data_dir_is_no_url(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LandscapeError, match="data_dir: must be a folder") as caught:
        load_dataset("mnist", data_dir)
    assert "hidden" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_mistyped_data_dir_is_not_created(tmp_path):
    with pytest.raises(LandscapeError, match=r"data_dir=.*typo"):
        load_dataset("mnist", tmp_path / "typo")
    assert not list(tmp_path.iterdir())


def test_download_failure_is_short(tmp_path):
    with pytest.raises(LandscapeError, match="refused") as caught:
        read_file("a", tmp_path, make_source({"a.gz": b""}, "http://127.0.0.1:1/"))
    assert "Max retries" not in str(caught.value)
    assert " object at " not in str(caught.value)


def test_half_resolution():
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    half = _half(images)
    assert half.shape == (2, 3, 2, 2)
    for corner in np.ndindex(2, 3, 2, 2):
        image, channel, row, column = corner
        block = images[image, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert half[corner] == sum(map(int, block.ravel())) / 4
