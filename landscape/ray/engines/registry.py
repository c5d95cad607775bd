"""The engines by name."""

from torch import Tensor

from landscape.errors import LandscapeError
from landscape.ray.engines.loop import loop
from landscape.ray.engines.tape import Tape, tape
from landscape.ray.ray import Ray

ENGINES = ("auto", "tape", "loop")
"""Names of engines: ``"auto"`` is the tape wherever an update can be recorded, and the loop elsewhere."""
_FORMER = ("affine", "channels_last", "stacked", "compiled")


def check_engine(engine: str) -> None:
    """Raise a LandscapeError unless ``engine`` is a name of `ENGINES`."""
    if isinstance(engine, str) and engine in _FORMER:
        raise LandscapeError(f"engine={engine!r}: is no longer an engine. Use 'auto', which is faster.")
    if not isinstance(engine, str) or engine not in ENGINES:
        raise LandscapeError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}.")


def losses_along(ray: Ray) -> Tensor:
    """Return the K losses of the ray's objective.

    Raises:
        NoTapeError: The objective is a tape, and its calls cannot be repeated.
    """
    return tape(ray) if isinstance(ray.objective, Tape) else loop(ray)
