"""One function that trains a recipe with the probe attached."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from landscape.data import Dataset, load_dataset
from landscape.errors import UserError
from landscape.models import MODELS
from landscape.norms import make_norm
from landscape.probe import LandscapeProbe
from landscape.recipes import Recipe


def train(
    recipe: Recipe,
    out: str | Path = "traces",
    *,
    data_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    on_update: Callable[[LandscapeProbe], None] = lambda probe: None,
) -> Path:
    """Train a recipe, probing its updates, and record the trace.

    Args:
        recipe: What is trained, such as ``RECIPES["mnist"]`` or a ``dataclasses.replace`` of it.
        out: Folder of traces; the run gets a folder named ``recipe.run`` in it.
        data_dir: Where the files of the data set are, or are put; see :func:`landscape.data.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; by default the GPU where there is one.
        overwrite: Whether a trace of the same name is replaced.
        on_update: Called after every update.

    Returns:
        The run's folder, for :func:`landscape.read_traces`. Its table ``epochs`` holds loss and accuracy on the test
        set.

    Raises:
        UserError: A recipe, device, data set or folder that cannot be used.
    """
    recipe, data = recipe.checked(), load_dataset(recipe.dataset, data_dir, _device(device))
    model, criterion = _model(recipe, data), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr)
    probe = LandscapeProbe(
        model,
        optimizer,
        criterion,
        step_sizes=recipe.probe_lrs,
        every=recipe.every,
        overhead=recipe.overhead,
        gradients=recipe.gradients,
        engine=recipe.engine,
        trace=Path(out) / recipe.run,
        facts=asdict(recipe) | {"device": str(data.train_inputs.device)},
        overwrite=overwrite,
        steps_per_epoch=len(data.train_inputs) // recipe.batch_size,
    )
    order = torch.Generator().manual_seed(recipe.seed)
    with probe:
        for epoch in range(1, recipe.epochs + 1):
            losses = []
            for inputs, targets in _batches(data, recipe.batch_size, order):
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                on_update(probe)
            row = {"epoch": epoch, "step": probe.step, "train_loss": torch.stack(losses).mean().item()}
            probe.trace.append(row | _test(model, criterion, data), table="epochs")
    return Path(out) / recipe.run


def rehearse(recipe: Recipe, data_dir: str | Path | None = None, device: str | None = None) -> None:
    """Raise the UserError that :func:`train` would raise, as far as it can be known without training.

    Args:
        recipe: As for :func:`train`, and so are the others.
        data_dir: Likewise.
        device: Likewise.
    """
    _model(recipe.checked(), load_dataset(recipe.dataset, data_dir, _device(device)))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device("cuda" if name is None and torch.cuda.is_available() else name or "cpu")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"The device {name!r} cannot be used here; give cpu, or cuda where there is a GPU.") from error
    return device


def _model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model with its initial weights, the same on every device."""
    if recipe.batch_size > len(data.train_inputs):
        raise UserError(f"batch_size={recipe.batch_size} is more than the {len(data.train_inputs)} training samples.")
    if recipe.model not in MODELS:
        raise UserError(f"Unknown model {recipe.model!r}; choose one of {', '.join(MODELS)}.")
    torch.manual_seed(recipe.seed)
    norm = make_norm(recipe.norm, **recipe.norm_options)
    model = MODELS[recipe.model](data.train_inputs[0].shape, data.classes, norm).to(data.train_inputs.device)
    try:  # a norm that does not fit is found before a trace is begun
        deepcopy(model)(data.train_inputs[: recipe.batch_size])
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"The norm {recipe.norm!r} does not take batches of {recipe.batch_size}: {error}.") from error
    return model


def _batches(data: Dataset, batch_size: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training set in a new order, in batches of the full size."""
    shuffled = torch.randperm(len(data.train_inputs), generator=order).to(data.train_inputs.device)
    for batch in shuffled.split(batch_size)[: len(shuffled) // batch_size]:
        yield data.train_inputs[batch], data.train_targets[batch]


@torch.no_grad()
def _test(model: nn.Module, criterion: nn.Module, data: Dataset) -> dict[str, float]:
    """Loss and accuracy on the test set, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(inputs) for inputs in data.test_inputs.split(1000)])
    model.train()
    correct = (logits.argmax(1) == data.test_targets).float().mean()
    return {"test_loss": criterion(logits, data.test_targets).item(), "test_accuracy": correct.item()}
