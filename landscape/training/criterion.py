"""Losses of a recipe by name, and checks that outputs and targets fit them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from landscape.data.dataset import Dataset, Samples
from landscape.errors import LandscapeError
from landscape.training.recipe import Recipe

CRITERIA = {
    "cross-entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "huber": nn.HuberLoss,
    "bce": nn.BCEWithLogitsLoss,
}
"""Modules of the losses, by name; their default is the mean."""


def with_targets(recipe: Recipe, data: Dataset) -> Dataset:
    """Return the data with targets of the loss.

    They are classes for cross-entropy, and float32 numbers for other losses.

    Raises:
        LandscapeError: The targets do not fit the loss.
    """
    parts = {name: getattr(data, name) for name in ("train", "validation", "test")}
    if recipe.loss == "cross-entropy":
        for name, part in parts.items():
            if part.targets.is_floating_point():
                raise LandscapeError(
                    f"loss='cross-entropy': requires classes 0, 1, ... as integers, but y_{name} has floats. Use "
                    "--loss mse for numbers, or give integers."
                )
            if len(part) and int(part.targets.min()) < 0:
                raise LandscapeError(f"y_{name}: has the class {int(part.targets.min())}. Number classes from 0 on.")
        if recipe.has_own_data and not recipe.has_own_model and data.classes > max(1000, len(data.train)):
            raise LandscapeError(f"y_train: has the class {data.classes - 1}. Number classes 0, 1, ... without gaps.")
        return data
    numbers = {name: Samples(part.inputs, part.targets.float()) for name, part in parts.items()}
    for name, part in numbers.items():
        if recipe.loss == "bce" and len(part) and not 0 <= part.targets.min() <= part.targets.max() <= 1:
            raise LandscapeError(f"loss='bce': requires targets from 0 to 1, but y_{name} has others. Use --loss mse.")
    return replace(data, classes=data.train.targets[0].numel(), **numbers)


def check_outputs(recipe: Recipe, outputs: object, targets: Tensor, classes: int) -> None:
    """Raise a LandscapeError unless outputs fit loss and targets.

    Args:
        recipe: Recipe, resolved.
        outputs: What the model returned for a batch.
        targets: Targets of the batch.
        classes: Number of classes, the largest class of all samples plus 1.
    """
    given = f"model={recipe.model!r}"
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = str(outputs.dtype) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise LandscapeError(f"{given}: must return a tensor of floats for a batch, got {kind}.")
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    if recipe.loss != "cross-entropy":
        if outputs.numel() != targets.numel() or _without_ones(shape) != _without_ones(wanted):
            raise LandscapeError(
                f"{given}: returns the shape {shape} for a batch, but loss={recipe.loss!r} requires that of the "
                f"targets, {wanted}. Change the last layer, or the targets."
            )
        return
    if len(shape) < 2 or (shape[0], *shape[2:]) != wanted:
        raise LandscapeError(
            f"{given}: returns the shape {shape} for a batch with targets {wanted}, but loss='cross-entropy' requires "
            f"{(wanted[0], 'classes', *wanted[1:])}".replace("'classes'", "classes")
            + ". Change the model, the targets, or the loss."
        )
    if shape[1] < classes:
        raise LandscapeError(
            f"{given}: returns {shape[1]} logits, but the data have the class {classes - 1}. Return {classes}, or "
            "number classes from 0 on."
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without the ones behind the samples."""
    return shape[:1] + tuple(size for size in shape[1:] if size != 1)


def in_shape(loss: str, targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets in the shape and dtype of the outputs.

    So (N,) fits (N, 1), which a loss would broadcast to (N, N). Classes stay as they are.
    """
    if loss == "cross-entropy":
        return targets
    targets = targets.reshape(outputs.shape)
    return targets.double() if outputs.dtype == torch.float64 else targets


def correct(loss: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the number of correct predictions, or NaN for numbers."""
    if loss == "cross-entropy":
        return (outputs.argmax(1) == targets).sum()
    if loss == "bce":
        return ((outputs > 0) == (targets > 0.5)).sum()
    return torch.full((), torch.nan, device=outputs.device)
