from dataclasses import replace

import pytest

from landscape import RECIPES, LandscapeError, Recipe


def test_run_name():
    recipe = RECIPES["mnist"]
    assert recipe.run_name == "mnist-batch-seed0"
    assert replace(recipe, norm="ghost", groups=128, seed=2).run_name == "mnist-ghost128-seed2"
    assert replace(recipe, norm="seq", channel_groups=4, groups=16).run_name == "mnist-seq4-16-seed0"


def test_resolve_drops_unused_options():
    recipe = RECIPES["digits"]
    assert (recipe.resolve().groups, recipe.resolve().channel_groups) == (None, None)
    ghost = replace(recipe, norm="ghost").resolve()
    assert (ghost.groups, ghost.channel_groups) == (16, None)


def test_mnist_settings_of_paper():
    recipe: Recipe = RECIPES["mnist"]
    assert (recipe.batch_size, recipe.lr) == (512, 0.4)
    assert recipe.step_sizes == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def test_cifar10_settings_of_paper():
    recipe = RECIPES["cifar10"]
    assert (recipe.batch_size, recipe.lr_start, recipe.lr, recipe.lr_end) == (512, 0.1, 3.0, 1e-4)
    assert recipe.relative
    rates = [(recipe.lr_start * multiple, recipe.lr * multiple) for multiple in recipe.step_sizes]
    assert rates == [pytest.approx(pair) for pair in ((0.05, 1.5), (0.1, 3), (0.15, 4.5), (0.2, 6))]
    assert replace(recipe, norm="none").resolve().lr == 1.0
    assert replace(recipe, norm="ghost", ghost_by="ranks", groups=4).run_name == "cifar10-ghost4-ranks-seed0"


def test_classification_settings_of_paper():
    for name, dataset in (("classify-cifar10", "cifar10"), ("classify-cifar100", "cifar100")):
        recipe = RECIPES[name]
        assert (recipe.dataset, recipe.model, recipe.validation, recipe.epochs) == (dataset, "wrn-28-10", 5000, 200)
        assert (recipe.batch_size, recipe.lr, recipe.lr_start, recipe.rise * 200) == (512, 0.4, 0.1, 5)
        assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, True, 5e-4)


def test_recipes_have_their_names():
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert all(recipe.resolve() for recipe in RECIPES.values())


def test_metadata_keeps_name_of_fact():
    metadata = RECIPES["digits"].metadata()
    assert (metadata["recipe"], metadata["step_sizes"]) == ("digits", RECIPES["digits"].step_sizes)
    assert Recipe(metadata.pop("recipe"), **metadata) == RECIPES["digits"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"every": 0}, "every=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"schedule": "cosinus"}, "schedule='cosinus': .*constant, triangle or cosine"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"ghost_by": "magic"}, "ghost_by='magic': .*layer, accumulation or ranks"),
        ({"augment": ("crop", "spin")}, "augment='spin'"),
        ({"train_samples": 0}, "train_samples=0"),
        ({"validation": -1}, "validation=-1"),
        ({"lr_start": 0.0}, "lr_start=0.0"),
        ({"lr_end": -1.0}, "lr_end=-1.0"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"rise": 1.0}, "rise=1.0"),
        ({"rise": 0.5, "schedule": "triangle"}, "rise=0.5: .* between 0 and 0.5"),
        ({"nesterov": True}, "nesterov=True: requires momentum"),
        ({"validation": 10.5}, "validation=10.5"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"norm": "ghost", "ghost_by": "accumulation", "groups": 129}, "groups=129: .* batch_size=128"),
        ({"norm": "ghost", "ghost_by": "ranks", "groups": 129}, "groups=129: .* batch_size=128"),
        ({"norm": "bath"}, "norm='bath': .*none, batch, ghost"),
    ],
)
def test_resolve_errors(change, message):
    with pytest.raises(LandscapeError, match=message):
        replace(RECIPES["digits"], **change).resolve()


def test_repr_has_no_defaults():
    recipe = replace(RECIPES["mnist"], norm="ghost", groups=8)
    shown = repr(recipe)
    assert eval(shown, {"Recipe": Recipe}) == recipe
    assert "norm='ghost', groups=8" in shown
    assert "momentum" not in shown
