"""The loss along each ray as a curve through its recorded points."""

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Curves:
    """Losses along rays, one piecewise cubic per update.

    With the slope ``s`` at ``theta``, the change of the loss is::

        L(theta - eta d) - L(theta) = -eta s + eta^2 q(eta)

    where ``q`` is half the mean second derivative, and is known at every recorded step size but 0. Between two of them
    ``q`` is interpolated linearly. Below the smallest it is extrapolated by the two nearest, so ``q(0)`` is half the
    second derivative at ``theta``. So the curve has the recorded loss and slope at ``theta``, passes through every
    recorded point, and is exact where the loss is a cubic polynomial. It is not extrapolated beyond the largest step.

    Attributes:
        knots: 0 and the positive step sizes, ascending, (rows, J + 1); NaN after the last one of a row.
        q: ``q`` at the knots, (rows, J + 1).
        back: True at the knots whose loss is at least ``L(theta)``, (rows, J + 1); False at 0 and at NaN.
        slope: ``s``, (rows,).
    """

    knots: np.ndarray
    q: np.ndarray
    back: np.ndarray
    slope: np.ndarray

    @classmethod
    def through(cls, row: np.ndarray, eta: np.ndarray, value: np.ndarray, loss: np.ndarray, slope: np.ndarray) -> Self:
        """Return the curves through points.

        A row without a step size other than 0, or with a value, loss or slope that is not finite, is NaN.

        Args:
            row: Row of each point, ascending, (P,).
            eta: Step size of each point, (P,).
            value: Loss at each point, (P,).
            loss: Loss at ``theta``, (rows,).
            slope: Slope at ``theta``, (rows,).
        """
        rows = len(loss)
        known = np.isfinite(loss) & np.isfinite(slope)
        known[row[~np.isfinite(value)]] = False
        order = np.lexsort((eta, row))
        row, eta, value = row[order], eta[order], value[order]
        repeated = np.r_[False, (row[1:] == row[:-1]) & (eta[1:] == eta[:-1])] if len(row) else np.zeros(0, bool)
        kept = ~repeated & (eta != 0) & known[row]
        row, eta, value = row[kept], eta[kept], value[kept]
        q = (value - loss[row] + eta * slope[row]) / eta**2
        # Positive steps follow knot 0; the 2 points that give q(0) may be negative.
        negative = np.bincount(row[eta < 0], minlength=rows)
        column = np.arange(len(row)) - np.searchsorted(row, row) - negative[row] + 1
        positive = eta > 0
        knots = np.full((rows, max(column.max(initial=0), 0) + 1), np.nan)
        values, back = knots.copy(), np.zeros(knots.shape, bool)
        at = row[positive], column[positive]
        knots[at], values[at] = eta[positive], q[positive]
        back[at] = (value >= loss[row])[positive]  # Of the losses, because the curve has rounding errors.
        counts = np.bincount(row, minlength=rows)
        held = np.flatnonzero(counts)
        start = np.searchsorted(row, held)
        # The nearest points around 0, or the nearest two on the one side that has points.
        first = start + np.clip(negative[held] - 1, 0, np.maximum(counts[held] - 2, 0))
        second = np.minimum(first + 1, start + counts[held] - 1)
        width = eta[second] - eta[first]
        rise = np.divide(q[second] - q[first], width, out=np.zeros(len(held)), where=width != 0)
        knots[held, 0], values[held, 0] = 0.0, q[first] - eta[first] * rise
        return cls(knots, values, back, slope)

    @property
    def limit(self) -> np.ndarray:
        """Return ``q(0)``, (rows,)."""
        return self.q[:, 0]

    @property
    def largest(self) -> np.ndarray:
        """Return the largest step size, (rows,), or NaN."""
        return np.fmax.reduce(self.knots, axis=1)

    def q_at(self, eta: np.ndarray) -> np.ndarray:
        """Return ``q`` at one step size per row.

        Args:
            eta: Step sizes, (rows,).

        Returns:
            (rows,); NaN at a step size of 0 or less, or beyond the largest recorded one.
        """
        largest = self.largest
        eta = np.where(np.isclose(eta, largest, rtol=1e-9, atol=0), largest, eta)
        columns = self.knots.shape[1]
        if columns < 2:
            return np.full(len(eta), np.nan)
        right = np.clip((self.knots < eta[:, None]).sum(1), 1, columns - 1)
        rows = np.arange(len(eta))
        low, high = self.knots[rows, right - 1], self.knots[rows, right]
        weight = (eta - low) / (high - low)
        inside = (eta > 0) & (eta <= largest)
        return np.where(inside, (1 - weight) * self.q[rows, right - 1] + weight * self.q[rows, right], np.nan)

    def change(self, eta: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the change of the loss for linear ``q``."""
        return eta * (eta * (a + b * eta) - self.slope[:, None])

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``a`` and ``b`` between knots.

        There ``q = a + b eta``; both are (rows, J).
        """
        b = np.diff(self.q, axis=1) / np.diff(self.knots, axis=1)
        return self.q[:, :-1] - b * self.knots[:, :-1], b

    def optimal_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the best step size, and True if inside.

        Returns:
            ``argmin L(theta - eta d)`` over ``0 <= eta <= largest``, (rows,), and False where it is the largest step
            size, so the minimum may lie beyond, (rows,).
        """
        a, b = self.pieces()
        inner = self._inside(_roots(3 * b, 2 * a, -self.slope[:, None]))
        lowest = [self.change(steps, a, b) for steps in inner]
        at_knots = self.knots * (self.knots * self.q - self.slope[:, None])
        steps = np.concatenate([self.knots, *inner], axis=1)
        return self._first_smallest(steps, np.concatenate([at_knots, *lowest], axis=1))

    def _first_smallest(self, steps: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = self.largest > 0
        best = np.argmin(np.where(np.isnan(changes), np.inf, changes), axis=1)
        step = np.where(known, steps[np.arange(len(steps)), best], np.nan)
        return step, step < self.largest

    def critical_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the critical step size, and True if inside.

        Returns:
            Smallest ``eta > 0`` with ``L(theta - eta d) >= L(theta)``, (rows,), or the largest step size if the loss is
            lower up to there; and False for the latter, where the value is a lower bound (right-censored), (rows,).
            The step is 0 where the loss does not fall at first.
        """
        a, b = self.pieces()
        crossings = self._inside(_roots(b, a, -self.slope[:, None]))
        steps = np.concatenate([np.where(self.back, self.knots, np.nan), *crossings], axis=1)
        first = np.fmin.reduce(steps, axis=1, initial=np.inf)
        first[(self.slope < 0) | ((self.slope == 0) & (self.limit >= 0))] = 0.0
        inside = np.isfinite(first)
        step = np.where(inside, first, self.largest)
        known = self.largest > 0
        return np.where(known, step, np.nan), inside & known

    def _inside(self, steps: list[np.ndarray]) -> list[np.ndarray]:
        low, high = self.knots[:, :-1], self.knots[:, 1:]
        return [np.where((step > low) & (step <= high), step, np.nan) for step in steps]


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """Return both roots of a quadratic, without cancellation."""
    term = -(b + np.copysign(np.sqrt(b**2 - 4 * a * c), b)) / 2
    return [term / a, c / term]
