import numpy as np
import pytest
import torch

from landscape import LandscapeError
from landscape.data.own import digest, load_own_dataset


@pytest.mark.parametrize(
    ("x", "dtype"),
    [(np.ones((4, 2), np.float16), torch.float32), (np.ones((4, 2), bool), torch.int64), ([[1], [2]], torch.int64)],
)
def test_types_of_inputs(tmp_path, x, dtype):
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(len(x)))
    data = load_own_dataset(str(tmp_path / "x.npz"))
    assert data.train.inputs.dtype == dtype
    assert (data.classes, len(data.test)) == (len(x), 0)


def test_numbers_are_split_at_random(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.arange(100.0)[:, None], y_train=np.arange(100.0))
    data = load_own_dataset(str(tmp_path / "x.npz")).split(validation=20, train=50)
    assert (len(data.train), len(data.validation)) == (50, 20)
    assert not {*data.train.targets.tolist()} & {*data.validation.targets.tolist()}
    assert data.train.targets.max() > 60


def test_random_data_are_the_same_in_each_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "random_data.py").write_text(
        "import numpy, torch\ndef load():\n    return torch.randn(5, 2), numpy.random.rand(5)\n"
    )
    state = torch.get_rng_state()
    first = load_own_dataset("random_data:load")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert digest(load_own_dataset("random_data:load")) == digest(first)
    first.train.inputs[0, 0] += 1
    assert digest(load_own_dataset("random_data:load")) != digest(first)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.ones((4, 2)), "y_train": np.ones(4), "x_test": np.ones((4, 2))}, "one of x_test and y_test"),
        ({"x_train": np.ones((0, 2)), "y_train": np.ones(0)}, "no samples"),
        ({"x_train": np.ones((4, 2), complex), "y_train": np.ones(4)}, "real numbers"),
        ({"x_train": np.array(["a", "b"]), "y_train": np.ones(2)}, "real numbers"),
        ({"x_train": np.float64(1), "y_train": np.ones(2)}, "single number"),
        ({"x_train": np.full((2, 2), 1e300), "y_train": np.ones(2)}, "infinite"),
        (
            {"x_train": np.ones((4, 2)), "y_train": np.ones(4), "x_test": np.ones((4, 3)), "y_test": np.ones(4)},
            "x_test: has samples",
        ),
    ],
)
def test_mistakes(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(LandscapeError, match=message):
        load_own_dataset(str(tmp_path / "x.npz"))
