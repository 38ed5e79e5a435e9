"""Arenas of communication memory, shared by this process's compiled programs: one a device, process group and type.

An allocation of communication memory is collective: every rank makes it, of the same size, and learns where its peers'
are. So an arena is made (or made larger) only inside of an agreement of all ranks (`memplan.runtime.agreement`), at
the first call of a program that needs more. It goes when the last program that uses it has gone, and with its process
group. Every call of a program finds it at the same place, unless it grew.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..ir.communication import Memory
from ..ir.errors import CommunicationError
from .process_groups import group_timeout, resolve
from .registered import LIBRARIES
from .symmetric import BACKENDS
from .watch import Watch, stream_at

log = logging.getLogger(__name__)


class Allocation(Protocol):
    """The memory of an arena, as one rank has it; ``own`` are this rank's bytes."""

    own: torch.Tensor

    def close(self) -> None:
        """Called once, when nothing on the device can still use the memory."""
        ...


def allocate(memory: Memory, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Allocation:
    """``nbytes`` bytes of a type of communication memory; called on all ranks with the same arguments."""
    if memory is Memory.REGISTERED:
        _unregister_before_groups_go()
        return LIBRARIES[device.type].allocate(nbytes, group, device)
    return BACKENDS[device.type].allocate(nbytes, group, device)


@functools.cache
def _unregister_before_groups_go() -> None:
    """Have `destroy_process_group`, and the end of the process, give registered arenas back first.

    A library must be told that memory goes while it is still there, and torch tells nobody that it is about to end it.
    """
    real = distributed_c10d.destroy_process_group

    @functools.wraps(real)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        _unregister(None if group is dist.group.WORLD else group)
        real(group)

    for module in (dist, distributed_c10d):
        module.destroy_process_group = destroy_process_group  # type: ignore[attr-defined]
    atexit.register(_unregister, None)


def _unregister(group: dist.ProcessGroup | None) -> None:
    """Give back the registered arenas of a group, of all of them for None."""
    for arena in arenas():
        if arena.type is Memory.REGISTERED and (group is None or arena.process_group() is group):
            arena.release()


@dataclass(eq=False)
class Arena:
    """Memory of one type, of one device and group. ``generation`` counts its allocations, equally on all ranks."""

    group: str
    device: torch.device
    process_group: weakref.ref[dist.ProcessGroup]
    type: Memory = Memory.SYMMETRIC
    generation: int = 0
    memory: Allocation | None = None
    #: programs' tensors in it, by use and number
    views: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    #: the raw stream on which it was used last
    stream: int = 0
    users: dict[int, int] = field(default_factory=dict)  # bytes by use
    calls: int = 0
    watch: Watch | None = None
    #: recorded at the end of every call; the watch takes it and leaves None
    event: torch.cuda.Event | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.memory is None else self.memory.own.numel()

    @property
    def needed(self) -> int:
        """Bytes that the program with the largest arena has planned."""
        return max(self.users.values(), default=0)

    def grow(self, nbytes: int, generation: int) -> None:
        """A new allocation in place of the old one; on all ranks at once, with equal arguments.

        Raises
        ------
        RuntimeError
            If the group has gone.
        """
        group = self.process_group()
        if group is None:
            raise RuntimeError(f"process group {self.group!r} was destroyed; compile again for the new one")
        self.release()
        with torch.inference_mode(False):  # calls outside of it write there as well
            self.memory = allocate(self.type, nbytes, group, self.device)
        self.generation = generation
        what = f"process group {self.group!r} on {self.device}"
        self.watch = Watch(what, self.take_event, group_timeout(group), self.follow_group)
        self.watch.start()
        log.info(
            "%s arena of group %s on %s: %d bytes, allocation %d",
            self.type.value, self.group, self.device, nbytes, generation,
        )  # fmt: skip

    def done(self) -> None:
        """A call has put all its work on the current stream. (The library watches over its own.)"""
        if self.type is Memory.REGISTERED or self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        event = self.event
        if event is None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self.event = event

    def take_event(self) -> Callable[[], bool] | None:
        """What says whether the work of all calls so far is done; None if there was none since it was asked last."""
        found, self.event = self.event, None
        return None if found is None else found.query

    def follow_group(self) -> bool:
        """Whether the group is still there; with it the memory goes. Torch tells nobody that a group is destroyed."""
        if resolve(self.group) is self.process_group() is not None:
            return True
        self.release()
        _drop(self)
        return False

    def release(self) -> None:
        """Give the memory back, once nothing on the device can still use it."""
        if self.memory is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forget()

    def forget(self) -> None:
        """Hold the memory no more, without waiting for the device."""
        if self.watch is not None:
            self.watch.stop()
        self.views.clear()
        memory, self.memory, self.watch = self.memory, None, None
        if memory is not None:
            memory.close()


_arenas: dict[tuple[str, str, Memory], Arena] = {}
_lock = threading.RLock()
_uses = iter(range(1 << 62))


def arena_of(group: str, device: torch.device, memory: Memory = Memory.SYMMETRIC) -> Arena:
    """The arena of a device, group and type, without memory so far if it is new.

    Raises
    ------
    CommunicationError
        If there is no such group.
    """
    found = resolve(group)
    if found is None:
        raise CommunicationError(
            f"process group {group!r} does not exist (any more): call init_process_group, and compile again"
        )
    with _lock:
        key = (group, str(device), memory)
        arena = _arenas.get(key)
        if arena is None or arena.process_group() is not found:
            if arena is not None:
                arena.release()
            arena = _arenas[key] = Arena(group, device, weakref.ref(found), memory)
            weakref.finalize(found, _drop, arena)
    return arena


def _drop(arena: Arena) -> None:
    """Its process group has gone."""
    with _lock:
        arena.forget()
        key = (arena.group, str(arena.device), arena.type)
        if _arenas.get(key) is arena:
            del _arenas[key]


def arenas() -> tuple[Arena, ...]:
    """All arenas of this process, for reports and tests."""
    with _lock:
        return tuple(_arenas.values())


def release_arenas() -> None:
    """Give all arenas' memory back; programs that are still alive agree on new ones when they are called again."""
    with _lock:
        for arena in _arenas.values():
            arena.release()


class ArenaUse:
    """One program's use of an arena: called at each of its calls, gives the memory.

    Parameters
    ----------
    group, device, nbytes, memory:
        Of the plan's arena; ``device`` with an index where its type has them.
    prepare:
        Brings the ranks to an agreement, in which the arena is made; called while it is missing or too small.
    """

    def __init__(
        self, group: str, device: str, nbytes: int, prepare: Callable[[], None], memory: Memory = Memory.SYMMETRIC
    ) -> None:
        self.group, self.device, self.nbytes, self.prepare = group, torch.device(device), nbytes, prepare
        self.memory = memory
        self.number = next(_uses)
        self.join()

    def __call__(self) -> torch.Tensor:
        # a group that was destroyed and made anew has the same name, and other ranks maybe
        if self.arena.capacity < self.nbytes or self.arena.process_group() is not resolve(self.group):
            self.renew()
        memory = self.arena.memory
        assert memory is not None
        self.arena.calls += 1
        if self.device.type == "cuda":
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            if stream != self.arena.stream:
                self.follow(stream)
        return memory.own

    def view(
        self, number: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """The tensor at ``offset`` bytes; the program's view of this number, kept from call to call."""
        arena = self.arena
        found = arena.views.get((self.number, number))
        if found is None:
            assert arena.memory is not None
            with torch.inference_mode(False):
                typed = arena.memory.own.view(dtype)
                found = typed.as_strided(sizes, strides, offset // dtype.itemsize)
            arena.views[self.number, number] = found
        return found

    def leave(self) -> None:
        """Have no say in the size of the arena any more, until the next call."""
        self.arena.users.pop(self.number, None)

    def renew(self) -> None:
        """Join the arena of the group that has this name now, and agree on its size."""
        self.leave()
        self.join()
        self.prepare()

    def join(self) -> None:
        """Be counted among the users of the arena."""
        self.arena = arena_of(self.group, self.device, self.memory)
        self.arena.users[self.number] = self.nbytes
        weakref.finalize(self, _forget, self.arena, self.number).atexit = False

    def follow(self, stream: int) -> None:
        """What ran in the arena on another stream comes first."""
        if self.arena.calls > 1:
            torch.cuda.current_stream(self.device).wait_stream(stream_at(self.device, self.arena.stream))
        self.arena.stream = stream


def _forget(arena: Arena, number: int) -> None:
    """A program has gone; with the last one its arena's memory goes."""
    with _lock:
        arena.users.pop(number, None)
        for key in [k for k in arena.views if k[0] == number]:
            del arena.views[key]
        # waiting for the device would spoil what is being captured: then the memory stays for the next program
        if not arena.users and not (arena.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            arena.release()
