"""Which temporaries share one allocation, and at which offsets.

A pool is one allocation from its first buffer's birth to its last one's death: inside it there is no fragmentation,
and a launch needs no call of the allocator; but it holds its whole size for its whole life. So candidates are built
(no pool; one pool a device; pools over stretches of the program, cut where few bytes are alive) and the one with the
lowest simulated peak of placed bytes is taken; between equals the one with fewer allocations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.communication import Memory
from ..ir.loops import Size
from ..ir.plan import Lifetime, Pool
from ..ir.program import EXTERNAL_KINDS, Program
from .pack import PackProblem, pack_buffers
from .pack_search import PackSearch
from .schedule import Storage, must_own, rounded, timeline

#: Offsets are multiples of this many bytes: kernels may load 16 bytes at a time, and rows start at a sector.
ALIGNMENT = 256
#: A pool may cost this part of the peak of live bytes and still be worth its fewer allocations.
TOLERANCE = 0.002


def aligned(nbytes: int) -> int:
    """What a storage takes of a pool."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Pooled:
    """Pools, and for each storage root in one: (pool, offset in bytes)."""

    pools: tuple[Pool, ...] = ()
    offsets: Mapping[str, tuple[str, int]] | None = None


def choose_pools(
    program: Program,
    order: Sequence[str],
    stores: Sequence[Storage],
    *,
    native: PackSearch | None,
    always: bool = False,
) -> Pooled:
    """The cheapest way found to place the temporaries. Dynamic sizes stay own allocations.

    Parameters
    ----------
    always:
        Use pools even where own allocations are predicted to need less.
    """
    own = must_own(program)
    movable = [
        s
        for s in stores
        if program.buffers[s.root].kind not in EXTERNAL_KINDS
        and program.buffers[s.root].memory is Memory.PLAIN
        and not any(m in own for m in s.members)
        and all(isinstance(program.buffers[m].nbytes, int) for m in s.members)
        and s.nbytes > 0
    ]
    if not movable:
        return Pooled()
    best = Pooled()
    base = max(timeline(program, order, stores, (), frozenset()))
    best_peak = None if always else base
    for cuts in (0, 1, 3, 7, 15, 31):
        found = stretch_pools(program, order, movable, cuts, native)
        if not found.pools:
            # cut so often that nothing lies between two cuts: the same as no pool, which is `base`
            continue
        peak = max(timeline(program, order, stores, found.pools, frozenset(found.offsets or {})))
        allowed = base * (1 + TOLERANCE) if best_peak == base else best_peak
        if (
            best_peak is None
            or allowed is None
            or peak < best_peak
            or (best is not None and not best.pools and peak <= allowed)
        ):
            best, best_peak = found, peak
        if peak <= base * (1 + TOLERANCE):
            break
    return best


def stretch_pools(
    program: Program,
    order: Sequence[str],
    movable: Sequence[Storage],
    cuts: int,
    native: PackSearch | None,
    *,
    prefix: str = "pool",
) -> Pooled:
    """One pool a device for each of ``cuts + 1`` stretches; a storage that crosses a cut stays its own allocation."""
    n = len(order)
    bounds = _cut_points(movable, n, cuts)
    pools: list[Pool] = []
    offsets: dict[str, tuple[str, int]] = {}
    devices = sorted({program.buffers[s.root].device for s in movable})
    for d, device in enumerate(devices):
        for k, (start, stop) in enumerate(itertools.pairwise(bounds)):
            inside = [
                s
                for s in movable
                if program.buffers[s.root].device == device and s.lifetime.start >= start and s.lifetime.stop <= stop
            ]
            if len(inside) < 2:
                continue
            problem = PackProblem(
                tuple(s.lifetime.start for s in inside),
                tuple(s.lifetime.stop for s in inside),
                tuple(aligned(s.nbytes) for s in inside),
                ALIGNMENT,
            )
            packing = pack_buffers(problem, native=native)
            name = f"{prefix}{d}_{k}" if len(devices) > 1 or cuts else prefix
            life = Lifetime(min(s.lifetime.start for s in inside), max(s.lifetime.stop for s in inside))
            size: Size = rounded(packing.arena, device)
            pools.append(Pool(name, size, device, life))
            for s, offset in zip(inside, packing.offsets, strict=True):
                offsets[s.root] = (name, offset)
    return Pooled(tuple(pools), offsets)


def _cut_points(movable: Sequence[Storage], n: int, cuts: int) -> list[int]:
    """Steps between which pools live: where the fewest bytes cross, one in each of ``cuts`` windows."""
    if cuts == 0:
        return [0, n]
    crossing = [0] * (n + 2)
    for s in movable:
        # alive on both sides of the cut before step k for start < k < stop
        if s.lifetime.start + 1 < n + 1:
            crossing[s.lifetime.start + 1] += s.nbytes
        crossing[min(s.lifetime.stop, n + 1)] -= s.nbytes
    total, at = 0, []
    for k in range(n + 1):
        total += crossing[k]
        at.append(total)
    points = [0]
    window = n / (cuts + 1)
    for c in range(1, cuts + 1):
        low, high = int((c - 0.5) * window), int((c + 0.5) * window)
        choices = range(max(points[-1] + 1, low), min(n - 1, high))
        if choices:
            points.append(min(choices, key=lambda k: (at[k], k)))
    return [*points, n]
