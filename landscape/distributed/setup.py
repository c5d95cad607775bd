"""Processes that torchrun has started: how many, which device, how they join."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from landscape.distributed.group import RankGroup, translate_collective_errors


def world_size() -> int | None:
    """How many processes torchrun has started, of which this is one; None if it has not."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def local_device(kind: str) -> torch.device:
    """The device of this process among those that torchrun has started: the CPU, or a GPU for each of them."""
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


@contextmanager
def process_group(device: torch.device) -> Iterator[RankGroup]:
    """Join the processes that torchrun has started; they part after the body.

    Args:
        device: Where this process trains: gloo connects CPUs, NCCL GPUs (and gloo their hosts).

    Raises:
        RankFailedError: One of them has died while the others trained.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with translate_collective_errors():
            yield RankGroup(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
