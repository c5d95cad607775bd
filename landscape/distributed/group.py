"""Processes that train one model together: what they average, and that they give up as one."""

import sys
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from landscape.errors import LandscapeError

T = TypeVar("T")
K = TypeVar("K")


class RankFailedError(LandscapeError):
    """Another process of the group no longer answers; who goes on without it lets the rest of them wait."""


@contextmanager
def translate_collective_errors() -> Iterator[None]:
    """Say it in plain words if a process of the group dies while the body waits for it.

    Raises:
        RankFailedError: Instead of what torch's collectives raise.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has a type for what NCCL and its store say; what gloo says is known by its words.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankFailedError(
            "Another of the processes that train the model no longer answers: it has failed, or was killed."
        ) from error


class RankGroup:
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

    def run_on_all(self, compute: Callable[[], T], alike: Callable[[T], Any] = lambda result: None) -> T:
        """This rank's own ``compute()``, if all ranks get through theirs.

        A computation may contain others, as long as all ranks call them in the same order.

        Args:
            compute: Whatever this rank does by itself.
            alike: What of the result has to be the same on all ranks; its ``repr`` is compared.

        Raises:
            LandscapeError: The results are not alike.
            Exception: That of a rank that failed, on all ranks and with its number; errors of the package and
                RuntimeErrors keep their type.
        """
        if self._group is None:
            return compute()
        self._abandoned &= self._depth > 0
        self._depth += 1
        try:
            with translate_collective_errors():
                result = compute()
            mark = zlib.crc32(repr(alike(result)).encode())
        except RankFailedError:  # nobody is left to be told
            raise
        except Exception as error:
            if not self._abandoned:
                self._exchange(0, error)
            raise
        else:
            self._exchange(mark, None)
            return result
        finally:
            self._depth -= 1

    def all_mean(self, compute: Callable[[], Mapping[K, Any]], apart: Container[K] = ()) -> dict[K, Any]:
        """The means of ``compute()`` over the ranks: of its tensors; everything else has to be the same on all.

        Tensors of less than single precision are averaged, and given back, in single precision. What is ``apart`` is
        each rank's own, and stays as it is.

        Raises:
            LandscapeError: The ranks do not compute the same things.
            Exception: As for :meth:`agree`.
        """
        own = dict(self.run_on_all(compute, lambda own: _outline({key: own[key] for key in own if key not in apart})))
        tensors = {key: value.detach() for key, value in own.items() if isinstance(value, Tensor) and key not in apart}
        if self._group is None or not tensors:
            return own
        kind = reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()], torch.float32)
        device = next(iter(tensors.values())).device
        flat = self.all_reduce_mean_(torch.cat([tensor.reshape(-1).to(device, kind) for tensor in tensors.values()]))
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        pairs = zip(tensors.items(), parts, strict=True)
        return own | {key: part.view(tensor.shape).to(tensor.device) for (key, tensor), part in pairs}

    @translate_collective_errors()
    def all_reduce_mean_(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, all of which have one like it; it is written to."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._hosts if tensor.device.type == "cpu" else self._group)
            tensor /= self.size
        return tensor

    @translate_collective_errors()
    def broadcast_bool(self, value: bool) -> bool:
        """The writer's ``value``, on all ranks."""
        if self._group is None:
            return value
        told = torch.tensor(value)
        dist.broadcast(told, src=dist.get_global_rank(self._group, 0), group=self._hosts)
        return bool(told)

    @translate_collective_errors()
    def all_gather_bytes(self, own: bytes) -> list[bytes]:
        """What every rank has to say, in their order, on all of them."""
        if self._group is None:
            return [own]
        sizes = [torch.tensor(0) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor(len(own)), self._hosts)
        # One byte more, because nothing may be nothing at all.
        padded = torch.frombuffer(bytearray(own.ljust(int(max(sizes)) + 1)), dtype=torch.uint8)
        shared = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shared, padded, self._hosts)
        return [bytes(part[:size].numpy()) for part, size in zip(shared, sizes, strict=True)]

    def has_untracked_ranks(self) -> bool:
        """Whether torch knows of processes beside these."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > self.size

    @translate_collective_errors()
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
            raise LandscapeError(
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


SINGLE_PROCESS = RankGroup()
"""A process that trains by itself."""


def unwrap_parallel(model: nn.Module) -> tuple[nn.Module, RankGroup]:
    """The model inside of what the user's loop calls, and the ranks that train it.

    They are those of DistributedDataParallel, or those that fully_shard has spread the model over; any other model is
    trained by this process alone.

    Raises:
        LandscapeError: There is a DistributedDataParallel further in, or a FullyShardedDataParallel.
    """
    outermost = isinstance(model, DistributedDataParallel)
    inner = model.module if outermost else model
    if any(isinstance(module, DistributedDataParallel) for module in inner.modules()):
        raise LandscapeError(
            "There is a DistributedDataParallel inside of the model. Wrap the model as a whole, outermost (also around "
            "torch.compile), and give the probe what DistributedDataParallel(model) returns."
        )
    if parts := sharded_parts(inner):
        return inner, RankGroup(_spread_over(parts))
    return inner, RankGroup(model.process_group) if outermost else SINGLE_PROCESS


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was applied to.

    Raises:
        LandscapeError: A part is wrapped in the older FullyShardedDataParallel.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes half a second
    if fsdp is None:
        return []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise LandscapeError(
            "The model is wrapped in FullyShardedDataParallel, whose parameters cannot be told apart; shard it with "
            "torch.distributed.fsdp.fully_shard(model) instead."
        )
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _spread_over(parts: Sequence[Any]) -> Any:
    """The group of all processes that the parts are spread over: the largest, if there are several."""
    meshes = [p.device_mesh for part in parts for p in part.parameters() if hasattr(p, "device_mesh")]
    ranks = max((mesh.mesh.flatten().tolist() for mesh in meshes), key=len)
    everyone = len(ranks) == dist.get_world_size()
    return dist.group.WORLD if everyone else dist.new_group(ranks, use_local_synchronization=True)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("landscape.")


def _outline(values: Mapping[Any, Any]) -> list[Any]:
    return [
        (key, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (key, value)
        for key, value in values.items()
    ]
