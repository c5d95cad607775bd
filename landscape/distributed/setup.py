"""The processes that torchrun has started: number, devices, process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from landscape.distributed.group import RankGroup, translate_collective_errors


def world_size() -> int | None:
    """Return the number of processes, or None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def local_device(kind: str) -> torch.device:
    """Return the CPU, or this process's GPU under torchrun."""
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


@contextmanager
def process_group(device: torch.device) -> Iterator[RankGroup]:
    """Join the process group of torchrun for the body.

    Args:
        device: The device of this process. CPUs are connected by gloo, GPUs by NCCL, their hosts by gloo.

    Yields:
        The processes.

    Raises:
        RankFailedError: One of them died while the others trained.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with translate_collective_errors():
            yield RankGroup(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
