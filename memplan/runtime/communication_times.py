"""How long an all-reduce takes on this machine, by algorithm and bytes; kept in the cache, told to all by rank 0."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from ..ir.communication import Thresholds, default_thresholds
from ..ir.errors import CacheError, CommunicationError
from .agreement import exchange
from .cache import Cache, cache_key
from .symmetric import BACKENDS

log = logging.getLogger(__name__)

#: Messages that are timed, in bytes.
SIZES = tuple(4096 * 4**k for k in range(8))  # 4 KiB to 64 MiB
_ROUNDS = 5
_CALLS = 20


def thresholds_from(times: Mapping[int, Mapping[str, float]]) -> Thresholds:
    """Up to which bytes which algorithm is the fastest, from times by bytes and algorithm.

    One-shot up to the largest size at which it, and at which at all smaller sizes it, beats both others; two-shot from
    there up to the largest before the library is faster.
    """
    one = two = 0
    for nbytes in sorted(times):
        found = times[nbytes]
        if found["one_shot"] > min(found["two_shot"], found["library"]):
            break
        one = nbytes
    for nbytes in sorted(n for n in times if n > one):
        if times[nbytes]["two_shot"] > times[nbytes]["library"]:
            break
        two = nbytes
    return Thresholds(one, two)


def measure(
    group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int] = SIZES
) -> dict[int, dict[str, float]]:
    """Microseconds of an all-reduce of float32, by bytes and algorithm; called on all ranks of the group.

    The median of some rounds on each rank, of that the slowest rank's.
    """
    memory = BACKENDS[device.type].allocate(max(sizes), group, device)
    plain = torch.zeros(max(sizes) // 4, dtype=torch.float32, device=device)
    name = group.group_name
    mine: dict[int, dict[str, float]] = {}
    for nbytes in sizes:
        view, other = memory.own[:nbytes].view(torch.float32), plain[: nbytes // 4]
        view.zero_()
        calls: dict[str, Callable[[], object]] = {
            "one_shot": partial(torch.ops.symm_mem.one_shot_all_reduce_out, view, "sum", name, other),
            "two_shot": partial(torch.ops.symm_mem.two_shot_all_reduce_, view, "sum", name),
            "library": partial(dist.all_reduce, other, group=group),
        }
        mine[nbytes] = {k: _microseconds(call, group, device) for k, call in calls.items()}
    told = [json.loads(t) for t in exchange(group, "the timing of all-reduces", json.dumps(mine))]
    return {n: {k: max(t[str(n)][k] for t in told) for k in found} for n, found in mine.items()}


def _microseconds(call: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    call()
    for _ in range(_ROUNDS):
        dist.barrier(group)
        sync()
        begun = time.perf_counter()
        for _ in range(_CALLS):
            call()
        sync()
        found.append((time.perf_counter() - begun) / _CALLS * 1e6)
    return sorted(found)[len(found) // 2]


def _key(size: int, device: torch.device) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_key("all-reduce times 1", kind, size, torch.__version__)


def calibrate(group: dist.ProcessGroup, device: torch.device, cache: Cache, sizes: Sequence[int] = SIZES) -> Thresholds:
    """Measure and keep what programs compiled from now on go by; called on all ranks of the group.

    Raises
    ------
    CommunicationError
        If the group has no symmetric memory.
    """
    backend = BACKENDS.get(device.type)
    obstacle = f"there is none on {device.type}" if backend is None else backend.obstacle(group, device)
    if obstacle:
        raise CommunicationError(f"group {group.group_name!r} has no symmetric memory: {obstacle}")
    times = measure(group, device, sizes)
    found = thresholds_from(times)
    log.info("all-reduces in microseconds: %s; %s", times, found)
    text = json.dumps({"one_shot_bytes": found.one_shot_bytes, "two_shot_bytes": found.two_shot_bytes})
    cache.put(_key(group.size(), device), text.encode(), suffix=".json")
    return found


def kept_thresholds(size: int, device: torch.device, cache: Cache) -> Thresholds:
    """Those calibrated on this machine for a group of this size, or else the defaults."""
    try:
        data = cache.get_bytes(_key(size, device))
        found = None if data is None else json.loads(data)
        if isinstance(found, dict) and all(isinstance(v, int) and 0 <= v < math.inf for v in found.values()):
            return Thresholds(found["one_shot_bytes"], found["two_shot_bytes"])
    except (CacheError, ValueError, KeyError) as error:
        log.info("no calibrated thresholds: %s", error)
    return default_thresholds(size)
