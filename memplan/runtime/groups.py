"""What plans have to know of process groups: their size, and whether all their ranks can have symmetric memory."""

from __future__ import annotations

import json
import socket
import weakref
from collections.abc import Sequence
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.communication import GroupFacts, Thresholds
from .agreement import exchange
from .cache import Cache
from .communication_times import kept_thresholds
from .symmetric import BACKENDS, resolve

_TRIAL_BYTES = 4096
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, GroupFacts]] = weakref.WeakKeyDictionary()


def group_facts(
    name: str, device: torch.device, *, ask: bool, cache: Cache, seconds: float | None = None
) -> GroupFacts | None:
    """The facts of a group for a device; None if there is no group of this name.

    Parameters
    ----------
    ask:
        Hear the other ranks, and try an allocation, the first time: to be done on all ranks. Without it they are taken
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
    found = known.get(device.type)
    if found is None:
        obstacle, thresholds = _local_obstacle(group, device), kept_thresholds(group.size(), device, cache)
        if ask and device.type in BACKENDS:
            obstacle, thresholds = _common(group, device, obstacle, thresholds, seconds)
        found = GroupFacts(name, group.size(), device.type, obstacle, thresholds)
        if ask:
            known[device.type] = found
    return found


def forget_facts(group: dist.ProcessGroup) -> None:
    """What was found out of a group is asked again, by the program that is compiled next; to be called on all ranks."""
    _known.pop(group, None)


def _local_obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    backend = BACKENDS.get(device.type)
    return f"there is no symmetric memory on {device.type}" if backend is None else backend.obstacle(group, device)


def _common(
    group: dist.ProcessGroup, device: torch.device, obstacle: str, thresholds: Thresholds, seconds: float | None
) -> tuple[str, Thresholds]:
    """One answer for all ranks: everybody's own obstacles, then one host, then a trial; rank 0's thresholds."""
    what = f"the comparison of hosts and devices of group {group.group_name!r}"
    mine = [obstacle, socket.gethostname(), *astuple(thresholds)]
    told = [json.loads(t) for t in exchange(group, what, json.dumps(mine), seconds)]
    thresholds = Thresholds(*told[0][2:])
    obstacle = _on_some_rank([text for text, *_ in told]) or _on_several_hosts({host for _, host, *_ in told})
    if obstacle:
        return obstacle, thresholds
    try:
        with _disable_current_modes():  # the program is being traced with fake tensors
            BACKENDS[device.type].allocate(_TRIAL_BYTES, group, device)
    except RuntimeError as error:
        obstacle = f"symmetric memory could not be allocated: {str(error).splitlines()[0]}"
    return _on_some_rank(exchange(group, "the trial of symmetric memory", obstacle, seconds)), thresholds


def _on_some_rank(obstacles: Sequence[str]) -> str:
    return next((f"rank {rank}: {text}" for rank, text in enumerate(obstacles) if text), "")


def _on_several_hosts(hosts: set[str]) -> str:
    return f"its ranks are on {len(hosts)} hosts" if len(hosts) > 1 else ""
