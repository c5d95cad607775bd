"""The processes of a test: ``torchrun rank_worker.py TASK FOLDER`` runs the functions of ``rank_TASK``."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from landscape.distributed.setup import local_device, process_group


def launch(task, processes, folder):
    """Return the results of each rank; a rank that does not end fails the test after 300 s."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__, task, folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *map(str, command)], check=True, timeout=300, env=environment)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def main(task, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with process_group(local_device("cpu")) as ranks:
        tasks = importlib.import_module(f"rank_{task}").TASKS
        torch.save({function.__name__: function(ranks, folder) for function in tasks}, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # torch may abort an interpreter that ends while something still holds a process group
