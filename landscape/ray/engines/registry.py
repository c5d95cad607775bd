"""The ways to evaluate a ray: the plain loop, and its fast twins."""

from collections.abc import Callable

import torch
from torch import Tensor

from landscape.errors import LandscapeError
from landscape.ray.engines.affine import affine, channels_last
from landscape.ray.engines.compiled import Compiled
from landscape.ray.engines.loop import loop
from landscape.ray.engines.stacked import Stacked
from landscape.ray.ray import Ray


def check_engine(engine: str) -> None:
    """Raise a LandscapeError unless there is an engine of that name."""
    if not isinstance(engine, str) or (engine != "auto" and engine not in ENGINES):
        raise LandscapeError(f"Unknown engine {engine!r}; choose one of auto, {', '.join(ENGINES)}.")


Engine = Callable[[Ray], Tensor]
"""A ray to its K losses; an error of any kind where the model does not allow it."""


ENGINES: dict[str, Callable[[], Engine]] = {
    "loop": lambda: loop,
    "affine": lambda: affine,
    "channels_last": lambda: channels_last,
    "stacked": Stacked,
    "compiled": Compiled,
}
"""Makers of the engines, by name."""
OPT_IN = ("compiled",)
"""Engines that are used only where they are asked for by name."""
SHARING = ("affine", "channels_last", "stacked")
"""Engines that make use of what the forward pass of the update has evaluated."""


def evaluate(engine: Engine, ray: Ray) -> Tensor:
    """The K losses of a ray by an engine, with all random streams left as they were."""
    if engine is not loop and ray.objective.shards is not None:
        raise RuntimeError("its parameters are spread over processes")
    with torch.no_grad(), ray.objective.rng_restored():
        losses = engine(ray)
        # NaN is how a use of a parameter shows that no TorchFunctionMode sees; on a GPU a look would wait for it.
        unsure = engine is not loop and losses.device.type == "cpu" and bool(losses.isnan().any())
        return loop(ray) if unsure else losses


def refusal(name: str, error: Exception) -> str:
    """One line on why an engine cannot be used."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"The engine {name!r} does not fit this model ({reason[:200]}); its rays are evaluated by the loop."
