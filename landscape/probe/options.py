"""What may be handed to the probe, and what is said of anything else."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from landscape.errors import LandscapeError
from landscape.probe.update import rate_of
from landscape.ray.engines.registry import check_engine
from landscape.ray.ray import check_model

DIRECTIONS = ("gradient", "update")
FACTS = ("direction", "relative", "every", "overhead", "gradients", "max_memory", "steps_per_epoch")
"""Options of the probe that are facts of the run as they are."""


def check_arguments(model: Any, optimizer: Any, criterion: Any, options: Mapping[str, Any]) -> None:
    """Raise a LandscapeError unless these are arguments of the probe; ``options`` by their names.

    Raises:
        LandscapeError: It says what was given, what is allowed, and what to do.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise LandscapeError("Give a model (nn.Module) and its optimizer (torch.optim.Optimizer), in this order.")
    if not _takes_hooks(optimizer):
        raise LandscapeError(
            f"The {type(optimizer).__name__} does not call torch.optim.Optimizer.__init__, so its steps cannot be "
            "seen. Give the optimizer inside of it."
        )
    check_model(model)
    if any(parameter.is_complex() for group in optimizer.param_groups for parameter in group["params"]):
        raise LandscapeError(
            "The optimizer holds complex parameters, along which no ray is measured. Hold their torch.view_as_real, "
            "and use torch.view_as_complex in the forward pass."
        )
    if options["relative"] is True and "lr" not in optimizer.param_groups[0]:
        raise LandscapeError(
            f"relative=True: the {type(optimizer).__name__} has no learning rate that step sizes could be multiples "
            "of. Give step sizes of their own."
        )
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise LandscapeError(
            f"criterion={criterion!r} is no nn.Module, so its calls cannot be seen; use the module (such as "
            "nn.CrossEntropyLoss() for F.cross_entropy), or leave it out and hand each loss to probe.observe(...)."
        )
    check_engine(options["engine"])
    if not isinstance(options["direction"], str) or options["direction"] not in DIRECTIONS:
        raise LandscapeError(f"Unknown direction {options['direction']!r}; choose one of {', '.join(DIRECTIONS)}.")
    _whole(options, "every", "probe each n-th update, with n a whole number from 1 on")
    if options["steps_per_epoch"] is not None:
        _whole(options, "steps_per_epoch", "give the number of updates in an epoch, a whole number from 1 on")
    if options["max_memory"] is not None:
        _whole(options, "max_memory", "give the bytes that a ray may hold, such as 2 * 10**9")
    _share(options["overhead"])
    for name in ("gradients", "relative"):
        if not isinstance(options[name], bool):
            raise LandscapeError(f"{name}={options[name]!r:.100}: give True or False.")
    if options["grad_scaler"] is not None and not hasattr(options["grad_scaler"], "scale"):
        raise LandscapeError(
            f"grad_scaler={options['grad_scaler']!r}: give the torch.amp.GradScaler that scales the loss."
        )
    _tell_of_others(model, optimizer)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that makes the steps, inside of what a trainer has put around it without being one itself."""
    while not _takes_hooks(optimizer) and isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    return optimizer


def _takes_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def probe_metadata(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was handed to the probe, as facts of the run."""
    defaults = {
        name: value if isinstance(value, int | float | str | None) else repr(value)
        for name, value in optimizer.defaults.items()
    }
    step_sizes = options["step_sizes"]
    return {
        "model": type(model).__name__,
        "criterion": None if criterion is None else repr(criterion),
        "optimizer": type(optimizer).__name__,
        "optimizer_options": defaults,
        "base_lr": rate_of(optimizer),
        **{name: options[name] for name in FACTS},
        "probe_lrs": "a function of the step" if callable(step_sizes) else list(step_sizes),
        "threads": torch.get_num_threads(),
    }


def resume_signature(probe: Any, model: nn.Module) -> dict[str, Any]:
    """What has to be the same where a probe goes on with the state of an earlier one, but for the threads."""
    options = {name: getattr(probe, name) for name in ("relative", "every", "direction", "gradients")}
    etas = None if callable(probe.step_sizes) else list(probe.step_sizes)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {"step_sizes": etas, **options, "parameters": shapes, "threads": torch.get_num_threads()}


def check_state(state: Any, own: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Raise a LandscapeError unless it is the state of a probe like this one; warn of another number of threads."""
    names = ("step", "written", "last", "about", *parts)
    if not isinstance(state, Mapping) or not all(name in state for name in names):
        raise LandscapeError(
            "This is not what probe.state_dict() gave; hand over that, from the checkpoint that holds it."
        )
    if other := [name for name in own if name != "threads" and state["about"].get(name) != own[name]]:
        raise LandscapeError(
            f"The state is that of a probe with other {', '.join(other).replace('_', ' ')}; give this probe the same, "
            "or start a trace of its own."
        )
    if (before := state["about"].get("threads")) != (now := own["threads"]):
        warnings.warn(
            f"The run was recorded with {before} threads and goes on with {now}: rows will differ by roundings from "
            "those of a run that never stopped; see torch.set_num_threads and OMP_NUM_THREADS.",
            stacklevel=3,
        )


def _whole(options: Mapping[str, Any], name: str, remedy: str) -> None:
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 1:
        raise LandscapeError(f"{name}={value!r}: {remedy}.")


def _share(overhead: Any) -> None:
    if overhead is None:
        return
    if isinstance(overhead, bool) or not isinstance(overhead, int | float) or not 0 < overhead < 1e38:
        raise LandscapeError(
            f"overhead={overhead!r}: give the share of the training time that probes may cost, such as 0.1."
        )


def _tell_of_others(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in known for group in optimizer.param_groups for parameter in group["params"]):
        warnings.warn(
            "The optimizer holds parameters that the model does not have; they stay where they are.", stacklevel=4
        )
