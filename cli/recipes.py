"""``landscape recipes``: the recipes by name."""

import click

from landscape.names import TITLES
from landscape.training.presets import RECIPES

from .output import aligned, echo
from .params import Command


@click.command("recipes", cls=Command)
def command() -> None:
    """List the recipes of --recipe."""
    lines = []
    for name, recipe in RECIPES.items():
        samples = "" if recipe.train_samples is None else f" ({recipe.train_samples:,} images)"
        model, data = (TITLES.get(each, each) for each in (recipe.model, recipe.dataset))
        training = (
            f"{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.schedule} learning rate {recipe.lr:g}"
        )
        lines.append([name, model, data + samples, training])
    echo(aligned(["recipe", "model", "data", "training"], lines))
