"""Libraries that may be missing, and trainings that no probe can measure, for all integrations."""

import importlib
from inspect import signature
from typing import Any

from torch import nn

from landscape.errors import LandscapeError, MissingExtraError
from landscape.probe import LandscapeProbe
from landscape.probe.options import ProbeOptions

_REASONS = {
    "DEEPSPEED": "DeepSpeed keeps gradients and steps of its own",
    "MEGATRON_LM": "Megatron-LM runs the backward pass itself, in pipeline stages",
    "XLA": "XLA compiles the update into one program",
}


def import_host(name: str, extra: str) -> Any:
    """Import the library of a trainer.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"landscape.integrations.{extra}", extra) from error


def check_options(options: dict[str, Any]) -> None:
    """Raise for options that `LandscapeProbe` refuses later."""
    own = signature(LandscapeProbe.__init__).parameters
    if unknown := options.keys() - (known := signature(LandscapeProbe).parameters):
        raise TypeError(f"LandscapeProbe has no option {min(unknown)!r}. Use some of {', '.join([*known][2:])}.")
    ProbeOptions(**{name: value for name, value in options.items() if name not in own})


def check_whole(model: Any) -> None:
    """Raise a LandscapeError for models that are split over devices.

    Args:
        model: What the training loop calls.
    """
    if isinstance(model, nn.DataParallel):
        raise LandscapeError(
            "model=DataParallel: it copies the model in every forward pass, and copies cannot be moved along a ray. "
            "Use one GPU (CUDA_VISIBLE_DEVICES=0), or DistributedDataParallel (torchrun)."
        )
    if hasattr(model, "hf_split_points"):
        raise LandscapeError(
            "model: is split into pipeline stages, which no process can evaluate alone. Train it whole."
        )


def check_accelerator(accelerator: Any) -> None:
    """Raise a LandscapeError unless torch itself makes the updates.

    Args:
        accelerator: An ``accelerate.Accelerator``.
    """
    name = accelerator.distributed_type.value
    if reason := _REASONS.get(name):
        raise LandscapeError(f"distributed_type={name}: {reason}, so that no update can be measured. Train without it.")
