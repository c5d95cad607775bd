"""State of the global random number generators: capture, restore, save."""

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

GENERATORS = threading.RLock()
"""Held while states of torch's generators are read or set.

Torch holds the generator's lock while it makes a tensor for the state. If that collects garbage, it waits for the
interpreter, which another thread may hold while it waits for the generator.
"""


@dataclass(frozen=True)
class HostRngState:
    """RNG state of Python and numpy.

    It is separate, because restoring it takes longer than a forward pass of a small layer.
    """

    python: Any
    numpy: dict[str, Any]

    @classmethod
    def capture(cls) -> "HostRngState":
        """Return the current state."""
        return cls(random.getstate(), np.random.get_state(legacy=False))  # noqa: NPY002

    def restore(self) -> None:
        """Make this the current state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def has_changed(self) -> bool:
        """Return True if random numbers were drawn since the capture."""
        now = HostRngState.capture()
        if now.python != self.python or now.numpy["has_gauss"] != self.numpy["has_gauss"]:
            return True
        states = now.numpy["state"].values(), self.numpy["state"].values()
        return not all(map(np.array_equal, *states))


@dataclass(frozen=True)
class RngState:
    """RNG state of Python, numpy and torch on all devices.

    Examples:
        >>> state = RngState.capture(accelerators=[])
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> torch.equal(torch.rand(2), first)
        True
    """

    host: HostRngState
    cpu: Tensor
    accelerators: Mapping[torch.device, Tensor]

    @classmethod
    def capture(cls, accelerators: Sequence[torch.device]) -> "RngState":
        """Return the current state of host, CPU and ``accelerators``."""
        with GENERATORS:
            on_device = {device: torch.get_device_module(device).get_rng_state(device) for device in accelerators}
            return cls(HostRngState.capture(), torch.get_rng_state(), on_device)

    def restore(self, host: bool = True) -> None:
        """Make this the current state; ``host=False`` skips Python and numpy."""
        if host:
            self.host.restore()
        with GENERATORS:
            torch.set_rng_state(self.cpu)
            for device, state in self.accelerators.items():
                torch.get_device_module(device).set_rng_state(state, device)


def has_rng_state(device: torch.device) -> bool:
    """Return True if a device has its own random numbers.

    Those are the accelerators that torch knows, also by a backend of somebody else.
    """
    if device.type in ("cpu", "meta"):
        return False
    try:
        return hasattr(torch.get_device_module(device), "set_rng_state")
    except RuntimeError:  # There is no module for devices of this type.
        return False


def cpu_rng_state() -> Tensor:
    """Return torch's RNG state on the CPU."""
    with GENERATORS:
        return torch.get_rng_state()


def rng_state_dict(device: torch.device) -> dict[str, Any]:
    """Return the current RNG state as tensors and plain values.

    Those are what a checkpoint can hold without pickled code: the states of Python, numpy, and torch on the CPU and,
    if it is an accelerator, on ``device``.
    """
    now = RngState.capture([device] if has_rng_state(device) else [])
    numpy = tree_map_only(np.ndarray, torch.from_numpy, now.host.numpy)
    return {"python": now.host.python, "numpy": numpy, "cpu": now.cpu, "device": now.accelerators.get(device)}


def load_rng_state_dict(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the RNG state from `rng_state_dict`."""
    numpy = tree_map_only(Tensor, Tensor.numpy, state["numpy"])
    on_device = {} if state["device"] is None else {device: state["device"]}
    RngState(HostRngState(state["python"], numpy), state["cpu"], on_device).restore()
