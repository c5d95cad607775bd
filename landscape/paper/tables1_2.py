"""Tables 1 and 2: the recipe, the numbers of groups and the title of each."""

from dataclasses import dataclass

from landscape.training.presets import RECIPES
from landscape.training.recipe import Recipe


@dataclass(frozen=True)
class TablePreset:
    """Settings of a table (arXiv:2007.08554, section 3.2).

    Attributes:
        recipe: Training recipe.
        title: First sentence of the report.
        groups: Values to try for the groups G_M of the batch.
        channel_groups: Values to try for the groups G_C of the channels.
        strategy: Name of the strategy that selects which are trained.
        runs: Trainings per configuration.

    Examples:
        >>> table = TABLES["1", "paper"]
        >>> table.recipe.dataset, table.recipe.devices, table.groups
        ('cifar100', 8, (2, 4, 8, 16, 32))
    """

    recipe: Recipe
    title: str
    groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    channel_groups: tuple[int, ...] = (1, 2, 4, 8, 16)
    strategy: str = "sequential"
    runs: int = 2


_SMALL = {"groups": (2, 4, 8, 16), "channel_groups": (2, 4, 8), "runs": 3}
TABLES = {
    ("1", "paper"): TablePreset(
        RECIPES["classify-cifar100"], "Table 1: classification of CIFAR-100, WideResNet-28-10.", strategy="grid"
    ),
    ("2", "paper"): TablePreset(RECIPES["classify-cifar10"], "Table 2: classification of CIFAR-10, WideResNet-28-10."),
    ("1", "small"): TablePreset(
        RECIPES["classify-mnist"],
        "Table 1 at a scale for a CPU: SimpleNet on MNIST instead of WideResNet-28-10 on CIFAR-100.",
        strategy="grid",
        **_SMALL,
    ),
    ("2", "small"): TablePreset(
        RECIPES["classify-cifar10-small"],
        "Table 2 at a scale for a CPU: ResNet-20 on part of CIFAR-10, 16 x 16 pixels, instead of WideResNet-28-10.",
        **_SMALL,
    ),
}
"""Presets by number and scale of the table."""
