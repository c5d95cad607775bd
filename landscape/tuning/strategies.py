"""Which configurations of a norm are tried, and which of them is chosen: pure logic on scores.

A strategy is a generator. It yields the configurations whose scores it wants next, is sent the scores of all of them,
and returns the configuration it chooses, or None where every run diverged.
"""

import math
import statistics
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from landscape.names import NORMS, options_of


@dataclass(frozen=True)
class Configuration:
    """A norm with the groups that make a variant of it; None where the norm does not take that option."""

    norm: str
    channel_groups: int | None = None
    groups: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The options that the norm takes, such as ``{"groups": 16}``."""
        return {name: getattr(self, name) for name in options_of(self.norm)}

    def __str__(self) -> str:
        symbols = NORMS[self.norm].symbols
        values = ", ".join(f"{symbols[name]}={value}" for name, value in self.options.items())
        return f"{NORMS[self.norm].title} ({values})" if values else NORMS[self.norm].title


Scores = Mapping[Configuration, Sequence[float]]
"""The validation accuracies of each configuration, one per run; NaN where a run diverged."""
Strategy = Generator[Sequence[Configuration], Scores, Configuration | None]


def candidates(norm: str, channel_groups: Iterable[int], groups: Iterable[int]) -> tuple[Configuration, ...]:
    """Every configuration of a norm, each once; values of options that it does not take are left aside."""
    values = {"channel_groups": channel_groups, "groups": groups}
    names = options_of(norm)
    combinations = product(*(tuple(dict.fromkeys(values[name])) for name in names))
    return tuple(Configuration(norm, **dict(zip(names, combination, strict=True))) for combination in combinations)


def best(scores: Scores) -> Configuration | None:
    """The configuration with the highest mean; of equal means the one with the smaller variance, then the first.

    The rule of Dimitriou & Arandjelovic 2020, section 3.2. A configuration with a run that diverged is never chosen.
    """
    finished = {configuration: runs for configuration, runs in scores.items() if _finite(runs)}
    return max(finished, key=lambda each: (_mean(finished[each]), -_variance(finished[each])), default=None)


def most_groups(scores: Scores, tolerance: float) -> int | None:
    """The largest G_M whose mean score is at most ``tolerance`` below the best one."""
    winner = best(scores)
    if winner is None:
        return None
    least = round(_mean(scores[winner]) - tolerance, 9)  # so that a mean at just this distance is within it
    return max(each.groups or 1 for each, runs in scores.items() if _finite(runs) and _mean(runs) >= least)


def grid(configurations: Sequence[Configuration], tolerance: float = 0.0) -> Strategy:
    """Try every configuration of a norm, and choose the best: Theta(G_C * G_M) of them for SeqNorm."""
    return best((yield configurations))


def sequential(configurations: Sequence[Configuration], tolerance: float) -> Strategy:
    """For a norm with groups of both kinds G_M first, on GhostNorm alone, then G_C: Theta(G_C + G_M) configurations.

    Dimitriou & Arandjelovic 2020, section 3.2: of the G_M that do about as well as the best one the largest is taken.
    For a norm with fewer options this is :func:`grid`.

    Args:
        configurations: All that may be tried, of one norm.
        tolerance: How far below the best mean validation accuracy of GhostNorm that of the G_M taken may be, 0 to 1.
    """
    if not configurations or len(configurations[0].options) < 2:
        return (yield from grid(configurations))
    ghosts = [Configuration("ghost", groups=groups) for groups in dict.fromkeys(each.groups for each in configurations)]
    groups = most_groups((yield ghosts), tolerance)
    return (yield from grid([each for each in configurations if each.groups == groups])) if groups else None


STRATEGIES: dict[str, Callable[[Sequence[Configuration], float], Strategy]] = {"grid": grid, "sequential": sequential}
"""The strategies by name; each is called with the configurations that may be tried and the tolerance."""


def run_strategies(
    strategies: Mapping[str, Strategy], evaluate: Callable[[Sequence[Configuration]], Scores]
) -> dict[str, Configuration | None]:
    """Follow several strategies side by side to their choices.

    Args:
        strategies: By name.
        evaluate: Gives the scores of the configurations it is called with: what all strategies ask for next, each once.
    """
    asked: dict[str, Sequence[Configuration]] = {}
    chosen: dict[str, Configuration | None] = {}

    def go_on(name: str, scores: Scores | None) -> None:
        try:
            asked[name] = next(strategies[name]) if scores is None else strategies[name].send(scores)
        except StopIteration as end:
            asked.pop(name, None)
            chosen[name] = end.value

    for name in strategies:
        go_on(name, None)
    while asked:
        scores = evaluate(tuple(dict.fromkeys(each for wanted in asked.values() for each in wanted)))
        for name, wanted in list(asked.items()):
            go_on(name, {each: scores[each] for each in wanted})
    return {name: chosen[name] for name in strategies}


def _finite(runs: Sequence[float]) -> bool:
    return len(runs) > 0 and all(math.isfinite(run) for run in runs)


def _mean(runs: Sequence[float]) -> float:
    return round(statistics.fmean(_rounded(runs)), 9)


def _variance(runs: Sequence[float]) -> float:
    return round(statistics.pvariance(_rounded(runs)), 12)


def _rounded(runs: Sequence[float]) -> list[float]:
    """Equal accuracies as equal numbers: they come as float32, and where they differ it is by 1e-5 or more."""
    return [round(run, 6) for run in runs]
