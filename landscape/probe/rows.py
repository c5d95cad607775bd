"""Rows whose numbers are on their devices, and what shows only when these are read."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

MAX_RECENT = 1000
"""Rows that may be of skipped updates, after which they are read."""
NOTICEABLE = 1e-3
"""Smallest predicted change of the loss, relative to it, at which a constant ray is suspicious."""
_SKIPPED = object()
"""Key of the flag among the values of a row."""
_CONSTANT = (
    "Step {}: the loss is {:.6g} at all step sizes, although the gradient predicts a change by {:.3g}. Either the "
    "loss reads its parameters from elsewhere than their modules (a captured CUDA graph, a closure, a cache), and such "
    "rows are no landscape: let the forward pass read them from the modules, or give the probe neither criterion nor "
    "observed losses. Or the gradient is not the derivative, as in quantized layers with straight-through estimators. "
    "Later rows are not checked for it."
)
_NOT_A_NUMBER = (
    "Step {}: the training loss is {:.6g}, but it is NaN at all step sizes. The norm of the gradient is {:.3g}. If "
    "that is not finite, the parameters are NaN after the step, too; otherwise give smaller step_sizes. The row keeps "
    "the NaN; later ones are not checked for it."
)


class PendingRow(dict[Any, Any]):
    """A row whose values may be tensors.

    Attributes:
        skipped: Tensor that is not 0 if the optimizer has skipped the update; None if it cannot have.
    """

    def __init__(self, values: Mapping[str, Any], skipped: Tensor | None) -> None:
        super().__init__(values)
        self.skipped = skipped


class RowQueue:
    """Resolves rows, by one transfer from each device.

    At an update the host must not wait for a device. So it learns only with the numbers of a row that the update was
    skipped, and drops such a row: a fused optimizer decides on the device to skip an update whose gradient overflows.
    Two findings are warned of, once each: a loss that is the same at all step sizes though its gradient predicts a
    change, and one that is NaN at all of them though it was finite in training.

    Args:
        check: Called before rows are resolved, for other checks that wait for the device.

    Examples:
        >>> queue = RowQueue()
        >>> loss = torch.tensor(2.0)
        >>> rows = [queue.append({"step": step, "loss": loss}, skipped=torch.tensor(step % 2)) for step in range(4)]
        >>> queue.resolve(rows)
        [{'step': 0, 'loss': 2.0}, {'step': 2, 'loss': 2.0}]
        >>> queue.last()
        {'step': 2, 'loss': 2.0}
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self.has_rows = False
        """True if there was a row, skipped or not."""
        self._last: dict[str, Any] = {}
        self._recent: list[PendingRow] = []
        """Rows of which the last one that is not skipped is the last row."""
        self._warned: set[str] = set()

    def append(self, values: Mapping[str, Any], skipped: Tensor | None = None) -> PendingRow:
        """Return a row, to be resolved later.

        Args:
            values: Values by column; numbers, lists of numbers, or tensors.
            skipped: See `PendingRow`.
        """
        self.has_rows = True
        row = PendingRow(values, None if skipped is None else skipped.detach().clone())
        if skipped is None:
            self._recent.clear()
        self._recent.append(row)
        if len(self._recent) > MAX_RECENT:
            self.last()
        return row

    def last(self) -> dict[str, Any]:
        """Return the last row, or an empty one."""
        if self._recent:
            self._last = dict([self._last, *_plain(self._recent)][-1])
            self._recent.clear()
        return dict(self._last)

    def restore(self, last: Mapping[str, Any]) -> None:
        """Resume from the last row of a checkpoint."""
        self._last, self.has_rows = dict(last), bool(last)
        self._recent.clear()

    def resolve(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows with plain numbers, without skipped updates."""
        self._check()
        kinds = [value.dtype for row in rows if isinstance(value := row.get("losses"), Tensor)]
        rounding = max((16 * torch.finfo(kind).eps for kind in kinds), default=0.0)
        plain = _plain(rows)
        for row in plain:
            for kind, message in _findings(row, rounding):
                if kind not in self._warned:
                    self._warned.add(kind)
                    warnings.warn(message, stacklevel=2)
        return plain


def _plain(rows: Sequence[dict[Any, Any]]) -> list[dict[str, Any]]:
    flagged = [row | {_SKIPPED: row.skipped} if isinstance(row, PendingRow) else row for row in rows]
    return [
        {name: value for name, value in row.items() if name is not _SKIPPED}
        for row in to_host(flagged)
        if not row.get(_SKIPPED)
    ]


def to_host(rows: Sequence[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Return rows as plain numbers.

    There is one transfer from each device.

    Examples:
        >>> to_host([{"step": 1, "losses": torch.tensor([0.5, 2.0])}, {"step": 2, "losses": [1.0]}])
        [{'step': 1, 'losses': [0.5, 2.0]}, {'step': 2, 'losses': [1.0]}]
    """
    tensors = defaultdict[torch.device, list[Tensor]](list)
    for value in (value for row in rows for value in row.values() if isinstance(value, Tensor)):
        tensors[value.device].append(value.detach())
    numbers = {device: iter(_numbers(held)) for device, held in tensors.items()}

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return list(islice(numbers[value.device], len(value))) if value.dim() else next(numbers[value.device])

    return [{name: plain(value) for name, value in row.items()} for row in rows]


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Return the elements of tensors of one device."""
    kind = reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)
    return torch.cat([tensor.reshape(-1).to(kind) for tensor in tensors]).tolist()


def _findings(row: Mapping[str, Any], rounding: float) -> Iterator[tuple[str, str]]:
    """Yield kind and message of each finding."""
    losses, loss = row.get("losses"), row.get("loss", math.nan)
    if not losses or not math.isfinite(loss):
        return
    if all(map(math.isnan, losses)):
        yield "not a number", _NOT_A_NUMBER.format(row["step"], loss, row["grad_norm"])
    predicted = abs(row["slope"]) * max(map(abs, row["step_sizes"]))
    is_constant = all(there == losses[0] for there in losses) and abs(losses[0] - loss) <= rounding * abs(loss)
    if is_constant and math.isfinite(predicted) and predicted > max(NOTICEABLE, rounding) * abs(loss):
        yield "constant", _CONSTANT.format(row["step"], loss, predicted)
