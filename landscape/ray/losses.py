"""Losses along a ray from a model's parameters."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from landscape.distributed.group import sharded_parts
from landscape.distributed.parameter_space import Parameters
from landscape.errors import LandscapeError, ProbeDeferred
from landscape.ray.engines.calls import NoTapeError
from landscape.ray.engines.loop import checked_loop
from landscape.ray.engines.recorder import Recorder
from landscape.ray.engines.registry import check_engine, losses_along
from landscape.ray.engines.tape import Tape
from landscape.ray.loss_module import Closure
from landscape.ray.objective import Objective
from landscape.ray.ray import ParametersAlongRay, Ray, check_model
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
        step_sizes: The K step sizes, finite, in any order; negative ones lie uphill.
        engine: ``"auto"`` evaluates the first point and records its calls of ATen functions; at the other points it
            repeats those that depend on the step size, so the closure is called once. If they cannot be repeated
            (the closure reads values and branches on them, or has parts that are compiled), it is called at each point,
            as ``"loop"`` always does. ``"tape"`` warns then.

    Returns:
        The losses, shape (K,), on the device and in the type of the loss. The device is not synchronized.

    Raises:
        LandscapeError: ``direction`` is empty, or has another name, shape or device than the parameters; ``step_sizes``
            is empty, not finite or overflows their type; ``engine`` is unknown; the loss is not a scalar, or
            is computed again without reading the model's parameters; or ``model`` is scripted, or sharded by
            ``fully_shard``.

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
    objective = Objective.of(model, closure, direction)
    ray = Ray(objective, origin, direction, checked_step_sizes(step_sizes))
    try:
        return _losses(ray, engine)
    except ProbeDeferred:
        # The closure calls other modules. The first evaluation has restored them and added them to the loss module.
        (term,) = objective.terms
        term.state = ForwardSnapshot.capture(term.state.loss_module)
        return _losses(ray, engine)


def _losses(ray: Ray, engine: str) -> Tensor:
    if engine != "loop" and len(ray.step_sizes) > 1:
        try:
            return _replayed(ray)
        except NoTapeError as error:
            if engine == "tape":
                warnings.warn(f"The loop evaluates this ray, because the tape cannot: {error}.", stacklevel=3)
    return checked_loop(ray)


def _replayed(ray: Ray) -> Tensor:
    """Record the nearest point, and replay it at the others.

    Differences from it are small, so that they are exact.
    """
    objective, etas = ray.objective, ray.step_sizes
    assert isinstance(objective, Objective)
    first = min(range(len(etas)), key=lambda k: abs(etas[k]))
    (term,), along, tapes = objective.terms, ParametersAlongRay(ray), list[Tape]()

    def recorded(model: nn.Module) -> Tensor:
        recorder = Recorder(along.point)
        with recorder.recording(), recorder.inside():
            loss = term.closure(model)
        if isinstance(loss, Tensor):
            root = recorder.add_root([loss], [None])
            tapes[:] = [recorder.tape([root], objective.loss_module, loss.detach(), anchor=etas[first])]
        return loss

    with torch.no_grad(), objective.rng_restored():
        value = replace(term, closure=recorded).losses(along.point, along.moves([etas[first]]))[0]
    if not tapes[0].reads_parameters():
        raise NoTapeError("its recorded calls read no parameter that moves")
    others = [eta for k, eta in enumerate(etas) if k != first]
    rest = losses_along(replace(ray, objective=tapes[0], step_sizes=others))
    return torch.cat([rest[:first], value.reshape(1), rest[first:]])
