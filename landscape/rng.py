"""The state of random number generators: captured, restored, saved."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class HostRngState:
    """The state of Python's and numpy's random streams, which take longer to put back than a small layer takes."""

    python: Any
    numpy: dict[str, Any]

    @classmethod
    def capture(cls) -> "HostRngState":
        """The state as it is now."""
        return cls(random.getstate(), np.random.get_state(legacy=False))  # noqa: NPY002

    def restore(self) -> None:
        """Make it the current state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def has_changed(self) -> bool:
        """Whether anything was drawn since."""
        now = HostRngState.capture()
        if now.python != self.python or now.numpy["has_gauss"] != self.numpy["has_gauss"]:
            return True
        states = now.numpy["state"].values(), self.numpy["state"].values()
        return not all(map(np.array_equal, *states))


@dataclass(frozen=True)
class RngState:
    """The state of every global random stream: the host's, torch's on the CPU and on accelerators."""

    host: HostRngState
    cpu: Tensor
    accelerators: Mapping[torch.device, Tensor]

    @classmethod
    def capture(cls, accelerators: Sequence[torch.device]) -> "RngState":
        """The state as it is now, on the host and on the ``accelerators``."""
        on_device = {device: torch.get_device_module(device).get_rng_state(device) for device in accelerators}
        return cls(HostRngState.capture(), torch.get_rng_state(), on_device)

    def restore(self, host: bool = True) -> None:
        """Make it the current state; ``host=False`` leaves out the streams of Python and numpy."""
        if host:
            self.host.restore()
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)


def rng_state_dict(device: torch.device) -> dict[str, Any]:
    """The global random streams (Python's, numpy's, torch's on the CPU and the device), in a form that can be saved."""
    now = RngState.capture([device] if device.type == "cuda" else [])
    numpy = tree_map_only(np.ndarray, torch.from_numpy, now.host.numpy)
    return {"python": now.host.python, "numpy": numpy, "cpu": now.cpu, "device": now.accelerators.get(device)}


def load_rng_state_dict(state: Mapping[str, Any], device: torch.device) -> None:
    """Make what ``streams`` gave the current state again."""
    numpy = tree_map_only(Tensor, Tensor.numpy, state["numpy"])
    on_device = {} if state["device"] is None else {device: state["device"]}
    RngState(HostRngState(state["python"], numpy), state["cpu"], on_device).restore()
