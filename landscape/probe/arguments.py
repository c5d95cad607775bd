"""Model, optimizer and criterion that a probe is given: checked, unwrapped, described."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from landscape.errors import LandscapeError
from landscape.probe.options import ProbeOptions
from landscape.probe.update import learning_rate_of
from landscape.ray.engines.registry import check_engine
from landscape.ray.ray import check_model


def check_arguments(
    model: Any, optimizers: Sequence[Any], criterion: Any, grad_scaler: Any, options: ProbeOptions
) -> None:
    """Raise a LandscapeError unless a probe can be attached."""
    is_optimizer = [isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers]
    if not isinstance(model, nn.Module) or not all(is_optimizer) or not optimizers:
        given = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "[]"
        raise LandscapeError(
            f"model={type(model).__name__}, optimizer={given}: must be an nn.Module and its torch.optim.Optimizer, in "
            "this order, or a list of the optimizers that step together."
        )
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise LandscapeError("optimizer: must hold each optimizer once. Leave out the others.")
    for optimizer in optimizers:
        if not _takes_hooks(optimizer):
            raise LandscapeError(
                f"optimizer={type(optimizer).__name__}: must call torch.optim.Optimizer.__init__, which makes its step "
                "hooks. Give the optimizer inside of it."
            )
    check_model(model)
    held = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    if any(parameter.is_complex() for parameter in held):
        raise LandscapeError(
            "optimizer: must hold real parameters, got complex ones. Hold their torch.view_as_real, and use "
            "torch.view_as_complex in the forward pass."
        )
    if len({id(parameter) for parameter in held}) < len(held):
        raise LandscapeError(
            "optimizer: two of them hold the same parameter, so that no ray has its step. Hold each parameter once."
        )
    for optimizer in optimizers:
        if options.relative and "lr" not in optimizer.param_groups[0]:
            raise LandscapeError(
                f"relative=True: needs a learning rate, and {type(optimizer).__name__} has none. Give step_sizes=[...] "
                "with relative=False."
            )
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise LandscapeError(
            f"criterion must be an nn.Module, got {criterion!r}. Use nn.CrossEntropyLoss() for F.cross_entropy, or "
            "omit criterion: the probe sees which loss is differentiated."
        )
    check_engine(options.engine)
    if grad_scaler is not None and not hasattr(grad_scaler, "scale"):
        raise LandscapeError(f"grad_scaler={grad_scaler!r}: must be the torch.amp.GradScaler that scales the loss.")
    known = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in known for parameter in held):
        warnings.warn(
            "The optimizer holds parameters that are not the model's; rays leave them where they are.", stacklevel=3
        )


def unwrap_optimizers(given: Any) -> tuple[Any, ...]:
    """Return the optimizers, without the wrappers of trainers."""
    return tuple(map(_unwrapped, given if isinstance(given, list | tuple) else [given]))


def _unwrapped(optimizer: Any) -> Any:
    while not _takes_hooks(optimizer) and isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    return optimizer


def _takes_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def probe_metadata(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    criterion: nn.Module | None,
    options: ProbeOptions,
) -> dict[str, Any]:
    """Return the facts of a run that its probe knows."""
    defaults = [
        {
            name: value if isinstance(value, int | float | str | None) else repr(value)
            for name, value in optimizer.defaults.items()
        }
        for optimizer in optimizers
    ]
    return {
        "model": type(model).__name__,
        "criterion": None if criterion is None else repr(criterion),
        "optimizer": " + ".join(type(optimizer).__name__ for optimizer in optimizers),
        "optimizer_options": defaults[0] if len(defaults) == 1 else defaults,
        "base_lr": float(learning_rate_of(optimizers)),
        "float32_precision": _float32_precision(),
        **options.metadata(),
        "threads": torch.get_num_threads(),
    }


def _float32_precision() -> dict[str, str]:
    """Return how products of float32 numbers are rounded, by backend.

    With "tf32" an accelerator rounds their factors to 11 bits.
    """
    backends = {
        "cuda.matmul": torch.backends.cuda.matmul,
        "cudnn.conv": getattr(torch.backends.cudnn, "conv", torch.backends.cudnn),
        "mkldnn.matmul": getattr(torch.backends.mkldnn, "matmul", None),
    }
    found: dict[str, str] = {}
    for name, backend in backends.items():
        precision = getattr(backend, "fp32_precision", None)  # since torch 2.9
        if precision is None and hasattr(backend, "allow_tf32"):
            precision = "tf32" if backend.allow_tf32 else "ieee"  # pyright: ignore[reportOptionalMemberAccess]
        if precision is not None:
            found[name] = precision
    return found


def resume_signature(options: ProbeOptions, model: nn.Module) -> dict[str, Any]:
    """Return the facts that must match a checkpoint's."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {**options.resume_signature(), "parameters": shapes, "threads": torch.get_num_threads()}


def check_state(state: Any, signature: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Raise a LandscapeError unless a probe can resume.

    Args:
        state: What ``load_state_dict`` was given.
        signature: The `resume_signature` of the probe. Another number of threads only warns.
        parts: Names of the parts of the probe that have a state of their own.
    """
    names = ("step", "written", "last", "about", *parts)
    if not isinstance(state, Mapping) or not all(name in state for name in names):
        raise LandscapeError(
            f"state must be what probe.state_dict() returned, got {type(state).__name__} without "
            f"{next((name for name in names if not isinstance(state, Mapping) or name not in state), '')!r}."
        )
    before = {"critical": False, **state["about"]}  # Earlier checkpoints lack it.
    if other := [name for name in signature if name != "threads" and before.get(name) != signature[name]]:
        raise LandscapeError(
            f"The checkpoint is of a probe with other {', '.join(other).replace('_', ' ')}. Give this probe the same, "
            "or start a new trace."
        )
    if before.get("threads") != (now := signature["threads"]):
        warnings.warn(
            f"The run was recorded with {before.get('threads')} threads and is resumed with {now}: rows will differ by "
            "rounding from an uninterrupted run. See torch.set_num_threads and OMP_NUM_THREADS.",
            stacklevel=3,
        )
