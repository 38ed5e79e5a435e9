"""What plans have to know of process groups: their size, and whether all their ranks can have symmetric memory."""

from __future__ import annotations

import json
import socket
import weakref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.communication import GroupFacts, default_thresholds
from .agreement import exchange
from .symmetric import BACKENDS, resolve

_TRIAL_BYTES = 4096
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, GroupFacts]] = weakref.WeakKeyDictionary()


def group_facts(name: str, device: torch.device, *, ask: bool, seconds: float | None = None) -> GroupFacts | None:
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
        obstacle = _local_obstacle(group, device)
        if ask and device.type in BACKENDS:
            obstacle = _common_obstacle(group, device, obstacle, seconds)
        found = GroupFacts(name, group.size(), device.type, obstacle, default_thresholds(group.size()))
        if ask:
            known[device.type] = found
    return found


def _local_obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    backend = BACKENDS.get(device.type)
    return f"there is no symmetric memory on {device.type}" if backend is None else backend.obstacle(group, device)


def _common_obstacle(group: dist.ProcessGroup, device: torch.device, obstacle: str, seconds: float | None) -> str:
    """One answer for all ranks: everybody's own obstacles, then one host, then a trial."""
    what = f"the comparison of hosts and devices of group {group.group_name!r}"
    told = [json.loads(t) for t in exchange(group, what, json.dumps([obstacle, socket.gethostname()]), seconds)]
    for rank, (text, _) in enumerate(told):
        if text:
            return f"rank {rank}: {text}"
    hosts = {host for _, host in told}
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts"
    try:
        with _disable_current_modes():  # the program is being traced with fake tensors
            BACKENDS[device.type].allocate(_TRIAL_BYTES, group, device)
    except RuntimeError as error:
        obstacle = f"symmetric memory could not be allocated: {str(error).splitlines()[0]}"
    for rank, text in enumerate(exchange(group, "the trial of symmetric memory", obstacle, seconds)):
        if text:
            return f"rank {rank}: {text}"
    return ""
