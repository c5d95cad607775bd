"""Experiment: data, model, optimizer and learning rate of a recipe, and its updates."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from landscape.callables import call_own, import_callable
from landscape.data.dataset import LOADERS, Dataset, Samples, load_dataset
from landscape.data.own import digest, load_own_dataset
from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.errors import LandscapeError
from landscape.norms.registry import batch_norms, convert_norms, make_norm
from landscape.rng import load_rng_state_dict, rng_state_dict
from landscape.text import one_line
from landscape.training.augmentation import augmentation
from landscape.training.criterion import CRITERIA, check_outputs, correct, in_shape, with_targets
from landscape.training.models import MODELS
from landscape.training.recipe import UNCHANGED, Recipe

_CONVERTED = "landscape_converted_norms"
"""Attribute of a user's model: the number of its BatchNorms that were converted."""


class Experiment:
    """Training run of a recipe, before its first update.

    Args:
        recipe: Recipe to train.
        data_dir: Folder of data files; see `landscape.data.dataset.load_dataset`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; the default is the GPU if there is one.
        ranks: Processes that train together, each on one group of every batch; the default is this process.

    Attributes:
        recipe: Recipe, resolved.
        data: Data set, split.
        model: Model with its initial weights.
        updates: Updates per epoch.
        ranks: Processes that train together.
        converted: Number of BatchNorms of a model of your own that were converted, or None.

    Raises:
        LandscapeError: The recipe, the device or the data set cannot be used.

    Examples:
        >>> from landscape import RECIPES
        >>> experiment = Experiment(RECIPES["digits"], device="cpu")
        >>> experiment.updates, len(list(experiment.epoch()))
        (11, 11)
        >>> loss, accuracy = experiment.evaluate(experiment.data.test)
        >>> accuracy > 0.5
        True
    """

    def __init__(
        self,
        recipe: Recipe,
        data_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        ranks: RankGroup = SINGLE_PROCESS,
    ) -> None:
        self.recipe = recipe = recipe.resolve()
        self.device = resolve_device(device)
        if recipe.has_own_data:
            data = load_own_dataset(recipe.dataset, self.device)
        elif recipe.dataset not in LOADERS:
            raise LandscapeError(
                f"dataset={recipe.dataset!r:.100}: unknown data set. Use {', '.join(LOADERS)}, a file, such as "
                "data.npz, or a function, such as my_data:load."
            )
        else:
            data = load_dataset(recipe.dataset, data_dir, self.device)
        self.data = with_targets(recipe, data).split(recipe.validation, recipe.train_samples)
        self.updates = len(self.data.train) // recipe.batch_size
        inputs = self.data.train.inputs
        is_image = inputs.is_floating_point() and inputs.ndim == 4 and inputs.shape[2] == inputs.shape[3]
        if recipe.augment and not is_image:
            raise LandscapeError(
                f"augment={recipe.augment}: requires images (N, C, size, size) of floats, got {tuple(inputs.shape)} "
                f"{inputs.dtype}. Use augment=(), or another recipe."
            )
        model = initial_model(recipe, self.data)
        self.converted: int | None = getattr(model, _CONVERTED, None)
        self.model = data_parallel(model) if ranks.size > 1 else model
        self.ranks = ranks
        self.criterion = CRITERIA[recipe.loss]()
        options = {"momentum": recipe.momentum, "nesterov": recipe.nesterov} if recipe.optimizer == "SGD" else {}
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, recipe.optimizer)(
            self.model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, **options
        )
        self.schedule = learning_rate(recipe, self.optimizer, recipe.epochs * self.updates)
        self._augment = augmentation(recipe.augment)
        self._order = torch.Generator("cpu").manual_seed(recipe.seed)
        self._order_before = self._order.get_state()

    def epoch(self, done: int = 0) -> Iterator[Tensor]:
        """Train for one epoch, in a new order.

        Args:
            done: Updates of the epoch that were made before its state was loaded; they are skipped.

        Yields:
            Loss of each update. With several ranks, its mean over the ranks is the loss of the batch.
        """
        self._order_before = self._order.get_state()
        shuffled = torch.randperm(len(self.data.train), generator=self._order, device="cpu").to(self.device)
        for batch in shuffled.split(self.recipe.batch_size)[done : self.updates]:
            yield self._update(self.data.train[batch])

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two updates, for `load_state_dict`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self._order_before,
            "streams": rng_state_dict(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._order.set_state(state["order"])
        load_rng_state_dict(state["streams"], self.device)

    def _update(self, batch: Samples) -> Tensor:
        inputs = self._in_layout(self._augment(batch.inputs))
        self.optimizer.zero_grad()
        losses = []
        for own_inputs, targets in self._parts(inputs, batch.targets):
            with self._precision():
                outputs = self._outputs(own_inputs)
                loss = self.criterion(outputs, in_shape(self.recipe.loss, targets, outputs))
            share = len(targets) / len(inputs)
            # Gradients of parts are added. Those of ranks are averaged, which the factor of their number undoes.
            (loss * share * self.ranks.size).backward()
            losses.append(loss.detach() * share)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return torch.stack(losses).sum() * self.ranks.size

    def mean_loss(self, losses: Sequence[Tensor]) -> float:
        """Return the mean over all ranks of some losses."""
        return self.ranks.all_mean(lambda: {"loss": torch.stack(list(losses)).mean()})["loss"].item()

    def _parts(self, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the parts of a batch for this process.

        With ``groups=4``: the batch itself for ``ghost_by="layer"``, 4 parts for ``"accumulation"``, and the part of
        this rank for ``"ranks"``.
        """
        if self.recipe.ghost_by == "layer":
            return [(inputs, targets)]
        groups = self.recipe.groups or 1
        parts = list(zip(inputs.tensor_split(groups), targets.tensor_split(groups), strict=True))
        return parts if self.ranks.size == 1 else [parts[self.ranks.rank]]

    def metadata(self) -> dict[str, int | str]:
        """Return the metadata of the run besides the recipe."""
        sizes: dict[str, int | str] = {"samples": len(self.data.train), "test_samples": len(self.data.test)}
        if self.recipe.has_own_data:
            sizes |= {"data_sha256": digest(self.data)}
        return sizes | {"device": str(self.device)}

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> tuple[float, float]:
        """Return mean loss and accuracy in evaluation mode.

        Args:
            samples: Samples on the device; without any, both values are NaN. So is the accuracy of a regression.
        """
        self.model.eval()
        criterion = CRITERIA[self.recipe.loss](reduction="sum")
        losses, hits = (torch.zeros((), device=self.device, dtype=torch.float32) for _ in range(2))
        for start in range(0, len(samples), 1000):
            part = samples[start : start + 1000]
            with self._precision():
                outputs = self._outputs(self._in_layout(part.inputs)).float()
            targets = in_shape(self.recipe.loss, part.targets, outputs)
            losses += criterion(outputs, targets)
            hits += correct(self.recipe.loss, outputs, targets)
        self.model.train()
        # With a target per pixel or token, these are counted.
        count = samples.targets.numel()
        return (losses / count).item(), (hits / count).item()

    def _outputs(self, inputs: Tensor) -> Tensor:
        if not self.recipe.has_own_model:
            return self.model(inputs)
        return call_own(f"model={self.recipe.model!r}", self.model, inputs)

    def _in_layout(self, images: Tensor) -> Tensor:
        return in_layout(self.recipe, images)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Return the named device; None is the GPU or CPU.

    Raises:
        LandscapeError: This machine has no such device.
    """
    try:
        device = torch.device("cuda" if name is None and torch.cuda.is_available() else name or "cpu")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LandscapeError(
            f"device={name!r}: cannot be used on this machine. Use cpu, or cuda on a machine with a GPU."
        ) from error
    return device


def in_layout(recipe: Recipe, images: Tensor) -> Tensor:
    """Return inputs in a recipe's precision and layout."""
    # Integers are indices of embeddings, which stay as they are.
    images = images.double() if recipe.precision == "float64" and images.is_floating_point() else images
    return images.contiguous(memory_format=torch.channels_last) if recipe.channels_last and images.ndim == 4 else images


def initial_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """Return the recipe's model with its initial weights.

    The weights are the same on every device.

    Args:
        recipe: Recipe, resolved.
        data: Data set of the recipe, split.

    Raises:
        LandscapeError: There is no such model, its norm does not fit the batches, or its outputs do not fit the loss.
    """
    if recipe.batch_size > len(data.train):
        raise LandscapeError(f"batch_size={recipe.batch_size}: must be at most the {len(data.train)} training samples.")
    inputs = data.train.inputs[: recipe.batch_size]
    torch.manual_seed(recipe.seed)
    by_layer = recipe.ghost_by == "layer"
    if recipe.has_own_model:
        model = own_model(recipe, inputs)
    else:
        if recipe.model not in MODELS:
            raise LandscapeError(
                f"model={recipe.model!r:.100}: unknown model. Use {', '.join(MODELS)}, or a function of yours, such as "
                "my_model:build."
            )
        name, options = _layer(recipe)
        norm = make_norm(name, **options)
        with torch.device("meta" if inputs.is_meta else "cpu"):
            model = MODELS[recipe.model](inputs[0].shape, data.classes, norm)
    model = model.to(inputs.device)
    model = model.double() if recipe.precision == "float64" else model
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's types lack it)
    # One forward pass shows that norm and outputs fit the batches, before a trace is created.
    count = recipe.batch_size if by_layer else recipe.batch_size // (recipe.groups or 1)
    samples, targets = in_layout(recipe, inputs[:count]), data.train.targets[:count]
    try:
        with torch.no_grad():
            if recipe.has_own_model:
                outputs = call_own(f"model={recipe.model!r}", deepcopy(model), samples)
            else:
                outputs = deepcopy(model)(samples)
    except LandscapeError:
        raise
    except ValueError as error:
        raise LandscapeError(
            f"norm={recipe.norm!r}: cannot normalize batches of {recipe.batch_size} ({error}). Use larger batches or "
            "fewer groups."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LandscapeError(
            f"model={recipe.model!r}: cannot take samples of shape {tuple(inputs.shape[1:])} ({one_line(str(error))}). "
            "Use simplenet, or a function that builds a model for them, such as my_model:build."
        ) from error
    check_outputs(recipe, outputs, targets, data.classes if targets.ndim == 1 else 0)
    return model


def _layer(recipe: Recipe) -> tuple[str, dict[str, int]]:
    """Return name and options of the layers in this process."""
    return recipe.layer if recipe.ghost_by == "layer" else ("batch", {})


def own_model(recipe: Recipe, inputs: Tensor) -> nn.Module:
    """Return the model that a user's function builds.

    Its BatchNorms are converted to the recipe's norm.

    Args:
        recipe: Recipe, resolved, whose model is a function's name.
        inputs: Inputs of a batch, which give lazy layers their shapes.

    Raises:
        LandscapeError: The function fails or returns no model to train, or the model has no BatchNorm to convert.
    """
    given = f"model={recipe.model!r}"
    built = call_own(given, import_callable(recipe.model, "model"))
    if not isinstance(built, nn.Module):
        raise LandscapeError(f"{given}: must return a torch.nn.Module, got {type(built).__name__}.")
    if any(isinstance(parameter, UninitializedParameter) for parameter in built.parameters()):
        with torch.no_grad():
            call_own(given, built.cpu().eval(), inputs.cpu())
    # A function may return the same model again, which this run would train.
    model = call_own(given, deepcopy, built).cpu().train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LandscapeError(f"{given}: has no parameters to train. Return a model with trainable parameters.")
    if recipe.norm == UNCHANGED:
        return model
    count = len(batch_norms(model))
    if not count:
        raise LandscapeError(
            f"norm={recipe.norm!r}: {recipe.model} has no BatchNorm to replace. Put nn.BatchNorm1d, 2d or 3d where the "
            "norm is to be, or omit --norm to train the model as it is."
        )
    name, options = _layer(recipe)
    model = convert_norms(model, make_norm(name, **options))
    setattr(model, _CONVERTED, count)
    return model


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Return the model in DistributedDataParallel, without synchronized buffers.

    So each BatchNorm keeps the running statistics of its own group.
    """
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **options)


def learning_rate(recipe: Recipe, optimizer: torch.optim.Optimizer, updates: int) -> LRScheduler:
    """Return the scheduler of the recipe's learning rate.

    ``triangle`` rises from ``lr_start`` to ``lr``, falls back in as many updates, and falls to ``lr_end`` in the rest:
    with 100 updates and ``rise=0.45`` it is highest after 44 and at ``lr_start`` again after 88. ``cosine`` rises from
    ``lr_start`` to ``lr``, and falls to ``lr_end`` along half a cosine.

    Args:
        recipe: Recipe, resolved.
        optimizer: Optimizer whose learning rate is ``recipe.lr``.
        updates: Updates of the whole training.
    """
    if recipe.schedule == "constant" or updates < 4:
        return LambdaLR(optimizer, lambda update: 1.0)
    if recipe.schedule == "triangle":
        top = max(0.0, recipe.rise * updates - 1)  # as in torch's OneCycleLR, which fails if this is 0
        start = min(recipe.lr_start, recipe.lr)
        updates_at, rates = (0, top, 2 * top, updates - 1), (start, recipe.lr, start, recipe.lr_end)
        return LambdaLR(optimizer, lambda update: float(np.interp(update, updates_at, rates)) / recipe.lr)
    rising = max(1, round(recipe.rise * updates))
    rise = LinearLR(optimizer, min(1.0, recipe.lr_start / recipe.lr), total_iters=rising)
    fall = CosineAnnealingLR(optimizer, max(1, updates - rising), recipe.lr_end)
    return SequentialLR(optimizer, [rise, fall], [rising])
