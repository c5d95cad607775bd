"""Numbers that are spread over several devices, brought together without waiting for one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def common_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return the first accelerator among the devices, or the CPU.

    Copies to it do not wait, unlike copies to the host.
    """
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device.

    From the host it is copied without waiting for the device.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of the same shape, on any devices.

    Examples:
        >>> stacked([torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)])
        tensor([1., 2.], dtype=torch.float64)
    """
    device = common_device(tensors)
    return torch.stack([moved_to(tensor, device) for tensor in tensors])
