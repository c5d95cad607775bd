"""A training script in which a process is killed: ``rank_deaths.py MODEL MOMENT RANK FOLDER``."""

import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from landscape import LandscapeProbe

STEP = 5
"""Update in which it is killed."""
FLUSHED = 3
"""Updates after which the trace is flushed."""


def train(kind, moment, victim, folder):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    if kind == "sharded":
        fully_shard(network[0])
        fully_shard(network[2])
    model = fully_shard(network) if kind == "sharded" else DistributedDataParallel(network)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    probe = LandscapeProbe(model, optimizer, criterion, engine="loop", step_sizes=[0.1, 0.4], trace=f"{folder}/run")

    def die(now):
        if (now, dist.get_rank(), probe.step) == (moment, victim, STEP):
            os.kill(os.getpid(), signal.SIGKILL)

    # Within a forward pass of the probe, which is without gradients.
    network[1].register_forward_hook(lambda *_: None if torch.is_grad_enabled() else die("probing"))
    with probe:
        for step in range(20):
            optimizer.zero_grad()
            loss = criterion(model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))
            die("training")
            loss.backward()
            optimizer.step()
            if step + 1 == FLUSHED:
                probe.trace.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    dist.init_process_group("gloo")
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
