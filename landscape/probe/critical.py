"""Points of an update that bracket its critical step."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from landscape.distributed.group import RankGroup
from landscape.ray.critical import search
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.engines.registry import losses_along
from landscape.ray.ray import Ray


def critical_points(ray: Ray, row: Mapping[str, Any], ranks: RankGroup) -> dict[str, list[float]]:
    """Return the columns of the search for the critical step.

    Each loss is the mean over the ranks, so that all of them choose the same points. A point at which the recorded
    calls cannot be repeated ends the search.

    Args:
        ray: The ray whose losses are known.
        row: Its step sizes and losses, the loss and the slope at its origin.
        ranks: The processes that train the model.
    """
    tried, losses = list[float](), list[float]()

    def loss_at(eta: float) -> float:
        losses.append(float(ranks.all_mean(lambda: {"loss": losses_along(replace(ray, step_sizes=[eta]))[0]})["loss"]))
        tried.append(eta)
        return losses[-1]

    known = ranks.all_mean(lambda: {name: row[name] for name in ("losses", "loss", "slope")})
    points = list(zip(ray.step_sizes, known["losses"].tolist(), strict=True))
    limit = min(torch.finfo(tensor.dtype).max for tensor in ray.origin.values())
    with suppress(NoTapeError):
        search(loss_at, float(known["loss"]), float(known["slope"]), points, limit)
    return {"critical_step_sizes": tried, "critical_losses": losses}
