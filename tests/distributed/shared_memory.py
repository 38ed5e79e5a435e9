"""Symmetric memory on a CPU: files that all ranks map, and torch's operations on it in a few lines.

The operations do what their GPU kernels do: a barrier, reading and writing the peers' memory at the offset of one's own
view, a barrier. So another offset or allocation on some rank, or bytes overwritten too early, give wrong numbers.
"""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines the operations
from torch import Tensor

from memplan.runtime import groups
from memplan.runtime.arenas import release_arenas
from memplan.runtime.peers import Symmetric
from memplan.runtime.registered import LIBRARIES, Registered
from memplan.runtime.symmetric import BACKENDS


class SharedFiles:
    """The backend for CPUs."""

    def __init__(self, folder: Path, obstacle: str = "", no_multicast: str = "files have none") -> None:
        self.folder, self.told, self.no_multicast = folder, obstacle, no_multicast
        self.allocations: list[weakref.ref[Symmetric]] = []
        self.sizes: list[int] = []
        self.numbers: Counter[str] = Counter()  # allocations, by group

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        return self.told

    def multicast_obstacle(self, device: torch.device) -> str:
        return self.no_multicast

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Symmetric:
        number = self.numbers[group.group_name]
        self.numbers[group.group_name] += 1
        names = [str(self.folder / f"{group.group_name}-{number}-{rank}") for rank in range(group.size())]
        own = torch.from_file(names[group.rank()], shared=True, size=nbytes, dtype=torch.uint8)
        dist.barrier(group)
        ranks = [torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8) for name in names]
        ranks[group.rank()] = own
        made = Symmetric(own, ranks, group.rank(), partial(_barrier, group.group_name), not self.no_multicast)
        self.allocations.append(weakref.ref(made))
        self.sizes.append(nbytes)
        return made

    @property
    def alive(self) -> int:
        """Allocations that something still holds."""
        return sum(found() is not None for found in self.allocations)

    def peers(self, view: Tensor) -> list[Tensor]:
        """What the view shows, in each rank's memory."""
        for allocation in filter(None, (found() for found in self.allocations)):
            at = allocation.offset(view)
            if at is not None:
                return [p.view(view.shape) for p in allocation.at_peers(view, at)]
        raise RuntimeError("the tensor is not in symmetric memory")


class RegisteredMemory:
    """Memory that a library would know, of which is kept what is there; the library itself (gloo) takes any."""

    def __init__(self, obstacle: str = "") -> None:
        self.told = obstacle
        self.alive: list[Tensor] = []
        self.made: list[int] = []

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        return self.told

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Registered:
        own = torch.empty(nbytes, dtype=torch.uint8)
        dist.barrier(group)  # collective, as NCCL's is
        self.alive.append(own)
        self.made.append(nbytes)
        return Registered(own, partial(self.unregister, own))

    def unregister(self, own: Tensor) -> None:
        self.alive = [t for t in self.alive if t is not own]


#: the backend in use, and how long ranks tarry at barriers at most, in seconds
current: list[SharedFiles] = []
tarry = [0.0]
_random = random.Random()


def _barrier(group: str) -> None:
    if tarry[0]:
        time.sleep(_random.random() * tarry[0])
    dist.barrier(dist.distributed_c10d._resolve_process_group(group))


def one_shot_all_reduce_out(input: Tensor, reduce_op: str, group_name: str, out: Tensor) -> Tensor:
    assert reduce_op == "sum"
    peers = current[-1].peers(input)
    _barrier(group_name)
    out.copy_(sum(peers[1:], peers[0]))
    _barrier(group_name)
    return out


def two_shot_all_reduce_(input: Tensor, reduce_op: str, group_name: str) -> Tensor:
    peers = current[-1].peers(input)
    group = dist.distributed_c10d._resolve_process_group(group_name)
    _barrier(group_name)
    part = slice(group.rank() * input.numel() // group.size(), (group.rank() + 1) * input.numel() // group.size())
    whole = sum((p.flatten()[part] for p in peers[1:]), peers[0].flatten()[part].clone())
    for peer in peers:
        peer.view(-1)[part] = whole
    _barrier(group_name)
    return input


def two_shot_all_reduce_out(input: Tensor, reduce_op: str, group_name: str, output: Tensor) -> Tensor:
    return output.copy_(two_shot_all_reduce_(input, reduce_op, group_name))


def reduce_scatter_out(input: Tensor, group_name: str, split_last_dim: bool, output: Tensor) -> Tensor:
    assert not split_last_dim
    assert input.dim() == output.dim() == 1  # as the kernel asks
    peers = current[-1].peers(input)
    group = dist.distributed_c10d._resolve_process_group(group_name)
    assert output.numel() * group.size() == input.numel()
    _barrier(group_name)
    parts = [p.view(group.size(), -1)[group.rank()] for p in peers]
    output.copy_(sum(parts[1:], parts[0]))
    _barrier(group_name)
    return output


def multimem_all_reduce_(input: Tensor, reduce_op: str, group_name: str) -> Tensor:
    return two_shot_all_reduce_(input, reduce_op, group_name)


def multimem_one_shot_all_reduce_out(input: Tensor, reduce_op: str, group_name: str, out: Tensor) -> Tensor:
    return one_shot_all_reduce_out(input, reduce_op, group_name, out)


def multimem_all_gather_out(input: Tensor, group_name: str, out: Tensor) -> Tensor:
    peers, rank = current[-1].peers(out), dist.distributed_c10d._resolve_process_group(group_name).rank()
    assert out.shape == (len(peers) * input.shape[0], *input.shape[1:])
    _barrier(group_name)
    for peer in peers:
        peer.view(len(peers), -1)[rank] = input.view(-1)
    _barrier(group_name)
    return out


_OPERATIONS = (
    one_shot_all_reduce_out, two_shot_all_reduce_, two_shot_all_reduce_out, reduce_scatter_out,
    multimem_all_reduce_, multimem_one_shot_all_reduce_out, multimem_all_gather_out,
)  # fmt: skip
_library = torch.library.Library("symm_mem", "IMPL")
for _function in _OPERATIONS:
    _library.impl(_function.__name__, _function, "CPU")


@contextmanager
def registered_memory(obstacle: str = "") -> Iterator[RegisteredMemory]:
    """A library for CPUs that registers memory inside the block."""
    torch._dynamo.reset()
    gc.collect()
    made = LIBRARIES["cpu"] = RegisteredMemory(obstacle)
    groups._known.clear()
    try:
        yield made
    finally:
        release_arenas()
        del LIBRARIES["cpu"]
        groups._known.clear()


@contextmanager
def shared_files(folder: str, obstacle: str = "", no_multicast: str = "files have none") -> Iterator[SharedFiles]:
    """Symmetric memory for CPUs inside the block."""
    torch._dynamo.reset()
    gc.collect()  # programs of other tests would have a say in the size of the arena
    made = SharedFiles(Path(folder), obstacle, no_multicast)
    current.append(made)
    BACKENDS["cpu"] = made
    groups._known.clear()
    try:
        yield made
    finally:
        release_arenas()
        del BACKENDS["cpu"]
        groups._known.clear()
        current.pop()
