"""What is tuned and how, and which trainings that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from landscape.errors import LandscapeError
from landscape.training.recipe import Recipe
from landscape.tuning.strategies import STRATEGIES, Configuration, Strategy, run_strategies

MOST_RUNS = 1000
"""Seeds of a configuration: more than anyone trains, and few enough to be listed before the first is trained."""


@dataclass(frozen=True)
class TuningConfig:
    """A search for the best groups of each norm, as in Dimitriou & Arandjelovic 2020, section 3.2, tables 1 and 2."""

    recipe: Recipe
    """What is trained; ``validation`` samples of it are held out to choose by."""
    norms: tuple[str, ...] = ("batch", "ghost", "group", "seq")
    groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Groups G_M of the batch that are tried."""
    channel_groups: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Groups G_C of the channels that are tried."""
    strategy: str = "sequential"
    """One of :data:`landscape.tuning.strategies.STRATEGIES`."""
    tolerance: float = 0.005
    """For ``sequential``: how far below the best mean validation accuracy that of the G_M taken may be."""
    runs: int = 2
    """Trainings of each configuration, with the seeds 0, 1, ..."""

    def strategies(self, possible: Mapping[str, Sequence[Configuration]]) -> dict[str, Strategy]:
        """The strategy of each norm, at its beginning."""
        return {norm: STRATEGIES[self.strategy](possible[norm], self.tolerance) for norm in self.norms}

    def trainings(self, configurations: Sequence[Configuration], whole: bool = False) -> list[Recipe]:
        """The runs of configurations, in their order.

        Args:
            configurations: Each is trained with every seed.
            whole: Whether on what is held out too, as for the test accuracy.
        """
        base = self.recipe
        if whole:
            samples = None if base.train_samples is None else base.train_samples + base.validation
            base = replace(base, validation=0, train_samples=samples)
        return [
            replace(base, norm=each.norm, seed=seed, **each.options)
            for each in configurations
            for seed in range(self.runs)
        ]

    def check(self) -> None:
        """Raise a LandscapeError where a value is out of range."""
        if self.strategy not in STRATEGIES:
            raise LandscapeError(f"Unknown strategy {self.strategy!r}; choose one of {', '.join(STRATEGIES)}.")
        if not 0 <= self.tolerance < 1:
            raise LandscapeError(
                f"tolerance={self.tolerance} is out of range; give a difference of accuracies like 0.005."
            )
        if not 1 <= self.runs <= MOST_RUNS:
            raise LandscapeError(f"runs={self.runs} is out of range; give a whole number from 1 to {MOST_RUNS}.")
        if not self.recipe.validation:
            raise LandscapeError(
                f"The recipe {self.recipe.recipe!r} holds nothing out to choose by; take one whose name begins with "
                "classify, or give it validation samples."
            )


@dataclass(frozen=True)
class TuningPlan:
    """A tuning whose trainings are known to be possible.

    Attributes:
        tuning: What was asked for.
        possible: The configurations of each norm that can be trained.
        impossible: The others, and why.
        samples: How many there are to ``train`` on, for ``validation`` and for the ``test``.
    """

    tuning: TuningConfig
    possible: Mapping[str, tuple[Configuration, ...]]
    impossible: Mapping[Configuration, str]
    samples: Mapping[str, int]

    def tried(self) -> list[Configuration]:
        """The configurations that are tried if all do equally well; as many are tried however they do."""
        tried: dict[Configuration, tuple[float]] = {}

        def evaluate(configurations: Sequence[Configuration]) -> dict[Configuration, tuple[float]]:
            tried.update(dict.fromkeys(configurations, (0.0,)))
            return tried

        run_strategies(self.tuning.strategies(self.possible), evaluate)
        return list(tried)

    def counts(self) -> tuple[int, int]:
        """How many trainings it takes to choose, and how many on the whole training set after that."""
        tested = len(self.tuning.norms) if self.samples["test"] else 0
        return len(self.tried()) * self.tuning.runs, tested * self.tuning.runs
