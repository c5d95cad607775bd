"""Named recipes: the experiments of the paper, and smaller ones."""

from dataclasses import replace

from landscape.errors import LandscapeError
from landscape.training.recipe import Recipe

_PAPER_LRS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_MULTIPLES = (0.5, 1.0, 1.5, 2.0)

# Dimitriou & Arandjelovic 2020, section 3.1, figure 5: super-convergence (Smith & Topin 2017, arXiv:1708.07120). The
# probed multiples of the rate are their cyclical rates (0.05, 1.5), (0.1, 3), (0.15, 4.5) and (0.2, 6). Plain SGD, so
# that a step size of 1 is the step that is taken.
_CIFAR10 = Recipe(
    recipe="cifar10",
    dataset="cifar10",
    model="resnet56",
    batch_size=512,
    epochs=50,
    lr=3.0,
    probe_lrs=_MULTIPLES,
    relative=True,
    schedule="triangle",
    lr_without_norm=1.0,
    lr_end=1e-4,
    augment=("crop", "flip"),
    channels_last=True,
    engine="channels_last",
)

# Section 3.2, tables 1 and 2: linear scaling of 0.1 to four times the batch of 128, with warm-up (Goyal et al. 2017).
_CLASSIFY = Recipe(
    recipe="classify-cifar10",
    dataset="cifar10",
    model="wrn-28-10",
    batch_size=512,
    epochs=200,
    lr=0.4,
    probe_lrs=_MULTIPLES,
    relative=True,
    schedule="cosine",
    rise=5 / 200,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    augment=("crop", "flip", "cutout"),
    validation=5000,
    channels_last=True,
    engine="channels_last",
)
_CLASSIFY_SMALL = replace(_CLASSIFY, model="simplenet", rise=0.1, augment=(), channels_last=False, engine="affine")

RECIPES = {
    # Dimitriou & Arandjelovic 2020, section 3.1: SimpleNet on MNIST, figure 4. With BatchNorm 98.0 % after five epochs.
    "mnist": Recipe("mnist", "mnist", "simplenet", batch_size=512, epochs=4, lr=0.4, probe_lrs=_PAPER_LRS),
    # The same on data that every machine has: 1,500 images of 64 pixels, so a smaller batch and more epochs. With
    # BatchNorm 94 %.
    "digits": Recipe("digits", "digits", "simplenet", batch_size=128, epochs=20, lr=0.4, probe_lrs=_PAPER_LRS),
    # At the paper's scale; what it attains is not known yet, nor what the two below it do.
    "cifar10": _CIFAR10,
    # Some 25 minutes for each norm on one CPU core. With BatchNorm 42 % of the first 1,000 test images; without norm it
    # diverges near the highest rate.
    "cifar10-small": replace(_CIFAR10, recipe="cifar10-small", train_samples=12_800, epochs=8, every=2),
    "classify-cifar10": _CLASSIFY,
    "classify-cifar100": replace(_CLASSIFY, recipe="classify-cifar100", dataset="cifar100"),
    # A part of CIFAR-10 in smaller batches: a minute on one CPU core.
    "classify-cifar10-small": replace(
        _CLASSIFY,
        recipe="classify-cifar10-small",
        model="resnet20",
        batch_size=128,
        lr=0.1,
        lr_start=0.025,
        rise=0.1,
        epochs=8,
        train_samples=4000,
        validation=2000,
    ),
    "classify-mnist": replace(_CLASSIFY_SMALL, recipe="classify-mnist", dataset="mnist", epochs=5),
    "classify-digits": replace(
        _CLASSIFY_SMALL,
        recipe="classify-digits",
        dataset="digits",
        batch_size=128,
        lr=0.1,
        lr_start=0.025,
        validation=300,
        epochs=20,
    ),
}
"""The experiments that the command line knows."""


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; a LandscapeError if there is none."""
    if name not in RECIPES:
        raise LandscapeError(f"Unknown recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
