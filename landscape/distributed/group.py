"""The processes that train one model: collectives, and errors that all of them raise."""

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

from landscape.distributed.devices import common_device, moved_to
from landscape.errors import LandscapeError

T = TypeVar("T")
K = TypeVar("K")


class RankFailedError(LandscapeError):
    """A peer process died.

    Continuing without it would deadlock the other ranks.
    """


@contextmanager
def translate_collective_errors() -> Iterator[None]:
    """Translate errors of torch's collectives in the body.

    Raises:
        RankFailedError: Another process died while a collective waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has a type for errors of NCCL and its store; those of gloo are only known by their text.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankFailedError(
            "A process that trains the model no longer responds: it has failed, or was killed. See the messages of all "
            "processes, and restart them."
        ) from error


class RankGroup:
    """The processes of a group, one of which is this.

    Without a group this process is alone, and nothing is sent.

    Before each collective the ranks exchange in a few bytes whether each of them can continue. So an error on one rank
    is raised on all, they stay in step, and none blocks on a collective that another has given up. The exchange is
    between hosts, so it does not synchronize GPUs.

    Args:
        group: The process group, or None. With a group, this constructor is a collective too.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.

    Examples:
        >>> RankGroup().size
        1
        >>> RankGroup().all_mean(lambda: {"loss": torch.tensor(2.0), "step": 7})
        {'loss': tensor(2.), 'step': 7}
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
        """True if the outermost `run_on_all` has failed on all ranks."""

    @property
    def is_writer(self) -> bool:
        """True if this process writes what all have in common."""
        return self.rank == 0

    def run_on_all(self, compute: Callable[[], T], must_match: Callable[[T], Any] = lambda result: None) -> T:
        """Return this rank's ``compute()`` if it succeeds on all ranks.

        Calls may be nested if all ranks make them in the same order.

        Args:
            compute: Computation of this rank.
            must_match: Part of the result that must be the same on all ranks; its ``repr`` is compared.

        Returns:
            The result of this rank.

        Raises:
            LandscapeError: The results do not match.
            Exception: The error of a rank that failed, on all ranks and with its number; errors of the package and
                RuntimeErrors keep their type.
        """
        if self._group is None:
            return compute()
        self._abandoned &= self._depth > 0
        self._depth += 1
        try:
            with translate_collective_errors():
                result = compute()
            mark = zlib.crc32(repr(must_match(result)).encode())
        except RankFailedError:  # no other rank could take part in an exchange
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

    def all_mean(self, compute: Callable[[], Mapping[K, Any]], local: Container[K] = ()) -> dict[K, Any]:
        """Return ``compute()`` with tensors averaged over the ranks.

        Tensors below single precision are averaged, and returned, in single precision.

        Args:
            compute: Returns tensors, which are averaged, and other values, which must be the same on all ranks.
            local: Keys whose values stay those of each rank.

        Returns:
            The same keys, with the means.

        Raises:
            LandscapeError: Keys, shapes, types or other values differ between ranks.
            Exception: The error of a rank that failed, as in `run_on_all`.
        """
        own = dict(self.run_on_all(compute, lambda own: _signature({key: own[key] for key in own if key not in local})))
        tensors = {key: value.detach() for key, value in own.items() if isinstance(value, Tensor) and key not in local}
        if self._group is None or not tensors:
            return own
        kind = reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()], torch.float32)
        device = common_device(tensors.values())
        parts = [moved_to(tensor.reshape(-1).to(kind), device) for tensor in tensors.values()]
        flat = self.all_reduce_mean_(torch.cat(parts))
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        pairs = zip(tensors.items(), parts, strict=True)
        return own | {key: part.view(tensor.shape).to(tensor.device) for (key, tensor), part in pairs}

    @translate_collective_errors()
    def all_reduce_mean_(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks, in place."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._hosts if tensor.device.type == "cpu" else self._group)
            tensor /= self.size
        return tensor

    @translate_collective_errors()
    def broadcast_bool(self, value: bool) -> bool:
        """Return the writer's ``value`` on all ranks."""
        if self._group is None:
            return value
        received = torch.tensor(value, device="cpu")
        dist.broadcast(received, src=dist.get_global_rank(self._group, 0), group=self._hosts)
        return bool(received)

    @translate_collective_errors()
    def all_gather_bytes(self, own: bytes) -> list[bytes]:
        """Return the bytes of every rank, in rank order."""
        if self._group is None:
            return [own]
        sizes = [torch.tensor(0, device="cpu") for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor(len(own), device="cpu"), self._hosts)
        # One more byte, because torch.frombuffer does not accept an empty buffer.
        padded = torch.frombuffer(bytearray(own.ljust(int(max(sizes)) + 1)), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, self._hosts)
        return [bytes(part[:size].numpy()) for part, size in zip(gathered, sizes, strict=True)]

    def has_untracked_ranks(self) -> bool:
        """Return True if torch has processes outside this group."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > self.size

    @translate_collective_errors()
    def _exchange(self, mark: int, error: Exception | None) -> None:
        """Raise if a rank has an error, or marks differ."""
        assert self._group is not None
        self._abandoned = True  # also if the exchange itself fails
        # One reduction by maximum gives the lowest rank that failed, and the largest and the smallest mark. Of 2 ranks
        # with marks 5 and 7: max([0, 5, -5], [0, 7, -7]) = [0, 7, -5], and 7 != 5. If rank 1 has failed instead:
        # max([0, 5, -5], [1, 0, 0]) = [1, 5, 0], and 2 - 1 is its rank.
        mine = torch.tensor([0 if error is None else self.size - self.rank, mark, -mark], device="cpu")
        dist.all_reduce(mine, dist.ReduceOp.MAX, self._hosts)
        failed, most, least = mine.tolist()
        if failed:
            raise self._broadcast_error(self.size - failed, error) from error
        if most != -least:
            raise LandscapeError(
                "Step sizes, parameters and options of the probe must be the same on all ranks. Give every rank the "
                "same, and make every optimizer step on every rank."
            )
        self._abandoned = False

    def _broadcast_error(self, rank: int, error: Exception | None) -> Exception:
        """Return the error of ``rank`` on all ranks."""
        assert self._group is not None
        sent: list[Any] = [None]
        if rank == self.rank and error is not None:
            kinds = type(error).__mro__
            kind = next(kind for kind in kinds if kind in (RuntimeError, Exception) or _is_ours(kind))
            sent = [(kind, f"rank {rank}: {error or type(error).__name__}")]
        source, host = dist.get_global_rank(self._group, rank), torch.device("cpu")
        dist.broadcast_object_list(sent, source, self._hosts, host)
        kind, message = sent[0]
        return kind(message)


SINGLE_PROCESS = RankGroup()
"""A single process that trains alone."""


def unwrap_parallel(model: nn.Module) -> tuple[nn.Module, RankGroup]:
    """Return the unwrapped model and the ranks that train it.

    The ranks are those of DistributedDataParallel, or those over which fully_shard has sharded the model; any other
    model is trained by this process alone.

    Raises:
        LandscapeError: A DistributedDataParallel is not the outermost module, or a part is wrapped in
            FullyShardedDataParallel.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> unwrap_parallel(model) == (model, SINGLE_PROCESS)
        True
    """
    outermost = isinstance(model, DistributedDataParallel)
    inner = model.module if outermost else model
    if any(isinstance(module, DistributedDataParallel) for module in inner.modules()):
        raise LandscapeError(
            "model contains a DistributedDataParallel: it must be outermost. Wrap the model as a whole, also around "
            "torch.compile, and give the probe what DistributedDataParallel(model) returns."
        )
    if parts := sharded_parts(inner):
        return inner, RankGroup(_sharding_group(parts))
    return inner, RankGroup(model.process_group) if outermost else SINGLE_PROCESS


def sharded_parts(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was applied to.

    Raises:
        LandscapeError: A part is wrapped in the older FullyShardedDataParallel.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes 0.5 s
    if fsdp is None:
        return []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise LandscapeError(
            "model is wrapped in FullyShardedDataParallel, which flattens its parameters: they must keep their names "
            "and shapes. Shard it with torch.distributed.fsdp.fully_shard(model)."
        )
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _sharding_group(parts: Sequence[Any]) -> Any:
    """Return the largest process group that shards the parts."""
    meshes = [p.device_mesh for part in parts for p in part.parameters() if hasattr(p, "device_mesh")]
    ranks = max((mesh.mesh.flatten().tolist() for mesh in meshes), key=len)
    is_world = len(ranks) == dist.get_world_size()
    return dist.group.WORLD if is_world else dist.new_group(ranks, use_local_synchronization=True)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("landscape.")


def _signature(values: Mapping[Any, Any]) -> list[Any]:
    return [
        (key, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (key, value)
        for key, value in values.items()
    ]
