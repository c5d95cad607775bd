"""Probe for training loops of Accelerate."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from landscape.errors import LandscapeError
from landscape.integrations.support import check_accelerator, check_whole, import_host
from landscape.probe import LandscapeProbe

accelerate = import_host("accelerate", "accelerate")

FILE = "landscape{}.pt"
"""Name of a probe's state in the folder of a checkpoint; the number is its place among those of the accelerator."""
_attached: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Number of probes that each accelerator saves."""


def attach(accelerator: Any, model: nn.Module, optimizer: Any, /, *args: Any, **options: Any) -> LandscapeProbe:
    """Attach a probe to a training loop of Accelerate.

    With a ``trace``, ``accelerator.save_state`` saves the probe's state with the checkpoint, and
    ``accelerator.load_state``, before the first update, resumes from it. Checkpoints without it can be loaded. Several
    probes of one accelerator (an actor's and a critic's) must be attached in the same order on resume.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: The prepared model.
        optimizer: The prepared optimizer, or a list of those that step together.
        args: Arguments of `LandscapeProbe` after these.
        options: The same, by name.

    Returns:
        The attached probe. Use it in a ``with`` statement, or call ``detach`` when training ends.

    Raises:
        LandscapeError: The updates cannot be measured (DeepSpeed, Megatron-LM, XLA, ``DataParallel``, pipeline stages),
            or an option is out of range.

    Examples:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from landscape.integrations.accelerate import attach
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(4, 3)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with attach(accelerator, model, optimizer) as probe:
        ...     for _ in range(4):
        ...         with accelerator.accumulate(model):
        ...             accelerator.backward(model(torch.randn(8, 4)).square().mean())
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        >>> len(probe.frame())
        2
    """
    if not isinstance(accelerator, accelerate.Accelerator):
        raise LandscapeError(f"accelerator={type(accelerator).__name__}: must be an accelerate.Accelerator.")
    check_accelerator(accelerator)
    check_whole(model)
    probe = LandscapeProbe(model, optimizer, *args, **options)
    if options.get("trace") is not None:
        place = _attached.get(accelerator, 0)
        _attached[accelerator] = place + 1
        name = FILE.format(place or "")

        def save(models: Any, weights: Any, folder: str) -> None:
            state = probe.state_dict()
            if accelerator.is_main_process:
                torch.save(state, Path(folder, name))

        def load(models: Any, folder: str) -> None:
            if (path := Path(folder, name)).exists():
                probe.load_state_dict(torch.load(path, weights_only=True))

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
    return probe.attach()
