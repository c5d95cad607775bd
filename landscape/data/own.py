"""Data of a user: arrays from a function or an ``.npz`` file, checked."""

import hashlib
import random
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.callables import call_own, import_callable
from landscape.data.dataset import Dataset, Samples
from landscape.errors import LandscapeError
from landscape.files import expand_user
from landscape.rng import RngState

NAMES = ("x_train", "y_train", "x_test", "y_test")


def load_own_dataset(source: str, device: str | torch.device = "cpu") -> Dataset:
    """Load a data set of your own.

    Args:
        source: ``"file.npz"``, or ``"package.module:function"``. The file has the arrays ``x_train`` and ``y_train``,
            and for a test set ``x_test`` and ``y_test``. The function takes no arguments and returns them as a dict, or
            as a tuple in this order. It is called with seeded generators, so that random data are the same in each run.
        device: Device of the tensors.

    Returns:
        Data set, not normalized. Floats are float32, integers int64. ``classes`` is the largest integer target plus 1,
        or the numbers per sample.

    Raises:
        LandscapeError: The source cannot be read, or returned something else; the message names the array.

    Examples:
        >>> np.savez("mine.npz", x_train=np.ones((6, 4)), y_train=[0, 1, 2, 0, 1, 2])
        >>> data = load_own_dataset("mine.npz")
        >>> data.train.inputs.shape, data.train.targets.dtype, data.classes, len(data.test)
        (torch.Size([6, 4]), torch.int64, 3, 0)
    """
    given = f"data={source!r:.200}"
    arrays = _read_npz(source, given) if source.endswith(".npz") else _returned(source, given)
    if missing := [name for name in NAMES[:2] if arrays.get(name) is None]:
        raise LandscapeError(
            f"{given}: lacks {' and '.join(missing)}, has {', '.join(map(str, arrays)) or 'nothing'}. Give x_train and "
            "y_train, and x_test and y_test for a test set."
        )
    if (arrays.get("x_test") is None) != (arrays.get("y_test") is None):
        raise LandscapeError(f"{given}: has one of x_test and y_test. Give both, or none.")
    tensors = {name: _tensor(f"{given}: {name}", arrays[name]) for name in NAMES if arrays.get(name) is not None}
    train = _samples(given, "train", tensors)
    test = _samples(given, "test", tensors) if "x_test" in tensors else train[:0]
    if not len(train):
        raise LandscapeError(f"{given}: x_train: has no samples. Give at least one batch.")
    for name, own, first in (("x", test.inputs, train.inputs), ("y", test.targets, train.targets)):
        if own.shape[1:] != first.shape[1:] or own.dtype != first.dtype:
            raise LandscapeError(
                f"{given}: {name}_test: has samples {_shown(own)}, but {name}_train {_shown(first)}. Give both alike."
            )
    labels = [part.targets for part in (train, test) if len(part)]
    is_class = not train.targets.is_floating_point() and train.targets.ndim == 1
    classes = max(int(part.max()) for part in labels) + 1 if is_class else train.targets[0].numel()
    train, test = (Samples(part.inputs.to(device), part.targets.to(device)) for part in (train, test))
    return Dataset(source, classes, (), (), train, train[:0], test)


def digest(data: Dataset) -> str:
    """Return a hash of all samples, to check resumed runs."""
    content = hashlib.sha256()
    for part in (data.train, data.validation, data.test):
        for tensor in (part.inputs, part.targets):
            content.update(tensor.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def _read_npz(source: str, given: str) -> dict[str, Any]:
    try:
        # Objects are never unpickled, because that can run code.
        with np.load(expand_user(source), allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in NAMES} | {
                name: None for name in file.files if name not in NAMES
            }
    except FileNotFoundError as error:
        raise LandscapeError(f"{given}: there is no such file. Correct the path.") from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(expand_user(source)):
            raise LandscapeError(
                f"{given}: holds an array of Python objects, which is not read, since that can run code. Save numbers, "
                "such as np.asarray(x, dtype=np.float32)."
            ) from error
        raise LandscapeError(f"{given}: is no readable .npz file. Write it by np.savez({source!r}, ...).") from error


def _returned(source: str, given: str) -> dict[str, Any]:
    function = import_callable(source, "data")
    before = RngState.capture([])
    try:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        found = call_own(given, function)
    finally:
        before.restore()
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, tuple | list) and len(found) in (2, 4):
        return dict(zip(NAMES, found, strict=False))
    count = f" of {len(found)}" if isinstance(found, tuple | list) else ""
    raise LandscapeError(
        f"{given}: must return x_train, y_train (and x_test, y_test), as a tuple or a dict, got "
        f"{type(found).__name__}{count}."
    )


def _tensor(name: str, value: Any) -> Tensor:
    """Return float32 or int64 on the CPU, finite."""
    try:
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError as error:
        raise LandscapeError(f"{name}: is no array ({error}). Give all samples the same shape.") from error
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            kind = "Python objects" if array.dtype.kind == "O" else str(array.dtype)
            raise LandscapeError(f"{name}: must hold real numbers, got {kind}. Use floats or integers.")
        with np.errstate(over="ignore"):
            array = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if array.is_complex() or array.layout != torch.strided:
        raise LandscapeError(f"{name}: must hold real numbers, dense, got {array.dtype}. Use floats or integers.")
    tensor = array.to(torch.float32 if array.is_floating_point() else torch.int64).contiguous().clone()
    if not tensor.ndim:
        raise LandscapeError(f"{name}: must be an array of samples, got a single number.")
    bad = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
    if bad.any():
        raise LandscapeError(
            f"{name}: has NaN or infinite values in {int(bad.sum())} of {len(tensor)} samples, the first is "
            f"{int(bad.nonzero()[0])}. Remove these samples, or replace the values."
        )
    return tensor


def _samples(given: str, part: str, tensors: Mapping[str, Tensor]) -> Samples:
    inputs, targets = tensors[f"x_{part}"], tensors[f"y_{part}"]
    if len(inputs) != len(targets):
        raise LandscapeError(
            f"{given}: x_{part} has {len(inputs)} samples, y_{part} {len(targets)}. Give a target for each sample."
        )
    return Samples(inputs, targets)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape[1:])} {str(tensor.dtype).removeprefix('torch.')}"
