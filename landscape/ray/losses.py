"""Losses at K points of a ray ``theta - eta * direction``: the plain loop, and its fast twin."""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from landscape.distributed.group import sharded_parts
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.ray.engines.registry import ENGINES, check_engine, evaluate, refusal
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray, check_model
from landscape.ray.snapshot import Closure, ForwardSnapshot, Parameters
from landscape.ray.step_sizes import checked_step_sizes


def ray_losses(
    model: nn.Module, closure: Closure, direction: Parameters, step_sizes: Sequence[float], *, engine: str = "auto"
) -> Tensor:
    """Losses along a ray from the model's parameters, each in the state that the model is in now.

    Every point sees the same buffers, random numbers (so the same dropout mask), train flags and autocast state,
    and the model, its buffers and all random streams are left as they were.

    Args:
        model: Anything built of modules; tied parameters are moved together.
        closure: ``closure(model)`` gives the loss, a tensor with one element.
        direction: Tensors named and shaped like ``model.named_parameters()``; parameters not named stay where they
            are. For the paper's ray it is the gradient (Santurkar et al. 2018, section 3.1).
        step_sizes: The K step sizes eta, finite, in any order.
        engine: ``"loop"`` evaluates each point by itself; ``"affine"`` evaluates linear operations whose input does
            not depend on eta, and random numbers, once for all points; ``"channels_last"`` does so in that layout;
            ``"stacked"`` evaluates all points in one pass; ``"auto"`` chooses.

    Returns:
        The K losses at ``theta - eta * direction``, on the device and in the type of the loss; no synchronization.

    Raises:
        LandscapeError: A direction or a step size that does not fit, an unknown engine, or a loss that is no scalar.
    """
    check_engine(engine)
    if not isinstance(model, nn.Module) or not isinstance(direction, Mapping):
        raise LandscapeError(
            "Give a model (nn.Module), a closure, and a direction: a dict of tensors named like parameters."
        )
    check_model(model)
    if sharded_parts(model):
        raise LandscapeError(
            "fully_shard has spread the parameters over processes; use LandscapeProbe, which gathers them."
        )
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ray = Ray(Objective.of(model, closure, direction), origin, direction, checked_step_sizes(step_sizes))
    # Affine evaluation takes two products, so it pays from three points on.
    name = engine if engine != "auto" else "affine" if len(ray.step_sizes) > 2 else "loop"
    try:
        return _evaluated(name, ray)
    except Exception as error:
        if name == "loop":
            raise
        refused = refusal(name, error)
    losses = _evaluated("loop", ray)  # an error of the user's own comes again
    if engine == name:
        warnings.warn(refused, stacklevel=2)
    return losses


def _evaluated(name: str, ray: Ray) -> Tensor:
    try:
        return evaluate(ENGINES[name](), ray)
    except ProbeDeferred:
        # The closure calls other modules, which are known by now, and are what they were.
        (term,) = ray.objective.terms
        term.state = ForwardSnapshot.capture(term.state.scene)
        return evaluate(ENGINES[name](), ray)
