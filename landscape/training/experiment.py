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
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from landscape.data.dataset import Dataset, Samples, load_dataset
from landscape.distributed.group import SINGLE_PROCESS, RankGroup
from landscape.errors import LandscapeError
from landscape.names import check_choice
from landscape.norms.registry import make_norm
from landscape.rng import load_rng_state_dict, rng_state_dict
from landscape.training.augmentation import augmentation
from landscape.training.models import MODELS
from landscape.training.recipe import Recipe


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
        data = load_dataset(recipe.dataset, data_dir, self.device)
        self.data = data.split(recipe.validation, recipe.train_samples)
        self.updates = len(self.data.train) // recipe.batch_size
        model = initial_model(recipe, self.data)
        self.model = data_parallel(model) if ranks.size > 1 else model
        self.ranks = ranks
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
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
                loss = self.criterion(self.model(own_inputs), targets)
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
        sizes = {"samples": len(self.data.train), "test_samples": len(self.data.test)}
        return sizes | {"device": str(self.device)}

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> tuple[float, float]:
        """Return mean loss and accuracy in evaluation mode.

        Args:
            samples: Samples on the device; without any, both values are NaN.
        """
        self.model.eval()
        losses, correct = samples.inputs.new_zeros(()), samples.inputs.new_zeros(())
        for start in range(0, len(samples), 1000):
            part = samples[start : start + 1000]
            with self._precision():
                logits = self.model(self._in_layout(part.inputs)).float()
            losses += nn.functional.cross_entropy(logits, part.targets, reduction="sum")
            correct += (logits.argmax(1) == part.targets).sum()
        self.model.train()
        return (losses / len(samples)).item(), (correct / len(samples)).item()

    def _in_layout(self, images: Tensor) -> Tensor:
        images = images.double() if self.recipe.precision == "float64" else images
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else images

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


def initial_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """Return the recipe's model with its initial weights.

    The weights are the same on every device.

    Args:
        recipe: Recipe, resolved.
        data: Data set of the recipe, split.

    Raises:
        LandscapeError: There is no such model, or its norm does not fit the batches.
    """
    if recipe.batch_size > len(data.train):
        raise LandscapeError(f"batch_size={recipe.batch_size}: must be at most the {len(data.train)} training samples.")
    check_choice("model", recipe.model, MODELS)
    inputs = data.train.inputs[: recipe.batch_size]
    torch.manual_seed(recipe.seed)
    by_layer = recipe.ghost_by == "layer"
    name, options = recipe.layer if by_layer else ("batch", {})
    norm = make_norm(name, **options)
    with torch.device("meta" if inputs.is_meta else "cpu"):
        model = MODELS[recipe.model](inputs[0].shape, data.classes, norm)
    model = model.to(inputs.device)
    model = model.double() if recipe.precision == "float64" else model
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's types lack it)
    try:  # One forward pass shows that the norm fits the batches, before a trace is created.
        with torch.no_grad():
            samples = inputs if by_layer else inputs[: recipe.batch_size // (recipe.groups or 1)]
            deepcopy(model)(samples.to(next(model.parameters(), samples)))
    except LandscapeError:
        raise
    except ValueError as error:
        raise LandscapeError(
            f"norm={recipe.norm!r}: cannot normalize batches of {recipe.batch_size} ({error}). Use larger batches or "
            "fewer groups."
        ) from error
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
