"""From a program to a plan: lifetimes, places and the timeline of live bytes.

Order, in-place reuse and offsets are decided by the passes that have those names; this file joins what they say into
one `Plan`. Sizes that count are those at the program's hints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..ir.communication import ARENA_MEMORY, Memory
from ..ir.loops import Size
from ..ir.plan import (
    Certificate,
    External,
    InPlaceOf,
    InPool,
    Lifetime,
    Own,
    Placement,
    Plan,
    Pool,
    Slab,
)
from ..ir.program import EXTERNAL_KINDS, BufferKind, Contract, Extern, Program, all_views_buffers, evaluate

#: Memory that is in no count of a device's bytes.
UNCOUNTED = (*ARENA_MEMORY, Memory.PINNED)
#: Bytes to which the device allocators round a request (CUDA's caching allocator: 512; the CPU's: 64).
ROUNDING = {"cuda": 512, "cpu": 64}


def rounded(nbytes: int, device: str) -> int:
    """Bytes that an own allocation of ``nbytes`` takes on the device."""
    step = ROUNDING.get(device.partition(":")[0], 64)
    return -(-nbytes // step) * step


def lifetimes(program: Program, order: Sequence[str]) -> dict[str, Lifetime]:
    """Half-open lifetimes in steps of every buffer under the given order. See `memplan.ir.plan` for externals."""
    n = max(1, len(order))
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for k, name in enumerate(order):
        op = program.by_name[name]
        for buffer in (*op.reads, *op.writes, *all_views_buffers(op)):
            first.setdefault(buffer, k)
            last[buffer] = k
    out: dict[str, Lifetime] = {}
    leaving = program.output_buffers
    for b in program.buffers.values():
        if b.kind in EXTERNAL_KINDS:
            stop = last.get(b.name, 0) + 1 if b.donated and b.name not in leaving else n
            out[b.name] = Lifetime(0, stop)
        elif b.name in first:
            out[b.name] = Lifetime(first[b.name], n + 1 if b.name in leaving else last[b.name] + 1)
    return out


def own_peak(program: Program, order: Sequence[str]) -> int:
    """Peak of live bytes with every buffer its own allocation: `timeline` of `storages` with nothing in place."""
    n, buffers, hints = max(1, len(order)), program.buffers, program.hints
    change = [0] * (n + 2)
    for name, life in lifetimes(program, order).items():
        b = buffers[name]
        if (b.kind in EXTERNAL_KINDS and not b.donated) or b.memory in UNCOUNTED:
            continue
        size = rounded(b.nbytes if isinstance(b.nbytes, int) else evaluate(b.nbytes, hints), b.device)
        change[life.start] += size
        change[life.stop] -= size
    peak, live = 0, 0
    for k, name in enumerate(order):
        live += change[k]
        op = program.by_name[name]
        scratch = evaluate(op.scratch, hints) if isinstance(op, Extern) else 0
        peak = max(peak, live + scratch)
    return peak if order else change[0]


@dataclass(frozen=True)
class Storage:
    """Buffers that share one storage by in-place reuse, as one allocation."""

    root: str
    members: tuple[str, ...]
    lifetime: Lifetime
    nbytes: int


def storages(program: Program, lives: Mapping[str, Lifetime], in_place: Mapping[str, str]) -> list[Storage]:
    """In-place chains joined; in order of birth."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        chain = []
        while name in in_place and name not in root:
            chain.append(name)
            name = in_place[name]
        end = root.get(name, name)
        root.update(dict.fromkeys(chain, end))  # a chain may run through all layers of a model: it is followed once
        return end

    members: dict[str, list[str]] = {}
    for name in lives:
        members.setdefault(find(name), []).append(name)
    out = []
    for r, names in members.items():
        life = Lifetime(min(lives[m].start for m in names), max(lives[m].stop for m in names))
        out.append(Storage(r, tuple(names), life, max(program.nbytes(m) for m in names)))
    out.sort(key=lambda s: (s.lifetime.start, s.root))
    return out


def must_own(program: Program) -> frozenset[str]:
    """Buffers that can lie in no pool: they leave the program, or the call that makes them allocates them.

    A zero-filled workspace is the runtime's: filled once, it serves every call.
    """
    own = set(program.output_buffers)
    own.update(b.name for b in program.buffers.values() if b.kind is BufferKind.WORKSPACE and b.zero_fill)
    for op in program.operations:
        if isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC):
            own.update(v.buffer for v in op.results if v is not None)
    return frozenset(own)


def timeline(
    program: Program,
    order: Sequence[str],
    stores: Sequence[Storage],
    pools: Sequence[Pool],
    pooled: frozenset[str],
    slabs: Sequence[Slab] = (),
    device: str | None = None,
) -> list[int]:
    """Live bytes while each step runs: own allocations and whole pools, rounded, and the step's own scratch.

    Externals count only where they are donated (the caller's other memory was there before the step), those of a slab
    together, until the last of them is dropped; arenas of communication memory not at all (they outlive the step).
    ``device``: whose scratch counts; None for all.
    """
    n = max(1, len(order))
    change = [0] * (n + 2)
    slab_of = {m: slab for slab in slabs for m in slab.members}
    ends: dict[str, int] = {}
    for s in stores:
        b = program.buffers[s.root]
        if s.root in slab_of:
            name = slab_of[s.root].name
            ends[name] = max(ends.get(name, 0), s.lifetime.stop)
            continue
        if s.root in pooled or (b.kind in EXTERNAL_KINDS and not b.donated) or b.memory in UNCOUNTED:
            continue
        size = rounded(s.nbytes, b.device)
        change[s.lifetime.start] += size
        change[min(s.lifetime.stop, n + 1)] -= size
    plain = [p for p in pools if p.memory not in ARENA_MEMORY]
    spans = [(p.nbytes, p.device, p.lifetime.start, p.lifetime.stop) for p in plain]
    spans += [(slab.nbytes, slab.device, 0, ends[slab.name]) for slab in slabs if slab.name in ends]
    for nbytes, device, start, stop in spans:
        size = rounded(evaluate(nbytes, program.hints), device)
        change[start] += size
        change[min(stop, n + 1)] -= size
    out, live = [], 0
    for k in range(n):
        live += change[k]
        scratch = 0
        if k < len(order):
            op = program.by_name[order[k]]
            counts = isinstance(op, Extern) and device in (None, op.device)
            scratch = evaluate(op.scratch, program.hints) if counts and isinstance(op, Extern) else 0
        out.append(live + scratch)
    return out


def make_plan(
    program: Program,
    order: Sequence[str],
    *,
    in_place: Mapping[str, str],
    pools: Sequence[Pool] = (),
    offsets: Mapping[str, tuple[str, int]] | None = None,
    order_bound: int = 0,
    program_peak: int | None = None,
    notes: Sequence[tuple[str, str]] = (),
    note: str = "",
    slabs: Sequence[Slab] = (),
    reserve: Mapping[str, Size] | None = None,
    requests: Mapping[str, tuple[tuple[int, int], ...]] | None = None,
) -> Plan:
    """Join the decisions into a plan.

    Parameters
    ----------
    in_place:
        For each buffer that takes another's storage, that other buffer.
    offsets:
        For each storage root placed in a pool: (pool, offset in bytes).
    order_bound, program_peak:
        Certified lower bound on any order's peak and the peak in program order, in bytes.
    slabs:
        Inputs that share allocations of the forward.
    reserve:
        By device, bytes to have free when the program starts.
    requests:
        By device, the large allocations of the whole step.
    """
    lives = lifetimes(program, order)
    live_places = {b: p for b, p in in_place.items() if b in lives and p in lives}
    stores = storages(program, lives, live_places)
    offsets = offsets or {}
    placements: dict[str, Placement] = {}
    for name in lives:
        if program.buffers[name].kind in EXTERNAL_KINDS:
            placements[name] = External()
        elif name in live_places:
            placements[name] = InPlaceOf(live_places[name])
        elif name in offsets:
            placements[name] = InPool(*offsets[name])
        else:
            placements[name] = Own()
    pooled = frozenset(offsets)
    line = timeline(program, order, stores, pools, pooled, slabs)
    unpooled = timeline(program, order, stores, (), frozenset())
    peak, placed = max(unpooled), max(line)
    certificate = Certificate(
        program_peak=peak if program_peak is None else program_peak,
        peak=peak,
        order_bound=min(order_bound, peak),
        placed_peak=placed,
        alignment=0,
        note=note,
    )
    return Plan(
        program,
        tuple(order),
        lives,
        placements,
        tuple(pools),
        tuple(line),
        certificate,
        (*program.notes, *notes),
        by_device(program, order, stores, pools, pooled, slabs, reserve or {}),
        tuple(slabs),
        dict(reserve or {}),
        dict(requests or {}),
    )


def by_device(
    program: Program,
    order: Sequence[str],
    stores: Sequence[Storage],
    pools: Sequence[Pool],
    pooled: frozenset[str],
    slabs: Sequence[Slab] = (),
    reserve: Mapping[str, Size] = MappingProxyType({}),
) -> dict[str, int]:
    """Predicted peak of each device by itself; making free what is reserved allocates it for a moment."""
    devices = sorted({b.device for b in program.buffers.values() if b.kind is not BufferKind.CONSTANT})
    out = {}
    for device in devices:
        mine = [s for s in stores if program.buffers[s.root].device == device]
        here = [p for p in pools if p.device == device]
        kept = [s for s in slabs if s.device == device]
        peak = max(timeline(program, order, mine, here, pooled, kept, device))
        out[device] = max(peak, evaluate(reserve.get(device, 0), program.hints))
    return out
