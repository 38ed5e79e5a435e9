"""What plans have to know of process groups: their size, and which communication memory all their ranks can have."""

from __future__ import annotations

import json
import socket
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.communication import GroupFacts, Memory, Thresholds
from ..ir.communication_options import CommunicationOptions
from .agreement import exchange
from .arenas import Allocation, allocate
from .cache import Cache
from .communication_times import kept_thresholds
from .peers import Symmetric
from .process_groups import resolve
from .registered import LIBRARIES
from .symmetric import BACKENDS

_TRIAL_BYTES = 4096
_NOT_ASKED = "the options do not ask for it"
_Key = tuple[str, str, bool]
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[_Key, GroupFacts]] = weakref.WeakKeyDictionary()


def group_facts(
    name: str, device: torch.device, options: CommunicationOptions, *, ask: bool, cache: Cache
) -> GroupFacts | None:
    """The facts of a group for a device; None if there is no group of this name.

    Parameters
    ----------
    options:
        Say which memory is asked for, and how long ranks wait for each other.
    ask:
        Hear the other ranks, and try allocations, the first time: to be done on all ranks. Without it they are taken
        to be like this one.

    Raises
    ------
    CommunicationError
        If a rank does not come in time.
    """
    group = resolve(name)
    if group is None:
        return None
    known = _known.setdefault(group, {})
    key = (device.type, options.registered, options.multicast)
    found = known.get(key)
    if found is None:
        thresholds = kept_thresholds(group.size(), device, cache)
        asking = _Asking(group, device, options)
        found = asking.common(thresholds) if ask else asking.local(thresholds)
        if ask:
            known[key] = found
    return found


def forget_facts(group: dist.ProcessGroup) -> None:
    """What was found out of a group is asked again, by the program that is compiled next; to be called on all ranks."""
    _known.pop(group, None)


@dataclass(frozen=True)
class _Asking:
    """Finds the facts of one group for one device."""

    group: dist.ProcessGroup
    device: torch.device
    options: CommunicationOptions

    def local(self, thresholds: Thresholds) -> GroupFacts:
        """What this rank sees."""
        kind, missing = self.device.type, f"there is no symmetric memory on {self.device.type}"
        backend, library = BACKENDS.get(kind), LIBRARIES.get(kind)
        obstacle = missing if backend is None else backend.obstacle(self.group, self.device)
        unregistered = no_multicast = _NOT_ASKED
        if self.options.asks_registered:
            none = f"no library registers memory on {kind}"
            unregistered = none if library is None else library.obstacle(self.group, self.device)
            if self.options.registered == "auto" and not thresholds.any_registered:
                unregistered = (
                    "nothing is known to be faster in registered memory: calibrate_communication would time it"
                )
        if self.options.multicast:
            no_multicast = obstacle if backend is None else obstacle or backend.multicast_obstacle(self.device)
        return self.facts(obstacle, thresholds, unregistered, no_multicast)

    def common(self, thresholds: Thresholds) -> GroupFacts:
        """One answer for all ranks: everybody's own obstacles, one host, then trials; rank 0's thresholds."""
        mine = self.local(thresholds)
        if self.device.type not in {*BACKENDS, *LIBRARIES}:
            return mine
        own = [mine.obstacle, mine.unregistered, mine.no_multicast, socket.gethostname(), *astuple(thresholds)]
        told = [json.loads(t) for t in self.exchange("the comparison of hosts and devices", json.dumps(own))]
        obstacle, unregistered, no_multicast = (_on_some_rank([t[k] for t in told]) for k in range(3))
        thresholds = Thresholds(*told[0][4:])
        obstacle = obstacle or _on_several_hosts({host for _, _, _, host, *_ in told})
        if not obstacle:
            obstacle, without = self.tried(Memory.SYMMETRIC, _multicast_missing)
            no_multicast = no_multicast or without
        if not unregistered:
            unregistered, _ = self.tried(Memory.REGISTERED, lambda made: "")
        return self.facts(obstacle, thresholds, unregistered, no_multicast or obstacle)

    def tried(self, memory: Memory, inspect: Callable[[Allocation], str]) -> tuple[str, str]:
        """Why a small allocation fails on some rank, and what ``inspect`` finds in one."""
        obstacle = seen = ""
        try:
            with _disable_current_modes():  # the program is being traced with fake tensors
                made = allocate(memory, _TRIAL_BYTES, self.group, self.device)
                seen = inspect(made)
                made.close()
        except RuntimeError as error:
            obstacle = f"{memory.value} memory could not be allocated: {str(error).splitlines()[0]}"
        told = self.exchange(f"the trial of {memory.value} memory", json.dumps([obstacle, seen]))
        failed, found = zip(*map(json.loads, told), strict=True)
        return _on_some_rank(failed), _on_some_rank(found)

    def exchange(self, what: str, text: str) -> list[str]:
        return exchange(self.group, f"{what} of group {self.group.group_name!r}", text, self.options.timeout)

    def facts(self, obstacle: str, thresholds: Thresholds, unregistered: str, no_multicast: str) -> GroupFacts:
        name, size = self.group.group_name, self.group.size()
        return GroupFacts(name, size, self.device.type, obstacle, thresholds, unregistered, no_multicast)


def _multicast_missing(made: Allocation) -> str:
    there = isinstance(made, Symmetric) and made.multicast
    return "" if there else "its symmetric memory came without an address for multicast"


def _on_some_rank(obstacles: Sequence[str]) -> str:
    """The first obstacle, with its rank; what no rank has asked for is said of none."""
    rank, text = next(((k, t) for k, t in enumerate(obstacles) if t), (0, ""))
    return text if text in ("", _NOT_ASKED) else f"rank {rank}: {text}"


def _on_several_hosts(hosts: set[str]) -> str:
    return f"its ranks are on {len(hosts)} hosts" if len(hosts) > 1 else ""
