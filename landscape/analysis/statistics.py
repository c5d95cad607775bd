"""Statistics of a few seeds: ratios with intervals, effect sizes, corrections, and numbers of seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

PAIRED, WELCH, SINGLE = "paired t", "Welch's t", "one seed"
"""Methods of an interval; of one seed there is none."""
BOOTSTRAP_SEEDS = 10
"""Fewest seeds of a bootstrap interval; with fewer it is far too short."""


class Ratio(NamedTuple):
    """Ratio of two groups of seeds.

    Attributes:
        ratio: Ratio of the geometric means.
        low: Lower end of its confidence interval, or NaN.
        high: Upper end of its confidence interval, or NaN.
        p: Two-sided p value of a ratio of 1, or NaN.
        method: ``"paired t"``, ``"Welch's t"`` or ``"one seed"``.
        deviation: Standard deviation of the logarithm of the ratio of two seeds: of the same one if they are paired,
            of independent ones otherwise. NaN for one seed.
    """

    ratio: float
    low: float
    high: float
    p: float
    method: str
    deviation: float


def ratio(values: np.ndarray, reference: np.ndarray, paired: bool, confidence: float = 0.95) -> Ratio:
    """Return the ratio of two groups of positive values.

    A t interval on the logarithm of the ratio, exponentiated: over the differences of the pairs, or Welch's for two
    groups whose variances differ.

    Args:
        values: One positive value per seed, (n,).
        reference: Likewise, (m,); in the order of ``values`` if they are paired.
        paired: True if the values of one seed belong together, and n = m.
        confidence: Probability that the interval covers the ratio.

    Examples:
        >>> result = ratio(np.array([2.0, 4.4, 9.0]), np.array([1.0, 2.0, 4.0]), paired=True)
        >>> [round(value, 3) for value in result[:4]], result.method
        ([2.147, 1.838, 2.508, 0.002], 'paired t')
    """
    center, low, high, p, method, deviation = difference(np.log(values), np.log(reference), paired, confidence)
    return Ratio(float(np.exp(center)), float(np.exp(low)), float(np.exp(high)), p, method, deviation)


class Difference(NamedTuple):
    """Difference of two groups, with the attributes of `Ratio`."""

    difference: float
    low: float
    high: float
    p: float
    method: str
    deviation: float


def difference(values: np.ndarray, reference: np.ndarray, paired: bool, confidence: float = 0.95) -> Difference:
    """Return the difference of the means of two groups.

    A t interval: over the differences of the pairs, or Welch's for two groups whose variances differ.

    Args:
        values: One value per seed, (n,).
        reference: Likewise, (m,); in the order of ``values`` if they are paired.
        paired: True if the values of one seed belong together, and n = m.
        confidence: Probability that the interval covers the difference.

    Examples:
        >>> result = difference(np.array([2.0, 3.0, 4.5]), np.array([1.0, 2.0, 3.0]), paired=True)
        >>> [round(value, 2) for value in result[:3]]
        [1.17, 0.45, 1.88]
    """
    a, b = values, reference
    center = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(center, np.nan, np.nan, np.nan, SINGLE, np.nan)
    if paired:
        variances, counts = [np.var(a - b, ddof=1)], [len(a)]
    else:
        variances, counts = [np.var(a, ddof=1), np.var(b, ddof=1)], [len(a), len(b)]
    parts = [variance / count for variance, count in zip(variances, counts, strict=True)]
    error = math.sqrt(sum(parts))
    weights = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    freedom = sum(parts) ** 2 / weights if weights else min(counts) - 1
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(center) / error, freedom)) if error else float(center == 0)
    deviation = math.sqrt(variances[0] if paired else sum(variances))
    return Difference(center, center - half, center + half, p, PAIRED if paired else WELCH, deviation)


def bootstrap_interval(
    values: np.ndarray, reference: np.ndarray, paired: bool, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the BCa bootstrap interval of a ratio.

    It assumes no distribution, and so checks the t interval of :func:`ratio` (Efron 1987).

    Args:
        values: One positive value per seed, (n,).
        reference: Likewise, (m,); in the order of ``values`` if they are paired.
        paired: True if the values of one seed belong together, and n = m.
        confidence: Probability that the interval covers the ratio.

    Returns:
        Its ends, NaN below `BOOTSTRAP_SEEDS` seeds.

    Examples:
        >>> values = np.exp(np.linspace(0.1, 0.5, 12))
        >>> [round(end, 2) for end in bootstrap_interval(values, np.ones(12), paired=True)]
        [1.26, 1.45]
    """
    a, b = np.log(values), np.log(reference)
    if min(len(a), len(b)) < BOOTSTRAP_SEEDS:
        return np.nan, np.nan
    samples = (a - b,) if paired else (a, b)
    center = float(a.mean() - b.mean())
    if all(np.ptp(sample) < 1e-12 for sample in samples):  # The bootstrap has no interval of equal values.
        return math.exp(center), math.exp(center)

    def statistic(*parts: np.ndarray, axis: int) -> np.ndarray:
        means = [part.mean(axis) for part in parts]
        return means[0] if paired else means[0] - means[1]

    generator = np.random.default_rng(0)
    interval = stats.bootstrap(samples, statistic, confidence_level=confidence, method="BCa", rng=generator)
    return float(np.exp(interval.confidence_interval.low)), float(np.exp(interval.confidence_interval.high))


def smallest_p(n: int, m: int, paired: bool) -> float:
    """Return the smallest p of an exact two-sided test.

    A test without an assumption about the distribution cannot go lower: of the signs of n differences, or of the ways
    to divide n + m values into two groups.

    Examples:
        >>> smallest_p(3, 3, paired=True), smallest_p(6, 6, paired=True), smallest_p(3, 3, paired=False)
        (0.25, 0.03125, 0.1)
    """
    return min(1.0, 2 / 2**n if paired else 2 / math.comb(n + m, n))


def superiority(values: np.ndarray, reference: np.ndarray) -> float:
    """Return the probability that a value exceeds a reference.

    It is over all n m pairs, and ties count half (Vargha & Delaney 2000): 0.5 is no difference.

    Examples:
        >>> superiority(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
        0.875
    """
    differences = np.sign(values[:, None] - reference[None, :])
    return float((differences.mean() + 1) / 2)


def holm(p: Sequence[float]) -> np.ndarray:
    """Return p values after Holm's correction.

    The i-th smallest of k is multiplied by ``k + 1 - i``, and is at least the one before (Holm 1979). NaN is no test.

    Examples:
        >>> holm([0.01, 0.04, 0.03, float("nan")]).tolist()
        [0.03, 0.06, 0.06, nan]
    """
    values = np.array(p, float)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    values[order] = np.minimum(1, np.maximum.accumulate(values[order] * factors))
    return values


def seeds_needed(deviation: float, target: float = 1.2, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return the number of paired seeds that resolves a ratio.

    Args:
        deviation: Standard deviation of the logarithm of the ratio of one pair.
        target: Ratio to resolve.
        power: Probability that the paired t test finds it.
        alpha: Level of the test, two-sided.

    Returns:
        The smallest number, or None if it exceeds 1,000 or the deviation is not finite.

    Examples:
        >>> [seeds_needed(deviation) for deviation in (0.05, 0.1, 0.2)]
        [3, 5, 12]
    """
    if not math.isfinite(deviation):
        return None
    if deviation == 0:
        return 2
    n = np.arange(2, 1001)
    limit = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = math.log(target) / deviation * np.sqrt(n)
    # Beyond 30 standard errors the power is 1, where the distribution function may be NaN.
    reached = np.where(shift > 30, 1.0, stats.nct.sf(limit, n - 1, np.minimum(shift, 30)))
    enough = np.flatnonzero(reached >= power)
    return int(n[enough[0]]) if len(enough) else None
