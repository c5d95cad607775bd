"""Configurations of a norm, and strategies that select which of them are trained."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from landscape.names import NORMS, options_of


@dataclass(frozen=True)
class Configuration:
    """A norm with its numbers of groups.

    Attributes:
        norm: Name of the norm, as for :func:`landscape.make_norm`.
        channel_groups: Groups G_C of the channels; None if the norm has no such option.
        groups: Groups G_M of the batch; None if the norm has no such option.

    Examples:
        >>> configuration = Configuration("seq", channel_groups=2, groups=8)
        >>> print(configuration)
        SeqNorm (G_C=2, G_M=8)
        >>> configuration.options
        {'channel_groups': 2, 'groups': 8}
    """

    norm: str
    channel_groups: int | None = None
    groups: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of the norm, such as ``{"groups": 16}``."""
        return {name: getattr(self, name) for name in options_of(self.norm)}

    def __str__(self) -> str:
        symbols = NORMS[self.norm].symbols
        values = ", ".join(f"{symbols[name]}={value}" for name, value in self.options.items())
        return f"{NORMS[self.norm].title} ({values})" if values else NORMS[self.norm].title


Scores = Mapping[Configuration, Sequence[float]]
"""Validation accuracies (0 to 1) of each configuration, one per run; NaN if a run diverged."""
Strategy = Callable[[Sequence[Configuration], Scores, float], Sequence[Configuration]]
"""Function (configurations of a norm, scores up to now, tolerance) -> configurations to choose from.

If some of the returned configurations have no scores yet, they are trained and the function is called again.
"""


def candidates(norm: str, channel_groups: Iterable[int], groups: Iterable[int]) -> tuple[Configuration, ...]:
    """Return every configuration of a norm, without duplicates.

    Args:
        norm: Name of the norm.
        channel_groups: Values of G_C, unused if the norm has no such option.
        groups: Values of G_M, unused if the norm has no such option.

    Raises:
        LandscapeError: The norm is unknown.

    Examples:
        >>> [str(each) for each in candidates("ghost", channel_groups=[1, 2], groups=[4, 8])]
        ['GhostNorm (G=4)', 'GhostNorm (G=8)']
    """
    values = {"channel_groups": channel_groups, "groups": groups}
    names = options_of(norm)
    combinations = product(*(tuple(dict.fromkeys(values[name])) for name in names))
    return tuple(Configuration(norm, **dict(zip(names, combination, strict=True))) for combination in combinations)


def best(scores: Scores) -> Configuration | None:
    """Return the configuration with the highest mean score.

    Of means that are equal in a tenth of a percent, as they are printed, the one with the smaller variance wins, then
    the first (Dimitriou & Arandjelovic, arXiv:2007.08554, section 3.2). A configuration with a diverged run is never
    chosen; None if every configuration has one.

    Examples:
        >>> g4, g8 = candidates("ghost", [], [4, 8])
        >>> print(best({g4: [0.90, 0.94], g8: [0.91, 0.93]}))
        GhostNorm (G=8)
    """
    finished = {configuration: runs for configuration, runs in scores.items() if _finite(runs)}
    return max(finished, key=lambda each: (round(_mean(finished[each]), 3), -_variance(finished[each])), default=None)


def most_groups(scores: Scores, tolerance: float) -> int | None:
    """Return the largest G_M within the tolerance of the best.

    Args:
        scores: Scores of configurations that differ in ``groups``.
        tolerance: Largest allowed difference from the best mean score, in the unit of the scores.

    Returns:
        The largest ``groups`` with mean score >= best mean score - tolerance; None if every configuration diverged.

    Examples:
        >>> g4, g8, g16 = candidates("ghost", [], [4, 8, 16])
        >>> most_groups({g4: [0.950], g8: [0.946], g16: [0.920]}, tolerance=0.005)
        8
    """
    means = {each.groups or 1: _mean(runs) for each, runs in scores.items() if _finite(runs)}
    # Rounding keeps a mean at exactly this distance within the tolerance: 0.9996 - 0.1 > 0.8996 as floats.
    return max(
        (groups for groups, mean in means.items() if mean >= round(max(means.values()) - tolerance, 9)), default=None
    )


def grid(configurations: Sequence[Configuration], scores: Scores, tolerance: float) -> Sequence[Configuration]:
    """Select every configuration: G_C * G_M of them for SeqNorm."""
    return configurations


def sequential(configurations: Sequence[Configuration], scores: Scores, tolerance: float) -> Sequence[Configuration]:
    """Select G_M on GhostNorm first, then every G_C with it.

    This takes G_M + G_C configurations instead of G_M * G_C: of the G_M whose mean accuracy on GhostNorm is within the
    tolerance of the best, the largest is used (Dimitriou & Arandjelovic, arXiv:2007.08554, section 3.2). For a norm
    with fewer than two options this is :func:`grid`.

    Args:
        configurations: Configurations of one norm that can be trained.
        scores: Scores of the configurations that have been trained up to now.
        tolerance: Largest allowed difference of mean validation accuracies on GhostNorm, 0 to 1.

    Returns:
        GhostNorm with each G_M until these have scores, then the configurations with the selected G_M, which are none
        if GhostNorm diverged with every G_M.
    """
    if not configurations or len(configurations[0].options) < 2:
        return configurations
    ghosts = [Configuration("ghost", groups=groups) for groups in dict.fromkeys(each.groups for each in configurations)]
    if not all(ghost in scores for ghost in ghosts):
        return ghosts
    groups = most_groups({ghost: scores[ghost] for ghost in ghosts}, tolerance)
    return [each for each in configurations if each.groups == groups]


STRATEGIES: dict[str, Strategy] = {"grid": grid, "sequential": sequential}
"""Strategies by name."""


def run_strategy(
    strategy: Strategy,
    possible: Mapping[str, Sequence[Configuration]],
    tolerance: float,
    train: Callable[[Sequence[Configuration]], Scores],
) -> dict[str, Configuration | None]:
    """Choose a configuration of each norm by a strategy.

    Norms are searched at the same time: what any of them needs next is trained together, each configuration once.

    Args:
        strategy: One of :data:`STRATEGIES`.
        possible: Configurations that can be trained, by norm.
        tolerance: Largest allowed difference of mean scores, for :func:`sequential`.
        train: Returns the scores of the configurations that it is called with.

    Returns:
        The best of the selected configurations by norm; None if each of them has a diverged run.

    Examples:
        >>> possible = {norm: candidates(norm, [1, 4], [2, 8]) for norm in ("ghost", "seq")}
        >>> def train(configurations):
        ...     print(*configurations, sep=", ")
        ...     return {each: [0.9 + 0.01 * each.groups] for each in configurations}
        >>> chosen = run_strategy(sequential, possible, 0.005, train)
        GhostNorm (G=2), GhostNorm (G=8)
        SeqNorm (G_C=1, G_M=8), SeqNorm (G_C=4, G_M=8)
        >>> print(chosen["ghost"], chosen["seq"], sep=", ")
        GhostNorm (G=8), SeqNorm (G_C=1, G_M=8)
    """
    scores: dict[Configuration, Sequence[float]] = {}
    while True:
        selected = {norm: strategy(configurations, scores, tolerance) for norm, configurations in possible.items()}
        missing = dict.fromkeys(each for wanted in selected.values() for each in wanted if each not in scores)
        if not missing:
            return {norm: best({each: scores[each] for each in wanted}) for norm, wanted in selected.items()}
        scores |= train(tuple(missing))


def _finite(runs: Sequence[float]) -> bool:
    return len(runs) > 0 and all(math.isfinite(run) for run in runs)


def _mean(runs: Sequence[float]) -> float:
    return round(statistics.fmean(_rounded(runs)), 9)


def _variance(runs: Sequence[float]) -> float:
    return round(statistics.pvariance(_rounded(runs)), 12)


def _rounded(runs: Sequence[float]) -> list[float]:
    # Accuracies come as float32, and differ by 1e-5 or more unless they are equal.
    return [round(run, 6) for run in runs]
