"""The command in several processes, started by torchrun, with one line for a failure."""

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


USAGE_ERROR = 2
"""Exit code of a process that has printed a usage error."""


def torchrun(arguments: Sequence[str], processes: int, hint: str = "") -> int:
    """Run ``landscape`` in several processes of this machine.

    The output of rank 0 is shown; that of another rank only if it failed first.

    Args:
        arguments: Arguments of the command.
        processes: Number of processes.
        hint: Sentence printed after a failure.

    Returns:
        Exit code: 0, that of the process that failed first, or 128 plus the number of the signal that ended the
        processes.

    Raises:
        LandscapeError: The processes report a usage error.
    """
    # torchrun is called as a function, because the command adds two tracebacks of its own to an error.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    with tempfile.TemporaryDirectory(prefix="landscape-") as folder:
        redirects = {rank: Std.ALL if rank else Std.NONE for rank in range(processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            max_restarts=0,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            logs_specs=DefaultLogsSpecs(folder, redirects=redirects),
        )
        logging.disable(logging.ERROR)
        try:
            elastic_launch(config, sys.executable)("-m", "landscape_cli", *arguments)
        except ChildFailedError as error:
            return _report(error.failures.values(), Path(folder), hint)
        except SignalException as error:  # torchrun has sent the signal to the processes, too.
            return 128 + error.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _report(failures: "Collection[ProcessFailure]", folder: Path, hint: str) -> int:
    """Print the first failure; return its exit code."""
    first = min(failures, key=_order)
    code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    if code == USAGE_ERROR:
        raise LandscapeError(first.message)
    if code == 128 + signal.SIGTERM:  # Every process was stopped, so none failed.
        return code
    for log in folder.rglob(f"{first.local_rank}/stderr.log"):
        sys.stderr.write(log.read_text(errors="replace"))
    print(f"Process {first.local_rank} {_describe(first.exitcode)}, so the others were stopped.", hint, file=sys.stderr)
    return code


def _order(failure: "ProcessFailure") -> tuple[int, int]:
    """Return a sort key, by which causes precede consequences.

    After process 2 is killed, process 0 may fail because it lost a peer, and torchrun stops the others by SIGTERM::

        rank      0      1          2          3
        exitcode  1      -SIGTERM   -SIGKILL   -SIGTERM
        key       -1     2          -2         2
    """
    consequences = (USAGE_ERROR, 128 + signal.SIGTERM, -signal.SIGTERM)
    cause = -2 if failure.exitcode < 0 else -1
    return consequences.index(failure.exitcode) if failure.exitcode in consequences else cause, failure.timestamp


def _describe(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
