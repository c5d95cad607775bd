from dataclasses import replace

import pytest

from landscape import RECIPES, LandscapeError, Recipe


def test_names_of_runs_tell_variants_apart():
    recipe = RECIPES["mnist"]
    assert recipe.run_name == "mnist-batch-seed0"
    assert replace(recipe, norm="ghost", groups=128, seed=2).run_name == "mnist-ghost128-seed2"
    assert replace(recipe, norm="seq", channel_groups=4, groups=16).run_name == "mnist-seq4-16-seed0"


def test_options_that_the_norm_does_not_take_are_dropped():
    recipe = RECIPES["digits"]
    assert (recipe.resolve().groups, recipe.resolve().channel_groups) == (None, None)
    ghost = replace(recipe, norm="ghost").resolve()
    assert (ghost.groups, ghost.channel_groups) == (16, None)


def test_the_papers_settings():
    recipe: Recipe = RECIPES["mnist"]
    assert (recipe.batch_size, recipe.lr) == (512, 0.4)
    assert recipe.probe_lrs == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def test_the_papers_settings_on_cifar():
    recipe = RECIPES["cifar10"]
    assert (recipe.batch_size, recipe.lr_start, recipe.lr, recipe.lr_end) == (512, 0.1, 3.0, 1e-4)
    assert recipe.relative
    rates = [(recipe.lr_start * multiple, recipe.lr * multiple) for multiple in recipe.probe_lrs]
    assert rates == [pytest.approx(pair) for pair in ((0.05, 1.5), (0.1, 3), (0.15, 4.5), (0.2, 6))]
    assert replace(recipe, norm="none").resolve().lr == 1.0
    assert replace(recipe, norm="ghost", ghost_by="ranks", groups=4).run_name == "cifar10-ghost4-ranks-seed0"


def test_the_papers_settings_for_classification():
    for name, dataset in (("classify-cifar10", "cifar10"), ("classify-cifar100", "cifar100")):
        recipe = RECIPES[name]
        assert (recipe.dataset, recipe.model, recipe.validation, recipe.epochs) == (dataset, "wrn-28-10", 5000, 200)
        assert (recipe.batch_size, recipe.lr, recipe.lr_start, recipe.rise * 200) == (512, 0.4, 0.1, 5)
        assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, True, 5e-4)


def test_recipes_are_named_as_they_are_called():
    assert all(recipe.recipe == name for name, recipe in RECIPES.items())
    assert all(recipe.resolve() for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"every": 0}, "every=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"schedule": "cosinus"}, "Unknown schedule 'cosinus'; choose one of constant, triangle, cosine"),
        ({"precision": "fp8"}, "Unknown precision 'fp8'"),
        ({"ghost_by": "magic"}, "Unknown ghost_by 'magic'; choose one of layer, accumulation, ranks"),
        ({"augment": ("crop", "spin")}, "Unknown augmentation 'spin'"),
        ({"train_samples": 0}, "train_samples=0"),
        ({"validation": -1}, "validation=-1"),
        ({"lr_start": 0.0}, "lr_start=0.0"),
        ({"lr_end": -1.0}, "lr_end=-1.0"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"rise": 1.0}, "rise=1.0"),
        ({"rise": 0.5, "schedule": "triangle"}, "rise=0.5 .* between 0 and 0.5"),
        ({"nesterov": True}, "needs some"),
        ({"validation": 10.5}, "validation=10.5"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"norm": "ghost", "ghost_by": "accumulation", "groups": 129}, "groups=129 of batches of 128 samples"),
        ({"norm": "ghost", "ghost_by": "ranks", "groups": 129}, "groups=129 of batches of 128 samples"),
        ({"norm": "bath"}, "norm='bath': .*none, batch, ghost"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(LandscapeError, match=message):
        replace(RECIPES["digits"], **change).resolve()
