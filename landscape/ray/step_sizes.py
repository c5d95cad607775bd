"""Step sizes along a ray, checked without importing torch."""

import math
from collections.abc import Iterable, Mapping

from landscape.errors import LandscapeError


def checked_step_sizes(step_sizes: Iterable[float]) -> list[float]:
    """Return the step sizes as floats.

    Raises:
        LandscapeError: There are none, or one is not a finite number.

    Examples:
        >>> checked_step_sizes((1, 2.5))
        [1.0, 2.5]
    """
    try:
        given = list(step_sizes)
        numbers = [float(eta) for eta in given if not isinstance(eta, bool | str | bytes)]
        if len(numbers) < len(given) or isinstance(step_sizes, bytes | Mapping):  # the items of a str are str
            raise TypeError
    except (TypeError, ValueError, OverflowError) as error:
        raise LandscapeError(f"step_sizes={step_sizes!r:.100}: must be a list of numbers.") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise LandscapeError(f"step_sizes={step_sizes!r:.100}: must be one finite number or more.")
    return numbers
