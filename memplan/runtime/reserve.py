"""Memory for a step made free beforehand, in one piece, so that the caching allocator need not collect segments for it.

The allocator makes a segment for a request that no free block holds, of about that request's size, and keeps it. A step
whose requests have many sizes ends up with many segments that are never all full. One request for what the step will
need in all, freed at once, leaves one segment that everything is then cut from. Nothing is held: it is the allocator's
cache, as after any other step. Only what is not free already is asked for, so it happens once, and again where
something else (gradients that are kept, optimiser states) has settled in the free bytes; segments that have become
useless by that go back to the device first. What is free in small blocks,
above all between parameters that were made in another dtype and then cast, is no room for a step's large requests and
does not count.

That is how a first step is prepared. Of a training step the large requests are known, and a later one that finds the
allocator in a new state is tried out in simulation first (`memplan.passes.room`, handed in): whether one piece helps,
and of what size.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from ..ir.plan import RESERVE_PART, RESERVE_STEP, Plan, Reserve, Room, Segment
from ..ir.program import SymbolInput, evaluate

log = logging.getLogger(__name__)
#: By GPU: (reserved, allocated) bytes of large segments at which so many were found to be free. The states that a
#: training loop comes back to, so that the allocator's blocks are not walked through before every step.
_enough: dict[int, OrderedDict[tuple[int, int], int]] = {}
_STATES = 64
#: A call gives unused segments back to the device so many times at most: in its first step, when an optimiser has made
#: its states, after an evaluation. A loop that takes ever more room is not to wait for the device in every step.
_MOST_GIVEN_BACK = 8
#: A call's step is tried out in simulation so many times at most: a loop in which no state comes back is not to pay
#: for that (some 10 ms) in every step.
_MOST_SIMULATED = 32


#: From the step's large requests and the large segments.
FindRoom = Callable[[Sequence[tuple[int, int]], Sequence[Segment]], Room]


def reserves_of(plan: Plan) -> tuple[Reserve, ...]:
    """The plan's reserves, with where the call finds the sizes in them, and the requests of its step."""
    positions = {i.symbol: i.position for i in plan.program.inputs if isinstance(i, SymbolInput)}
    found = []
    for device in sorted({*plan.reserve, *plan.requests}):
        nbytes = plan.reserve.get(device, 0)
        symbols = () if isinstance(nbytes, int) else sorted(nbytes.free_symbols, key=str)
        known = tuple((s, positions[s]) for s in symbols)
        found.append(Reserve(device, nbytes, known, plan.requests.get(device, ())))
    return tuple(found)


def reserving(
    call: Callable[..., object], reserves: tuple[Reserve, ...], find_room: FindRoom | None = None
) -> Callable[..., object]:
    """The call, before which the reserves are made free; the call itself where there are none.

    Parameters
    ----------
    find_room:
        What finds room for the requests of a step that is not the first.
    """
    if not reserves:
        return call
    wanted = tuple((torch.device(r.device), r) for r in reserves)
    first, left, simulations = True, _MOST_GIVEN_BACK, _MOST_SIMULATED

    def simulated(reserve: Reserve, segments: Sequence[Segment]) -> Room:
        nonlocal simulations
        assert find_room is not None
        simulations -= 1
        return find_room(reserve.requests, segments)

    def run(args: list[object]) -> object:
        nonlocal first, left
        for device, reserve in wanted:
            nbytes = evaluate(reserve.nbytes, {s: int(args[k]) for s, k in reserve.symbols})  # type: ignore[call-overload]
            may_find = find_room is not None and reserve.requests and left > 0 and simulations > 0
            find = partial(simulated, reserve) if may_find else None
            left -= make_free(device, nbytes, first=first, give_back=left > 0, find_room=find)
        first = False
        return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def make_free(
    device: torch.device,
    nbytes: int,
    *,
    first: bool = False,
    give_back: bool = True,
    find_room: Callable[[Sequence[Segment]], Room] | None = None,
) -> bool:
    """Have ``nbytes`` bytes free in the caching allocator of a GPU, in large blocks.

    What is lacking is allocated in one piece and freed. Not while a CUDA graph is being captured, whose memory is a
    pool of its own, and not where the device itself has too little left: the step may fit all the same.

    Parameters
    ----------
    first:
        Before a model's first step: free segments are no room if they are many (left by what was done until then: a
        model on its way to the device, kernels that were timed), however many bytes they have.
    give_back:
        Where something is lacking, segments that nothing is in are given back to the device before, so that they do
        not lie beside the one piece: what is lacking and they are one piece then.
    find_room:
        Decides both instead in a new state that is not the first.

    Returns
    -------
    Whether segments were given back.
    """
    if not _native_allocator() or torch.cuda.is_current_stream_capturing():
        return False
    held, used, split = _counts(device)
    states = _enough.setdefault(device.index or 0, OrderedDict())
    if nbytes <= states.get((held, used), -1):
        return False
    if first or find_room is None:
        if not first and held - used - split >= nbytes:
            return False
        lacking = _lacking(_large(device), nbytes)
        given_back = give_back and lacking > 0
        if given_back:
            torch.cuda.empty_cache()
            lacking = _lacking(_large(device), nbytes)
    else:
        room = find_room(_large(device))
        lacking, given_back = room.nbytes, room.give_back
        if given_back:
            torch.cuda.empty_cache()
    if lacking > 0 and not _made_free(device, lacking):
        return given_back
    states[_counts(device)[:2]] = nbytes
    while len(states) > _STATES:
        states.popitem(last=False)
    return given_back


def _counts(device: torch.device) -> tuple[int, int, int]:
    """Bytes in large segments, allocated in them, and free in those of them that something is allocated in.

    What is small (losses that are kept in a list) changes from step to step, and nothing for the step's large requests.
    """
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    kinds = ("reserved", "allocated", "inactive_split")
    held, used, split = (stats[f"{kind}_bytes"]["large_pool"]["current"] for kind in kinds)
    return held, used, split


def _large(device: torch.device) -> list[Segment]:
    """The large segments of the current stream, those of graphs' pools not among them."""
    stream = torch.cuda.current_stream(device).cuda_stream
    return [
        Segment(segment["address"], tuple((block["size"], block["state"] != "inactive") for block in segment["blocks"]))
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == (device.index or 0)
        and segment["stream"] == stream
        and segment["segment_type"] == "large"
        and tuple(segment["segment_pool_id"]) == (0, 0)
    ]


def _lacking(segments: Sequence[Segment], nbytes: int) -> int:
    """What free blocks, of those large enough, have less than ``nbytes`` bytes in all."""
    least = nbytes // RESERVE_PART
    usable = sum(size for s in segments for size, live in s.blocks if not live and size >= least)
    return max(0, nbytes - usable) // RESERVE_STEP * RESERVE_STEP


def _made_free(device: torch.device, nbytes: int) -> bool:
    """Allocate so many bytes in one piece and free them; whether that was possible."""
    left = torch.cuda.mem_get_info(device)[0]
    if left < nbytes:
        log.debug("%d bytes are not made free on %s: it has %d left", nbytes, device, left)
        return False
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:  # a limit of the process, or another process was faster
        log.debug("%d bytes are not made free on %s: %s", nbytes, device, error)
        return False
    return True


@lru_cache(maxsize=1)
def _native_allocator() -> bool:
    """Whether torch's own caching allocator is in use; others keep no such statistics."""
    return torch.cuda.get_allocator_backend() == "native"
