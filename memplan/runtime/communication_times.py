"""How long collectives take on this machine, by way and bytes; kept in the cache, told to all by rank 0."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist

from ..ir.communication import BUILT_SIZES, REGISTERED_KINDS, Thresholds, default_thresholds
from ..ir.errors import CacheError, CommunicationError
from .agreement import exchange
from .cache import Cache, cache_key
from .registered import LIBRARIES, Registered
from .symmetric import BACKENDS

log = logging.getLogger(__name__)

#: Messages that are timed, in bytes.
SIZES = tuple(4096 * 4**k for k in range(8))  # 4 KiB to 64 MiB
_ROUNDS = 5
_CALLS = 20
#: Registered memory is taken where the library takes at most this part of its time in plain memory.
_REGISTERED_GAIN = 0.95


#: Kinds that ``"auto"`` chooses a way for, and their ways. ``"registered"`` is the library in registered memory.
WAYS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("one_shot", "two_shot", "library"),
    "reduce_scatter": ("symmetric", "library"),
    "all_gather": ("symmetric", "library", "registered"),
    "broadcast": ("symmetric", "library"),
    "all_to_all": ("library", "registered"),
}
#: by kind, bytes of the message and way: microseconds
Times = Mapping[str, Mapping[int, Mapping[str, float]]]


def thresholds_from(times: Times) -> Thresholds:
    """Up to which bytes which way is the fastest.

    One-shot up to the largest size at which it, and at which at all smaller sizes it, beats both others; two-shot from
    there up to the largest before the library is faster. Of the other kinds: where the library is slower at most sizes
    in a row. Registered memory: from the size on from which it is faster at every size, by more than times vary.
    """
    reduces = times["all_reduce"]
    one = _up_to(reduces, 0, lambda t: t["one_shot"] <= min(t["two_shot"], t["library"]))
    two = _up_to(reduces, one, lambda t: t["two_shot"] <= t["library"])
    others: dict[str, int] = {}
    for kind, found in times.items():
        run = _longest_run(found, lambda t: t.get("symmetric", math.inf) <= t["library"])
        if kind in ("reduce_scatter", "all_gather", "broadcast") and run:
            others |= {f"{kind}_least": run[0], f"{kind}_bytes": run[-1]}
        if kind in REGISTERED_KINDS:
            slower = [n for n, t in found.items() if t.get("registered", math.inf) > _REGISTERED_GAIN * t["library"]]
            others[f"{kind}_registered"] = min((n for n in found if n > max(slower, default=0)), default=0)
    return Thresholds(one, two if two > one else 0, **others)


def _longest_run(times: Mapping[int, Mapping[str, float]], faster: Callable[[Mapping[str, float]], bool]) -> list[int]:
    """The sizes in a row, as many as possible, at which another way is as fast as the library."""
    best: list[int] = []
    run: list[int] = []
    for nbytes in sorted(times):
        run = [*run, nbytes] if faster(times[nbytes]) else []
        best = max(best, run, key=len)
    return best


def _up_to(times: Mapping[int, Mapping[str, float]], above: int, best: Callable[[Mapping[str, float]], bool]) -> int:
    most = above
    for nbytes in sorted(n for n in times if n > above):
        if not best(times[nbytes]):
            break
        most = nbytes
    return most


def collective_call(
    kind: str, way: str, given: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup
) -> Callable[[], object] | None:
    """One collective on flat tensors, to be timed; None where there is no such way.

    Of the library an all-reduce and a broadcast work in place on ``out``, in whatever memory that lies; on symmetric
    memory, in which ``given`` lies, all but one-shot on ``given``.
    """
    name, ours, torchs = group.group_name, torch.ops.memplan, torch.ops.symm_mem
    match kind, "library" if way == "registered" else way:
        case "all_reduce", "library":
            return partial(dist.all_reduce, out, group=group)
        case "reduce_scatter", "library":
            return partial(dist.reduce_scatter_tensor, out, given, group=group)
        case "all_gather", "library":
            return partial(dist.all_gather_into_tensor, out, given, group=group)
        case "all_to_all", "library":
            return partial(dist.all_to_all_single, out, given, group=group)
        case "broadcast", "library":
            return partial(dist.broadcast, out, group_src=0, group=group)
        case "all_reduce", "one_shot":
            return partial(torchs.one_shot_all_reduce_out, given, "sum", name, out)
        case "all_reduce", "two_shot":
            return partial(torchs.two_shot_all_reduce_, given, "sum", name)
        case "reduce_scatter", "symmetric" if group.size() in BUILT_SIZES:
            return partial(torchs.reduce_scatter_out, given, name, False, out)
        case "all_gather", "symmetric":
            return partial(ours.peer_all_gather.out, given, name, out=out)
        case "all_to_all", "symmetric":
            return partial(ours.peer_all_to_all.out, given, name, out=out)
        case "broadcast", "symmetric":
            return partial(ours.peer_broadcast_, given, 0, name)
    return None


def operands(
    kind: str, nbytes: int, ranks: int, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Argument and result of a collective of a message of ``nbytes`` bytes, in two memories of at least that many."""
    part = nbytes // ranks // dtype.itemsize
    given, out = first.view(dtype)[: part * ranks], second.view(dtype)[: part * ranks]
    return given[:part] if kind == "all_gather" else given, out[:part] if kind == "reduce_scatter" else out


def measure(group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int] = SIZES) -> Times:
    """Microseconds of collectives of float32, by kind, bytes and way; called on all ranks of the group.

    The median of some rounds on each rank, of that the slowest rank's.
    """
    most = max(sizes)
    memory = BACKENDS[device.type].allocate(most, group, device)
    other, plain = (torch.zeros(most, dtype=torch.uint8, device=device) for _ in range(2))
    registered = _registered(2 * most, group, device)
    memory.own.zero_()
    mine: dict[str, dict[int, dict[str, float]]] = {}
    for kind, ways in WAYS.items():
        for nbytes in sizes:
            found = mine.setdefault(kind, {}).setdefault(nbytes, {})
            for way in ways:
                first, second = plain if way == "library" else memory.own, other
                if way == "registered":
                    if registered is None:
                        continue
                    first, second = registered.own[:most], registered.own[most:]
                given, out = operands(kind, nbytes, group.size(), first, second, torch.float32)
                call = collective_call(kind, way, given, out, group)
                if call is not None:
                    found[way] = _microseconds(call, group, device)
    told = [json.loads(t) for t in exchange(group, "the timing of collectives", json.dumps(mine))]
    if registered is not None:
        registered.close()
    return {
        kind: {n: {way: max(t[kind][str(n)][way] for t in told) for way in found} for n, found in by_bytes.items()}
        for kind, by_bytes in mine.items()
    }


def _registered(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Registered | None:
    """Zeroed bytes that the library knows, None on all ranks if on some rank there are none; called on all of them."""
    library, made = LIBRARIES.get(device.type), None
    obstacle = "there is none" if library is None else library.obstacle(group, device)
    if library is None or any(exchange(group, "the timing of registered memory", obstacle)):
        return None
    try:
        made = library.allocate(nbytes, group, device)
        made.own.zero_()
    except RuntimeError as error:
        obstacle = str(error)
        log.info("collectives are not timed in registered memory: %s", error)
    if any(exchange(group, "the timing of registered memory", obstacle)) and made is not None:
        made.close()
        return None
    return made


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
    return cache_key("collective times 2", kind, size, torch.__version__)


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
    log.info("collectives in microseconds: %s; %s", times, found)
    cache.put(_key(group.size(), device), json.dumps(asdict(found)).encode(), suffix=".json")
    return found


def kept_thresholds(size: int, device: torch.device, cache: Cache) -> Thresholds:
    """Those calibrated on this machine for a group of this size, or else the defaults."""
    try:
        data = cache.get_bytes(_key(size, device))
        found = None if data is None else json.loads(data)
        if isinstance(found, dict) and all(isinstance(v, int) and 0 <= v < math.inf for v in found.values()):
            return Thresholds(**found)
    except (CacheError, ValueError, TypeError) as error:
        log.info("no calibrated thresholds: %s", error)
    return default_thresholds(size)
