"""Symmetric memory on a CPU: files that all ranks map, and torch's operations on it in a few lines.

The operations do what their GPU kernels do: a barrier, reading and writing the peers' memory at the offset of one's own
view, a barrier. So another offset or allocation on some rank, or bytes overwritten too early, give wrong numbers.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines the operations
from torch import Tensor

from memplan.runtime import groups
from memplan.runtime.symmetric import BACKENDS, release_arenas


@dataclass
class Mapped:
    """One allocation: every rank's bytes, by rank."""

    ranks: list[Tensor]
    own: int

    def peers(self, view: Tensor) -> list[Tensor] | None:
        """What the view shows, in each rank's memory; None if the view is not in this allocation."""
        offset = view.data_ptr() - self.ranks[self.own].data_ptr()
        nbytes = view.numel() * view.element_size()
        if not 0 <= offset <= self.ranks[self.own].numel() - nbytes:
            return None
        return [t[offset : offset + nbytes].view(view.dtype).view(view.shape) for t in self.ranks]


class SharedFiles:
    """The backend for CPUs."""

    def __init__(self, folder: Path, obstacle: str = "") -> None:
        self.folder, self.told = folder, obstacle
        self.allocations: list[Mapped] = []
        self.sizes: list[int] = []

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        return self.told

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        number = len(self.allocations)
        names = [str(self.folder / f"{number}-{rank}") for rank in range(group.size())]
        own = torch.from_file(names[group.rank()], shared=True, size=nbytes, dtype=torch.uint8)
        dist.barrier(group)
        ranks = [torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8) for name in names]
        ranks[group.rank()] = own
        self.allocations.append(Mapped(ranks, group.rank()))
        self.sizes.append(nbytes)
        return own

    def peers(self, view: Tensor) -> list[Tensor]:
        for allocation in self.allocations:
            found = allocation.peers(view)
            if found is not None:
                return found
        raise RuntimeError("the tensor is not in symmetric memory")


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


_library = torch.library.Library("symm_mem", "IMPL")
for _function in (one_shot_all_reduce_out, two_shot_all_reduce_, two_shot_all_reduce_out):
    _library.impl(_function.__name__, _function, "CPU")


@contextmanager
def shared_files(folder: str, obstacle: str = "") -> Iterator[SharedFiles]:
    """Symmetric memory for CPUs inside the block."""
    torch._dynamo.reset()
    gc.collect()  # programs of other tests would have a say in the size of the arena
    made = SharedFiles(Path(folder), obstacle)
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
