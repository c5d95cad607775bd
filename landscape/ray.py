"""Losses at K points of a ray ``theta - eta * direction``: the plain loop, and its fast twin."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from landscape.affine import SharedProducts
from landscape.errors import UserError
from landscape.objective import Closure, Objective, Parameters, Term
from landscape.walk import Walk

Engine = Callable[[Term, Walk, Sequence[float]], list[Tensor]]


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
            not depend on eta once for all points; ``"auto"`` chooses.

    Returns:
        The K losses at ``theta - eta * direction``, on the device and in the type of the loss; no synchronization.

    Raises:
        UserError: A direction or a step size that does not fit, an unknown engine, or a loss that is no scalar.
    """
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return losses_along(Objective.of(model, closure), origin, direction, step_sizes, engine)


def losses_along(
    objective: Objective, origin: Parameters, direction: Parameters, step_sizes: Sequence[float], engine: str = "auto"
) -> Tensor:
    """The K losses of ``objective`` at ``origin - eta * direction``; see :func:`ray_losses`."""
    step_sizes = checked_step_sizes(step_sizes)
    _check_direction(origin, direction, max(map(abs, step_sizes)))
    evaluate, walk = ENGINES[choose_engine(engine, len(step_sizes))], Walk(origin, direction)
    with torch.no_grad(), objective.undisturbed():
        return objective.total([torch.stack(evaluate(term, walk, step_sizes)) for term in objective.terms])


def choose_engine(engine: str, points: int) -> str:
    """The engine that serves ``points`` points; affine evaluation takes two products, so it pays from three on."""
    if engine != "auto" and engine not in ENGINES:
        raise UserError(f"Unknown engine {engine!r}; choose one of auto, {', '.join(ENGINES)}.")
    return engine if engine != "auto" else "affine" if points > 2 else "loop"


def _loop(term: Term, walk: Walk, step_sizes: Sequence[float]) -> list[Tensor]:
    """Each point by itself: the obvious twin of every other engine."""
    return term.losses(walk.point, (walk.move(eta) for eta in step_sizes))


def _affine(term: Term, walk: Walk, step_sizes: Sequence[float]) -> list[Tensor]:
    """The loop, with linear operations whose input does not depend on eta evaluated once for all points."""
    products = SharedProducts(walk)

    def closure(model: nn.Module) -> Tensor:
        with products:
            return term.closure(model)

    # From the nearest point outwards: differences of large products would cancel.
    order = sorted(range(len(step_sizes)), key=lambda k: abs(step_sizes[k]))
    try:
        losses = replace(term, closure=closure).losses(walk.point, (products.arrive(step_sizes[k]) for k in order))
    except RuntimeError:  # what a model does may not go together with the mode; an error of its own comes again
        return _loop(term, walk, step_sizes)
    # NaN is how a use of a parameter shows that no TorchFunctionMode sees; on a GPU a look would wait for it.
    if any(loss.device.type == "cpu" and loss.isnan() for loss in losses):
        return _loop(term, walk, step_sizes)
    return [losses[order.index(k)] for k in range(len(step_sizes))]


ENGINES: dict[str, Engine] = {"loop": _loop, "affine": _affine}


def _check_direction(origin: Parameters, direction: Parameters, farthest: float) -> None:
    if not direction:
        raise UserError("The direction is empty; give a tensor for at least one of the model's parameters.")
    for name, tensor in direction.items():
        if name not in origin:
            raise UserError(f"The direction names {name!r}, which model.named_parameters() does not have.")
        if tensor.shape != origin[name].shape:
            shapes = f"{tuple(tensor.shape)}, the parameter {tuple(origin[name].shape)}"
            raise UserError(f"The direction of {name!r} has shape {shapes}; the two must be equal.")
        if farthest > torch.finfo(origin[name].dtype).max:
            raise UserError(f"The step size {farthest} is more than {origin[name].dtype} holds; give smaller ones.")


def checked_step_sizes(step_sizes: Iterable[float]) -> list[float]:
    """The step sizes as numbers; a UserError unless there is at least one and all are finite."""
    try:
        numbers = [float(eta) for eta in step_sizes]
    except (TypeError, ValueError) as error:
        raise UserError(f"step_sizes={step_sizes!r}: give a list of numbers.") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"step_sizes={numbers}: give one finite number or more.")
    return numbers
