"""Losses along a ray from a model's parameters."""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from landscape.distributed.group import sharded_parts
from landscape.distributed.parameter_space import Parameters
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.ray.engines.registry import ENGINES, check_engine, evaluate, refusal
from landscape.ray.loss_module import Closure
from landscape.ray.objective import Objective
from landscape.ray.ray import Ray, check_model
from landscape.ray.snapshot import ForwardSnapshot
from landscape.ray.step_sizes import checked_step_sizes


def ray_losses(
    model: nn.Module, closure: Closure, direction: Parameters, step_sizes: Sequence[float], *, engine: str = "auto"
) -> Tensor:
    r"""Return the losses along a ray from the model's parameters.

    With the parameters :math:`\theta`, the direction :math:`d` and the step sizes :math:`\eta_k` they are

    .. math:: L(\theta - \eta_k d), \qquad k = 1, \dots, K.

    If :math:`d` is the gradient, their range is the variation of the loss in Santurkar et al. (2018), section 3.1. All
    points have the current buffers, RNG state (so the same dropout mask), train flags and autocast state. The model,
    its buffers and the RNG state are left unchanged.

    Args:
        model: Any module; tied parameters are moved together.
        closure: ``closure(model)`` returns the loss :math:`L`, a tensor with one element.
        direction: Tensors with the names and shapes of ``model.named_parameters()``. Parameters that are not named do
            not move.
        step_sizes: The K step sizes, finite, in any order.
        engine: ``"loop"`` evaluates one point after the other. ``"affine"`` evaluates linear operations whose input
            does not depend on the step size, and random numbers, once for all points; ``"channels_last"`` does so in
            that layout. ``"stacked"`` evaluates all points in one pass, ``"compiled"`` one after the other by
            ``torch.compile``. ``"auto"`` is affine for 3 points or more, and the loop for fewer. If an engine does not
            fit the model, the loop is used, with a warning unless it is ``"auto"``.

    Returns:
        The losses, shape (K,), on the device and in the type of the loss. The device is not synchronized.

    Raises:
        LandscapeError: ``direction`` is empty, or has another name, shape or device than the parameters; ``step_sizes``
            is empty, not finite or overflows their type; ``engine`` is unknown; the loss is not a scalar; or ``model``
            is scripted, or sharded by ``fully_shard``.

    Examples:
        The loss :math:`\theta^2` from :math:`\theta = 3` along its gradient 6:

        >>> import torch
        >>> from landscape import ray_losses
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> closure = lambda model: model(torch.ones(1, 1)).square().sum()
        >>> closure(model).backward()
        >>> ray_losses(model, closure, {"weight": model.weight.grad}, [0.0, 0.25, 0.5, 1.0])
        tensor([9.0000, 2.2500, 0.0000, 9.0000])
    """
    check_engine(engine)
    if not isinstance(model, nn.Module):
        raise LandscapeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(direction, Mapping):
        raise LandscapeError(
            f"direction must be a dict of tensors named as in model.named_parameters(), got {type(direction).__name__}."
        )
    check_model(model)
    if sharded_parts(model):
        raise LandscapeError(
            "model is sharded by fully_shard: this process must hold all parameters. Use LandscapeProbe, which gathers "
            "them."
        )
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ray = Ray(Objective.of(model, closure, direction), origin, direction, checked_step_sizes(step_sizes))
    # Affine evaluation takes two products, so it pays from three points on.
    name = engine if engine != "auto" else "affine" if len(ray.step_sizes) > 2 else "loop"
    try:
        return _evaluate(name, ray)
    except Exception as error:
        if name == "loop":
            raise
        refused = refusal(name, error)
    losses = _evaluate("loop", ray)  # an error in the closure itself is raised here
    if engine == name:
        warnings.warn(refused, stacklevel=2)
    return losses


def _evaluate(name: str, ray: Ray) -> Tensor:
    try:
        return evaluate(ENGINES[name](), ray)
    except ProbeDeferred:
        # The closure calls other modules. The first evaluation has restored them and added them to the loss module.
        (term,) = ray.objective.terms
        term.state = ForwardSnapshot.capture(term.state.loss_module)
        return evaluate(ENGINES[name](), ray)
