import functools
import gzip
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from landscape import data
from landscape.data import MNIST, Source, load_dataset, parse_idx, read_file, read_labelled
from landscape.errors import UserError

REAL_DATA = Path(os.environ.get("LANDSCAPE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def source_of(files, *mirrors):
    return Source("mnist", mirrors, {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


PIXELS, DIGITS = (torch.from_numpy(np.asarray(array)) for array in load_digits(return_X_y=True))
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5))
LABELS = np.array([0, 9, 3, 3, 1, 7])
CONTENT = idx(IMAGES)


def test_digits_are_scikit_learns():
    digits = load_dataset("digits")
    pixels = torch.cat([digits.train_inputs, digits.test_inputs]) * digits.std + digits.mean
    torch.testing.assert_close(pixels.double(), PIXELS, rtol=0, atol=1e-4)
    assert torch.equal(torch.cat([digits.train_targets, digits.test_targets]), DIGITS)
    assert (len(digits.train_inputs), len(digits.test_inputs)) == (1500, 297)


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_tensors_are_flat_normalized_and_typed(name):
    if name == "mnist" and not (REAL_DATA / name).is_dir():
        pytest.skip(f"no folder mnist in {REAL_DATA}: name its parent in LANDSCAPE_DATA_DIR")
    dataset = load_dataset(name, REAL_DATA)
    std, mean = torch.std_mean(dataset.train_inputs.double(), correction=0)
    torch.testing.assert_close((mean.item(), std.item()), (0.0, 1.0), atol=1e-6, rtol=0)
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == torch.float32
    assert dataset.train_targets.dtype == dataset.test_targets.dtype == torch.int64
    shapes = {"digits": ((1500, 64), (297, 64)), "mnist": ((50_000, 784), (10_000, 784))}
    assert (dataset.train_inputs.shape, dataset.test_inputs.shape) == shapes[name]
    assert set(dataset.train_targets.tolist()) == set(dataset.test_targets.tolist()) == set(range(dataset.classes))


def test_test_images_are_normalized_by_the_training_set():
    train, test = PIXELS[:1500], PIXELS[1500:]
    expected = (test - train.mean()) / train.std(correction=0)
    torch.testing.assert_close(load_dataset("digits").test_inputs.double(), expected, rtol=0, atol=1e-6)


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="'minst'; choose one of: digits, mnist"):
        load_dataset("minst")


def test_data_dir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match=f"'mnist' in {path}"):
        load_dataset("mnist", path)


@pytest.mark.parametrize("shape", [(6,), (6, 4, 5), (0, 4, 5)])
def test_idx_round_trip(shape):
    array = np.random.default_rng(0).integers(0, 256, shape)
    np.testing.assert_array_equal(parse_idx(idx(array), len(shape), "file"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with , not 00000803"),
        (b"\x1f\x8b" + CONTENT, "starts with 1f8b0000, not 00000803"),
        (idx(LABELS), "starts with 00000801, not 00000803"),
        (CONTENT[:3], "starts with 000008, not"),
        (CONTENT[:9], "9 bytes, 16 expected"),
        (CONTENT[:-1], r"135 bytes, 136 expected for sizes \[6, 4, 5\]"),
        (CONTENT + b"\0", "137 bytes, 136 expected"),
        (CONTENT[:4] + b"\xff" * 12 + CONTENT[16:], f"136 bytes, {16 + (2**32 - 1) ** 3} expected"),
    ],
)
def test_idx_that_is_damaged(content, message):
    with pytest.raises(UserError, match=f"train is .*{message}"):
        parse_idx(content, 3, "train")


@pytest.mark.parametrize(
    ("labels", "message"), [(LABELS[:5], "6 images, but .* 5 labels"), (LABELS + 1, "the label 10, expected 0 to 9")]
)
def test_labels_that_do_not_fit(tmp_path, labels, message):
    files = {"t10k-images-idx3-ubyte": CONTENT, "t10k-labels-idx1-ubyte": idx(labels)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_labelled("t10k", tmp_path, source_of(files))


@pytest.mark.parametrize("folder", ["", "mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_file_is_found_raw_or_gzipped_in_the_folder_or_below(tmp_path, folder, suffix):
    content = gzip.compress(CONTENT) if suffix else CONTENT
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / f"a{suffix}").write_bytes(content)
    assert read_file("a", tmp_path, source_of({f"a{suffix}": content})) == CONTENT


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_file_is_refused_unopened_and_kept(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"not gzip")
    source = source_of({path.name: b"expected"})
    with pytest.raises(UserError) as caught:
        read_file("a", tmp_path, source)
    for part in (str(path), source.sha256[path.name], hashlib.sha256(b"not gzip").hexdigest()):
        assert part in str(caught.value)
    assert path.read_bytes() == b"not gzip"


class Mirror(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Keep the test's output clean."""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Address of a local mirror and the folder that it serves."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Mirror, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def test_missing_file_is_fetched_from_the_mirror_that_has_it(tmp_path, mirror, capsys):
    (address, served), zipped = mirror, gzip.compress(CONTENT)
    (served / "a.gz").write_bytes(zipped)
    source = source_of({"a.gz": zipped}, address + "empty/", address)
    assert read_file("a", tmp_path / "new", source) == CONTENT
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["mnist", "a.gz"]
    assert "100%" in capsys.readouterr().err
    (served / "a.gz").unlink()
    assert read_file("a", tmp_path / "new", source) == CONTENT  # not fetched twice


def test_wrong_and_absent_downloads_end_in_one_error_and_leave_nothing(tmp_path, mirror):
    address, served = mirror
    (served / "a.gz").write_bytes(b"wrong")
    source = source_of({"a.gz": b"right"}, address, address + "empty/", "http://127.0.0.1:1/")
    with pytest.raises(UserError) as caught:
        read_file("a", tmp_path / "new", source)
    wrong, right = (hashlib.sha256(content).hexdigest() for content in (b"wrong", b"right"))
    for part in (str(tmp_path / "new" / "mnist"), wrong, right, "404", "refused"):
        assert part in str(caught.value)
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["mnist"]


def test_silent_mirror_is_given_up(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(Mirror, "do_GET", lambda self: threading.Event().wait(0.5))
    monkeypatch.setattr(data, "TIMEOUT", (0.1, 0.1))
    with pytest.raises(UserError, match="timed out"):
        read_file("a", tmp_path, source_of({"a.gz": b""}, mirror[0]))


def test_whole_mnist_from_a_mirror(tmp_path, mirror, monkeypatch):
    address, served = mirror
    files = {"images-idx3-ubyte.gz": gzip.compress(CONTENT), "labels-idx1-ubyte.gz": gzip.compress(idx(LABELS))}
    files = {f"{part}-{name}": content for part in ("train", "t10k") for name, content in files.items()}
    assert set(files) <= set(MNIST.sha256)
    for name, content in files.items():
        (served / name).write_bytes(content)
    monkeypatch.setattr(data, "MNIST", source_of(files, address))
    dataset = load_dataset("mnist", tmp_path)
    expected = (IMAGES.reshape(6, 20) - IMAGES.mean()) / IMAGES.std()
    torch.testing.assert_close(dataset.test_inputs.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert dataset.train_targets.tolist() == LABELS.tolist()
