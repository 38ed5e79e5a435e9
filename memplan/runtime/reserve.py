"""Memory for a step made free beforehand, in one piece, so that the caching allocator need not collect segments for it.

The allocator makes a segment for a request that no free block holds, of about that request's size, and keeps it. A step
whose requests have many sizes ends up with many segments that are never all full. One request for what the step will
need in all, freed at once, leaves one segment that everything is then cut from. Nothing is held: it is the allocator's
cache, as after any other step. Only what is not free already is asked for, so it happens once, and again where
something else (gradients that are kept, optimiser states) has settled in the free bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from ..ir.plan import Plan, Reserve
from ..ir.program import SymbolInput, evaluate

log = logging.getLogger(__name__)
#: Free bytes are topped up by whole multiples of this: the allocator's rounding of large segments.
TOP_UP = 2 << 20


def reserves_of(plan: Plan) -> tuple[Reserve, ...]:
    """The plan's reserves, with where the call finds the sizes in them."""
    positions = {i.symbol: i.position for i in plan.program.inputs if isinstance(i, SymbolInput)}
    found = []
    for device, nbytes in plan.reserve.items():
        symbols = () if isinstance(nbytes, int) else sorted(nbytes.free_symbols, key=str)
        found.append(Reserve(device, nbytes, tuple((s, positions[s]) for s in symbols)))
    return tuple(found)


def reserving(call: Callable[..., object], reserves: tuple[Reserve, ...]) -> Callable[..., object]:
    """The call, before which the reserves are made free; the call itself where there are none."""
    if not reserves:
        return call
    wanted = tuple((torch.device(r.device), r) for r in reserves)

    def run(args: list[object]) -> object:
        for device, reserve in wanted:
            make_free(device, evaluate(reserve.nbytes, {s: int(args[k]) for s, k in reserve.symbols}))  # type: ignore[call-overload]
        return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def make_free(device: torch.device, nbytes: int) -> None:
    """Have ``nbytes`` bytes free in the caching allocator of a GPU.

    What is lacking is allocated in one piece and freed. Not while a CUDA graph is being captured, whose memory is a
    pool of its own, and not where the device itself has too little left: the step may fit all the same.
    """
    if not _native_allocator() or torch.cuda.is_current_stream_capturing():
        return
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    held, used = (stats[kind]["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
    lacking = (nbytes - (held - used)) // TOP_UP * TOP_UP
    if lacking <= 0:
        return
    left = torch.cuda.mem_get_info(device)[0]
    if left < lacking:
        log.debug("%d bytes are not made free on %s: it has %d left", lacking, device, left)
        return
    try:
        torch.empty(lacking, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:  # a limit of the process, or another process was faster
        log.debug("%d bytes are not made free on %s: %s", lacking, device, error)


@lru_cache(maxsize=1)
def _native_allocator() -> bool:
    """Whether torch's own caching allocator is in use; others keep no such statistics."""
    return torch.cuda.get_allocator_backend() == "native"
