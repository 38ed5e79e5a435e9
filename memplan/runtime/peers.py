"""Allocations of symmetric memory, and operations that fetch what peers have in theirs.

torch's operations on symmetric memory add up (all-reduce, reduce-scatter); its all-gather needs multicast or allocates
its result. So the collectives that only move values are here: a barrier, copies out of the peers' memory into this
rank's result, a barrier, all on the current stream. As with torch's, the first barrier shows that every rank has
written its argument, and the second that it may be overwritten.

``memplan.peer_all_gather.out(input, group, out=)``, ``peer_all_to_all.out(input, group, out=)``,
``peer_broadcast.out(input, source, group, out=)`` and ``peer_broadcast_(input, source, group)`` take dense tensors;
``input`` lies in symmetric memory, at the same place on every rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import CommunicationError

LIBRARY = torch.library.Library("memplan", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Symmetric:
    """One allocation of a group, as one rank has it.

    Attributes
    ----------
    own:
        This rank's bytes.
    ranks:
        Every rank's bytes, by rank, this one's among them.
    rank:
        This rank.
    barrier:
        Puts on the current stream that it waits until all ranks' streams have come there.
    multicast:
        Whether one address stands for the memory of all ranks.
    """

    own: Tensor
    ranks: Sequence[Tensor]
    rank: int
    barrier: Callable[[], None]
    multicast: bool = False

    def __post_init__(self) -> None:
        _allocations.add(self)

    def close(self) -> None:
        """Nothing: the peers' memory is given back with the tensors."""

    def offset(self, view: Tensor) -> int | None:
        """Where a dense view begins in it, in bytes; None if it lies somewhere else."""
        if view.device != self.own.device:
            return None
        at = view.data_ptr() - self.own.data_ptr()
        return at if 0 <= at <= self.own.numel() - view.numel() * view.element_size() else None

    def at_peers(self, view: Tensor, offset: int) -> list[Tensor]:
        """What lies there in every rank's memory, flat, by rank."""
        nbytes = view.numel() * view.element_size()
        return [memory[offset : offset + nbytes].view(view.dtype) for memory in self.ranks]


_allocations: weakref.WeakSet[Symmetric] = weakref.WeakSet()


def _found(view: Tensor, operation: str) -> tuple[Symmetric, list[Tensor]]:
    for allocation in tuple(_allocations):
        at = allocation.offset(view)
        if at is not None:
            return allocation, allocation.at_peers(view, at)
    raise CommunicationError(f"{operation} was given a tensor that is not in symmetric memory")


def _check(operation: str, group: str, ranks: int, given: int, taken: int, expected: int) -> None:
    if taken != expected:
        raise CommunicationError(
            f"{operation} of {given} elements in process group {group!r} has a result of {taken}, and on its {ranks} "
            f"ranks that is {expected}: the program was compiled for a group of another size; compile again"
        )


def _all_gather(input: Tensor, group_name: str, *, out: Tensor) -> Tensor:
    allocation, peers = _found(input, "an all-gather")
    ranks, count = len(peers), input.numel()
    _check("an all-gather", group_name, ranks, count, out.numel(), ranks * count)
    allocation.barrier()
    torch.cat(peers, out=out.view(-1))  # one kernel
    allocation.barrier()
    return out


def _all_to_all(input: Tensor, group_name: str, *, out: Tensor) -> Tensor:
    allocation, peers = _found(input, "an all-to-all")
    ranks, count = len(peers), input.numel()
    _check("an all-to-all", group_name, ranks, count, out.numel(), count // ranks * ranks)
    allocation.barrier()
    torch.cat([p.view(ranks, -1)[allocation.rank] for p in peers], out=out.view(-1))
    allocation.barrier()
    return out


def _broadcast(input: Tensor, src: int, group_name: str, *, out: Tensor) -> Tensor:
    allocation, peers = _found(input, "a broadcast")
    allocation.barrier()
    out.view(-1).copy_(peers[src])
    allocation.barrier()
    return out


def _broadcast_(input: Tensor, src: int, group_name: str) -> Tensor:
    allocation, peers = _found(input, "a broadcast")
    allocation.barrier()
    if src != allocation.rank:
        input.view(-1).copy_(peers[src])
    allocation.barrier()
    return input


if not hasattr(torch.ops.memplan, "peer_broadcast_"):
    for _schema, _function in (
        ("peer_all_gather.out(Tensor input, str group_name, *, Tensor(a!) out) -> Tensor(a!)", _all_gather),
        ("peer_all_to_all.out(Tensor input, str group_name, *, Tensor(a!) out) -> Tensor(a!)", _all_to_all),
        ("peer_broadcast.out(Tensor input, int src, str group_name, *, Tensor(a!) out) -> Tensor(a!)", _broadcast),
        ("peer_broadcast_(Tensor(a!) input, int src, str group_name) -> Tensor(a!)", _broadcast_),
    ):
        LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
        LIBRARY.impl(_schema.partition("(")[0], _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
