"""The search for the critical step: a few more points along a ray, each chosen by those before it."""

import math
from collections.abc import Callable, Sequence

MOST = 6
"""Most points that a search adds to a ray."""
WIDTH = 0.05
"""Relative width of the bracket at which a search ends."""
GROWTH = 8.0
"""Largest ratio of a step size to the largest one before it."""
GUESSES = 5
"""Points after which the bracket is halved, because guesses may close in from one side only."""
Point = tuple[float, float]
"""Step size and loss."""


def search(
    loss_at: Callable[[float], float], loss: float, slope: float, points: Sequence[Point], limit: float = math.inf
) -> list[Point]:
    """Return more points, which bracket the critical step.

    It is the smallest ``eta > 0`` with ``L(theta - eta d) >= L(theta)``. The bracket begins at the last point that is
    lower than ``theta``, and ends at the first one that is not; a loss that is NaN is not lower. Beyond the largest
    point the step grows, at least twofold from the second time on, and the bracket is then narrowed to `WIDTH`. Smooth
    losses take two or three points, and none takes more than `MOST`.

    Args:
        loss_at: Returns ``L(theta - eta d)``.
        loss: ``L(theta)``.
        slope: Slope at ``theta``, by which the loss falls at first.
        points: Points of the ray, in any order.
        limit: Largest step size.

    Returns:
        The new points in the order of their evaluation. There are none if the loss does not fall at first, a loss is
        not finite, or the points are a narrow bracket already.

    Examples:
        The loss ``1 - eta + eta^2`` is back at 1:

        >>> [round(eta, 3) for eta, _ in search(lambda eta: 1 - eta + eta**2, 1.0, 1.0, [(0.5, 0.75)])]
        [1.02, 0.98]
    """
    if not (slope > 0 and all(map(math.isfinite, (loss, slope, *(value for _, value in points))))):
        return []
    nearest = min((abs(eta) for eta, _ in points if eta), default=math.nan)
    found: list[Point] = []
    while len(found) < MOST:
        ahead = sorted((eta, value) for eta, value in [*points, *found] if eta > 0)
        eta = _next_step(loss, slope, ahead, len(found)) if ahead else nearest
        if not 0 < eta <= limit:
            break
        found.append((eta, loss_at(eta)))
    return found


def _next_step(loss: float, slope: float, points: Sequence[Point], tries: int) -> float:
    """Return the next step size, NaN for a narrow bracket.

    It is near the critical step of the curve that :class:`landscape.analysis.curve.Curves` draws through the bracket,
    a little to the side that has its larger part.
    """
    (low, at_low), high, at_high = (0.0, math.nan), math.inf, math.nan
    for eta, value in points:
        if not value < loss:
            high, at_high = eta, _bend(eta, value, loss, slope)
            break
        low, at_low = eta, _bend(eta, value, loss, slope)
    margin = 0.4 * WIDTH
    if high == math.inf:
        guess = slope / at_low * (1 + margin) if at_low > 0 else math.inf
        return min(max(guess, 2 * low) if tries else guess, GROWTH * low)
    if high - low <= WIDTH * high:
        return math.nan
    middle = (low + high) / 2
    if tries >= GUESSES or not math.isfinite(at_high):
        return middle
    rise = (at_high - at_low) / (high - low) if low else 0.0
    start = at_high - rise * high
    root = start**2 + 4 * rise * slope
    guess = 2 * slope / (start + math.sqrt(root)) if root > 0 else middle
    guess *= 1 - margin if guess - low > high - guess else 1 + margin
    return guess if low < guess < high else middle


def _bend(eta: float, value: float, loss: float, slope: float) -> float:
    """Return ``(value - loss + eta slope) / eta^2``."""
    return (value - loss + eta * slope) / eta**2
