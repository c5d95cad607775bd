"""Coverage of intervals over a few seeds: ``python -m benchmarks.coverage``.

No training and no timing: seeds are drawn from known distributions, and the intervals are those of `landscape.compare`,
beside the percentile bootstrap that is in common use.
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from landscape.analysis.statistics import ratio

TRUE_RATIO = 1.5
RESAMPLES = 1000
SEEDS = (3, 5, 10)


def draw(kind: str, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values of two norms at n seeds.

    The third array are values of the second norm at n other seeds; each is (n,).

    A seed's own part, with a deviation of 0.3 in the logarithm, is shared by both norms. The rest has one of 0.2, or
    twice as much for one norm.

    Args:
        kind: ``"normal"``, ``"skewed"`` (exponential) or ``"unequal"`` (normal, with two deviations).
        n: Number of seeds.
        generator: Random numbers.
    """
    shared, other = generator.normal(0, 0.3, (2, n))
    noise = generator.normal(0, 1, (2, n)) if kind != "skewed" else generator.exponential(1, (2, n)) - 1
    if kind == "skewed":
        noise[1] = 0  # The difference of two equal skewed values is symmetric.
    deviations = np.array([0.2, 0.4 if kind == "unequal" else 0.2])
    a, b = deviations[:, None] * noise
    return TRUE_RATIO * np.exp(shared + a), np.exp(shared + b), np.exp(other + b)


def paired_t(a: np.ndarray, b: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the interval of landscape.compare for seeds that pair."""
    result = ratio(a, b, paired=True)
    return result.low, result.high


def welch_t(a: np.ndarray, b: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the interval of landscape.compare for other seeds."""
    result = ratio(a, other, paired=False)
    return result.low, result.high


def bootstrap(a: np.ndarray, b: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the percentile bootstrap of the paired log ratios."""
    differences = np.log(a / b)
    means = differences[generator.integers(len(a), size=(RESAMPLES, len(a)))].mean(1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(low), float(high)


METHODS: dict[str, Callable[..., tuple[float, float]]] = {
    "paired t": paired_t,
    "Welch's t": welch_t,
    "percentile bootstrap": bootstrap,
}


def measure(simulations: int) -> list[dict[str, str | int | float]]:
    """Return coverage and median width of each interval.

    Args:
        simulations: Number of comparisons per distribution and number of seeds.
    """
    rows = []
    for kind in ("normal", "skewed", "unequal"):
        for n in SEEDS:
            generator = np.random.default_rng(n)
            drawn = [draw(kind, n, generator) for _ in range(simulations)]
            for name, interval in METHODS.items():
                ends = np.array([interval(*values, generator) for values in drawn])
                covered = np.mean((ends[:, 0] <= TRUE_RATIO) & (ends[:, 1] >= TRUE_RATIO))
                width = np.median(ends[:, 1] / ends[:, 0])
                rows.append(
                    {"values": kind, "seeds": n, "interval": name, "coverage": round(float(covered), 3)}
                    | {"high / low": round(float(width), 2)}
                )
    return rows


@click.command()
@click.option("--simulations", default=4000, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the numbers to a file.")
def main(simulations: int, path: Path | None) -> None:
    """Print how often 95 % intervals cover the true ratio."""
    rows = measure(simulations)
    for row in rows:
        click.echo("  ".join(str(value).ljust(20) for value in row.values()).rstrip())
    if path:
        path.write_text(json.dumps({"simulations": simulations, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
