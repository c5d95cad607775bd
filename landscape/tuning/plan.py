"""Configuration of a search, and the trainings that it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from landscape.errors import LandscapeError
from landscape.training.recipe import Recipe
from landscape.tuning.strategies import STRATEGIES, Configuration, Scores, run_strategy

MOST_RUNS = 1000
"""Maximum number of seeds, since all trainings are listed before the first one starts."""


@dataclass(frozen=True)
class TuningConfig:
    """Search for the best numbers of groups of each norm.

    The search of Dimitriou & Arandjelovic (arXiv:2007.08554, section 3.2, tables 1 and 2): configurations are compared
    by validation accuracy, and the best one of each norm is trained on the whole training set for its test accuracy.

    Attributes:
        recipe: Training recipe; ``recipe.validation`` samples are held out to compare configurations.
        norms: Names of the norms, as for :func:`landscape.make_norm`.
        groups: Values to try for the groups G_M of the batch, for norms with that option.
        channel_groups: Values to try for the groups G_C of the channels, for norms with that option.
        strategy: Name of one of :data:`landscape.tuning.strategies.STRATEGIES`.
        tolerance: For ``strategy="sequential"``: largest allowed difference (0 to 1) of the mean validation accuracy of
            the selected G_M from the best one.
        runs: Trainings per configuration, with the seeds 0, 1, ..., ``runs - 1``.

    Examples:
        >>> from landscape import RECIPES
        >>> tuning = TuningConfig(RECIPES["classify-digits"], norms=("ghost",), groups=(2, 4))
        >>> [recipe.run_name for recipe in tuning.trainings([Configuration("ghost", groups=4)])]
        ['classify-digits-ghost4-seed0', 'classify-digits-ghost4-seed1']
    """

    recipe: Recipe
    norms: tuple[str, ...] = ("batch", "ghost", "group", "seq")
    groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    channel_groups: tuple[int, ...] = (1, 2, 4, 8, 16)
    strategy: str = "sequential"
    tolerance: float = 0.005
    runs: int = 2

    def trainings(self, configurations: Sequence[Configuration], whole: bool = False) -> list[Recipe]:
        """Return the recipes of configurations, each with every seed.

        Args:
            configurations: Configurations to train.
            whole: Train on the held-out samples too, for the test accuracy.
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
        """Raise a LandscapeError if a value is out of range."""
        if self.strategy not in STRATEGIES:
            raise LandscapeError(f"strategy={self.strategy!r}: unknown strategy. Use {' or '.join(STRATEGIES)}.")
        if not 0 <= self.tolerance < 1:
            raise LandscapeError(
                f"tolerance={self.tolerance}: must be a difference of accuracies from 0 to 1, such as 0.005."
            )
        if not 1 <= self.runs <= MOST_RUNS:
            raise LandscapeError(f"runs={self.runs}: must be a whole number of seeds from 1 to {MOST_RUNS}.")
        if not self.recipe.validation:
            raise LandscapeError(
                f"recipe={self.recipe.name!r}: must hold out samples for validation. Use a recipe whose name begins "
                "with classify, or set its validation."
            )


@dataclass(frozen=True)
class TuningPlan:
    """Search with the configurations that can be trained.

    Attributes:
        tuning: Configuration of the search.
        possible: Configurations that can be trained, by norm.
        impossible: Configurations that cannot be trained, with the reason.
        samples: Numbers of samples: ``{"train": ..., "validation": ..., "test": ...}``.

    Examples:
        >>> from landscape import RECIPES
        >>> from landscape.tuning.feasibility import check_feasible
        >>> plan = check_feasible(TuningConfig(RECIPES["classify-digits"], norms=("ghost", "seq"), groups=(2, 4)))
        >>> [str(each) for each in plan.tried()[:4]]
        ['GhostNorm (G=2)', 'GhostNorm (G=4)', 'SeqNorm (G_C=1, G_M=4)', 'SeqNorm (G_C=2, G_M=4)']
        >>> plan.counts()
        (10, 4)
    """

    tuning: TuningConfig
    possible: Mapping[str, tuple[Configuration, ...]]
    impossible: Mapping[Configuration, str]
    samples: Mapping[str, int]

    def choose(self, train: Callable[[Sequence[Configuration]], Scores]) -> dict[str, Configuration | None]:
        """Choose a configuration of each norm by the strategy.

        Args:
            train: Returns the validation accuracies of the configurations that it is called with.

        Returns:
            The best configuration by norm; None if each one tried has a diverged run.
        """
        return run_strategy(STRATEGIES[self.tuning.strategy], self.possible, self.tuning.tolerance, train)

    def tried(self) -> list[Configuration]:
        """Return the configurations tried if all score equally.

        Scores may change which configurations are tried, but not their number.
        """
        tried: dict[Configuration, tuple[float]] = {}

        def train(configurations: Sequence[Configuration]) -> Scores:
            tried.update(dict.fromkeys(configurations, (0.0,)))
            return tried

        self.choose(train)
        return list(tried)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of trainings for choosing and testing."""
        tested = len(self.tuning.norms) if self.samples["test"] else 0
        return len(self.tried()) * self.tuning.runs, tested * self.tuning.runs
