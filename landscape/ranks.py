"""Processes that train one model together: how they start, what they average, and that they give up as one."""

import logging
import os
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from landscape.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

T = TypeVar("T")
K = TypeVar("K")

MISTAKE = 2
"""Exit code of a process that has told the user what to do."""


class Ranks:
    """The processes of a group, of which this is one; without a group this process is alone, and nothing is sent.

    Each collective comes after a small exchange in which every rank says whether it can go on. So an error on one of
    them is an error on all, they stay in step, and none waits for another that has given up. The exchange is between
    hosts: no GPU is waited for.

    Args:
        group: The process group, or None. With a group this call is a collective itself.

    Attributes:
        rank: Which of the processes this is, from 0 on.
        size: How many there are.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._group = group if self.size > 1 else None
        self._hosts: Any = self._group
        if self._group and "cpu:" not in str(dist.get_backend_config(self._group)):
            members = dist.get_process_group_ranks(self._group)
            self._hosts = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        self._depth = 0
        self._abandoned = False
        """Whether all ranks know that what they are in the middle of has failed."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes what is common to all."""
        return self.rank == 0

    def agree(self, compute: Callable[[], T], alike: Callable[[T], Any] = lambda result: None) -> T:
        """This rank's own ``compute()``, if all ranks get through theirs.

        A computation may contain others, as long as all ranks call them in the same order.

        Args:
            compute: Whatever this rank does by itself.
            alike: What of the result has to be the same on all ranks; its ``repr`` is compared.

        Raises:
            UserError: The results are not alike.
            Exception: That of a rank that failed, on all ranks and with its number; errors of the package and
                RuntimeErrors keep their type.
        """
        if self._group is None:
            return compute()
        self._abandoned &= self._depth > 0
        self._depth += 1
        try:
            result = compute()
            mark = zlib.crc32(repr(alike(result)).encode())
        except Exception as error:
            if not self._abandoned:
                self._exchange(0, error)
            raise
        else:
            self._exchange(mark, None)
            return result
        finally:
            self._depth -= 1

    def mean(self, compute: Callable[[], Mapping[K, Any]]) -> dict[K, Any]:
        """The means of ``compute()`` over the ranks: of its tensors; everything else has to be the same on all.

        Tensors of less than single precision are averaged, and given back, in single precision.

        Raises:
            UserError: The ranks do not compute the same things.
            Exception: As for :meth:`agree`.
        """
        own = dict(self.agree(compute, _outline))
        tensors = {key: value.detach() for key, value in own.items() if isinstance(value, Tensor)}
        if self._group is None or not tensors:
            return own
        kind = reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()], torch.float32)
        device = next(iter(tensors.values())).device
        flat = torch.cat([tensor.reshape(-1).to(device, kind) for tensor in tensors.values()])
        dist.all_reduce(flat, group=self._hosts if device.type == "cpu" else self._group)
        parts = flat.div_(self.size).split([tensor.numel() for tensor in tensors.values()])
        pairs = zip(tensors.items(), parts, strict=True)
        return own | {key: part.view(tensor.shape).to(tensor.device) for (key, tensor), part in pairs}

    def decide(self, value: bool) -> bool:
        """The writer's ``value``, on all ranks."""
        if self._group is None:
            return value
        told = torch.tensor(value)
        dist.broadcast(told, src=dist.get_global_rank(self._group, 0), group=self._hosts)
        return bool(told)

    def others(self) -> bool:
        """Whether torch knows of processes beside these."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > self.size

    def _exchange(self, mark: int, error: Exception | None) -> None:
        """Tell all ranks of an error, or of what has to be alike; raise on all of them if something is not right."""
        assert self._group is not None
        self._abandoned = True  # also if the exchange itself fails
        mine = torch.tensor([0 if error is None else self.size - self.rank, mark, -mark])
        dist.all_reduce(mine, dist.ReduceOp.MAX, self._hosts)
        failed, most, least = mine.tolist()
        if failed:
            raise self._told(self.size - failed, error) from error
        if most != -least:
            raise UserError(
                "The ranks do not measure the same (step sizes, parameters, options of the probe); give the probe the "
                "same on every rank, and let every rank make every optimizer step."
            )
        self._abandoned = False

    def _told(self, rank: int, error: Exception | None) -> Exception:
        """The error of that rank, as all others can raise it too."""
        assert self._group is not None
        told: list[Any] = [None]
        if rank == self.rank and error is not None:
            kinds = type(error).__mro__
            kind = next(kind for kind in kinds if kind in (RuntimeError, Exception) or _is_ours(kind))
            told = [(kind, f"rank {rank}: {error or type(error).__name__}")]
        source, host = dist.get_global_rank(self._group, rank), torch.device("cpu")
        dist.broadcast_object_list(told, source, self._hosts, host)
        kind, message = told[0]
        return kind(message)


ALONE = Ranks()
"""A process that trains by itself."""


def inside(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """The model that DistributedDataParallel trains and the ranks that train it; any other model is trained alone.

    Raises:
        UserError: There is a DistributedDataParallel further in.
    """
    outermost = isinstance(model, DistributedDataParallel)
    inner = model.module if outermost else model
    if any(isinstance(module, DistributedDataParallel) for module in inner.modules()):
        raise UserError(
            "There is a DistributedDataParallel inside of the model. Wrap the model as a whole, outermost (also around "
            "torch.compile), and give the probe what DistributedDataParallel(model) returns."
        )
    return inner, Ranks(model.process_group) if outermost else ALONE


def launched() -> int | None:
    """How many processes torchrun has started, of which this is one; None if it has not."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def own_device(kind: str) -> torch.device:
    """The device of this process among those that torchrun has started: the CPU, or a GPU for each of them."""
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun has started; they part after the body.

    Args:
        device: Where this process trains: gloo connects CPUs, NCCL GPUs (and gloo their hosts).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def torchrun(arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m landscape_cli`` with these arguments in several processes of this machine, by torchrun.

    What the first of them prints is seen; of the others only what one leaves behind that fails.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        UserError: What the processes say that the user should do.
        KeyboardInterrupt: The user stopped it; so are the processes.
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
            return _failed(error.get_first_failure()[1], Path(folder))
        except SignalException as error:
            raise KeyboardInterrupt from error
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _failed(failure: "ProcessFailure", folder: Path) -> int:
    """The exit code of a process that failed, after what it has printed; a UserError if it says that it is one."""
    if failure.exitcode == MISTAKE:
        raise UserError(failure.message)
    for printed in folder.rglob(f"{failure.local_rank}/stderr.log"):
        sys.stderr.write(printed.read_text(errors="replace"))
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    print(f"Process {failure.local_rank} failed with exit code {code}.", file=sys.stderr)
    return code


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("landscape.")


def _outline(values: Mapping[Any, Any]) -> list[Any]:
    return [
        (key, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (key, value)
        for key, value in values.items()
    ]
