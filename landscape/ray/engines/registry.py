"""The engines by name: the plain loop, and faster ways to evaluate a ray."""

from collections.abc import Callable

import torch
from torch import Tensor

from landscape.errors import LandscapeError
from landscape.ray.engines.affine import affine, channels_last
from landscape.ray.engines.compiled import Compiled
from landscape.ray.engines.loop import loop
from landscape.ray.engines.stacked import Stacked
from landscape.ray.ray import Ray

Engine = Callable[[Ray], Tensor]
"""Function from a ray to its K losses; it raises any error if the model does not allow it."""
ENGINES: dict[str, Callable[[], Engine]] = {
    "loop": lambda: loop,
    "affine": lambda: affine,
    "channels_last": lambda: channels_last,
    "stacked": Stacked,
    "compiled": Compiled,
}
"""Constructors of the engines, by name."""
OPT_IN = ("compiled",)
"""Engines that are used only if chosen by name."""
SHARING = ("affine", "channels_last", "stacked")
"""Engines that use what the forward pass of the update has evaluated."""


def check_engine(engine: str) -> None:
    """Raise a LandscapeError unless ``engine`` is known or ``"auto"``."""
    if not isinstance(engine, str) or (engine != "auto" and engine not in ENGINES):
        raise LandscapeError(f"engine={engine!r}: must be one of auto, {', '.join(ENGINES)}.")


def evaluate(engine: Engine, ray: Ray) -> Tensor:
    """Return the K losses, and restore the RNG state."""
    if engine is not loop and ray.objective.space.is_sharded:
        raise RuntimeError("its parameters are sharded over processes")
    with torch.no_grad(), ray.objective.rng_restored():
        losses = engine(ray)
        # A use of a parameter that no TorchFunctionMode detects gives NaN; on a GPU a check would synchronize.
        is_suspect = engine is not loop and losses.device.type == "cpu" and bool(losses.isnan().any())
        return loop(ray) if is_suspect else losses


def refusal(name: str, error: Exception) -> str:
    """Return one line on why an engine cannot be used."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"The engine {name!r} does not fit this model ({reason[:200]}); its rays are evaluated by the loop."
