from dataclasses import replace

import pytest

from landscape import RECIPES, Recipe, UserError


def test_names_of_runs_tell_variants_apart():
    recipe = RECIPES["mnist"]
    assert recipe.run == "mnist-batch-seed0"
    assert replace(recipe, norm="ghost", groups=128, seed=2).run == "mnist-ghost128-seed2"
    assert replace(recipe, norm="seq", channel_groups=4, groups=16).run == "mnist-seq4-16-seed0"


def test_options_that_the_norm_does_not_take_are_dropped():
    recipe = RECIPES["digits"]
    assert (recipe.checked().groups, recipe.checked().channel_groups) == (None, None)
    ghost = replace(recipe, norm="ghost").checked()
    assert (ghost.groups, ghost.channel_groups) == (16, None)


def test_the_papers_settings():
    recipe: Recipe = RECIPES["mnist"]
    assert (recipe.batch_size, recipe.lr) == (512, 0.4)
    assert recipe.probe_lrs == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"every": 0}, "every=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"norm": "bath"}, "Unknown norm 'bath'; choose one of none, batch, ghost"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        replace(RECIPES["digits"], **change).checked()
