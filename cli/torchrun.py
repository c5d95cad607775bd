"""Runs the command in several processes, by torchrun, and reports the one that failed."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from landscape.errors import LandscapeError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


MISTAKE = 2
"""Exit code of a process that has told the user what to do."""


def torchrun(arguments: Sequence[str], processes: int, afterwards: str = "") -> int:
    """Run ``python -m landscape_cli`` with these arguments in several processes of this machine, by torchrun.

    What the first of them prints is seen; of the others only what one leaves behind that fails.

    Args:
        arguments: The arguments, without the name of the command.
        processes: How many processes.
        afterwards: What is said behind a word on the process that has died.

    Returns:
        The exit code: 0, that of the process that failed first, or 128 and the number of the signal that ended it, or
        all of them.

    Raises:
        LandscapeError: What the processes say that the user should do.
    """
    # torchrun as a function, because as a command it adds two tracebacks of its own to an error.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    with tempfile.TemporaryDirectory(prefix="landscape-") as folder:
        silent = {rank: Std.ALL if rank else Std.NONE for rank in range(processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            max_restarts=0,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            logs_specs=DefaultLogsSpecs(folder, redirects=silent),
        )
        logging.disable(logging.ERROR)
        try:
            elastic_launch(config, sys.executable)("-m", "landscape_cli", *arguments)
        except ChildFailedError as error:
            return _failed(error.failures.values(), Path(folder), afterwards)
        except SignalException as error:  # which the processes got, too
            return 128 + error.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _failed(failures: "Collection[ProcessFailure]", folder: Path, afterwards: str) -> int:
    """The exit code of the process that failed by itself, after what it has printed; a LandscapeError if it says so."""
    first = min(failures, key=_consequence)
    code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    if code == MISTAKE:
        raise LandscapeError(first.message)
    if code == 128 + signal.SIGTERM:  # nobody has failed; they were told to stop
        return code
    for printed in folder.rglob(f"{first.local_rank}/stderr.log"):
        sys.stderr.write(printed.read_text(errors="replace"))
    end = f"Process {first.local_rank} {_end(first.exitcode)}; so the others were stopped."
    print(end, afterwards, file=sys.stderr)
    return code


def _consequence(failure: "ProcessFailure") -> tuple[int, int]:
    """Rather than the cause: where one was killed the others miss it, and torchrun ends them all by SIGTERM."""
    kinds = (MISTAKE, 128 + signal.SIGTERM, -signal.SIGTERM)
    by_itself = -2 if failure.exitcode < 0 else -1
    return kinds.index(failure.exitcode) if failure.exitcode in kinds else by_itself, failure.timestamp


def _end(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    hint = ", as by a system that runs out of memory" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
