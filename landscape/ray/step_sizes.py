"""Step sizes eta along a ray, checked; apart from the ray, because options need no torch."""

import math
from collections.abc import Iterable, Mapping

from landscape.errors import LandscapeError


def checked_step_sizes(step_sizes: Iterable[float]) -> list[float]:
    """Return the step sizes as numbers.

    Raises:
        LandscapeError: No number is given, or one is not finite.
    """
    try:
        given = list(step_sizes)
        numbers = [float(eta) for eta in given if not isinstance(eta, bool | str | bytes)]
    except (TypeError, ValueError, OverflowError) as error:
        raise LandscapeError(f"step_sizes={step_sizes!r:.100}: give a list of numbers.") from error
    if len(numbers) < len(given) or isinstance(step_sizes, bytes | Mapping):  # a text is one of texts
        raise LandscapeError(f"step_sizes={step_sizes!r:.100}: give a list of numbers.")
    if not numbers or not all(map(math.isfinite, numbers)):
        raise LandscapeError(f"step_sizes={step_sizes!r:.100}: give one finite number or more.")
    return numbers
