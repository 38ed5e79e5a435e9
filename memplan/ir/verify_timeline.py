"""What a plan holds at every step, by the verifier's own definition."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from .communication import ARENA_MEMORY, Memory
from .plan import InPool, Lifetime, Plan
from .program import EXTERNAL_KINDS, Extern
from .verify_kernel import evaluate_index
from .verify_slabs import held_slabs

#: Bytes to which an allocator rounds a request; 64 where nothing else is known.
_ROUNDING = {"cuda": 512}
#: Arenas are there before and after; pinned memory is the host's.
_UNCOUNTED = (*ARENA_MEMORY, Memory.PINNED)


def bytes_by_step(
    plan: Plan, storages: Mapping[str, Sequence[str]], *, placed: bool, device: str | None = None
) -> tuple[int, ...]:
    """Bytes at every step: of storages, or with ``placed`` of own allocations and pools; of one device or all.

    ``storages`` are the members of each storage by its root. What counts says `memplan.ir.verify_plan`.
    """
    program = plan.program
    steps = max(len(plan.order), 1)
    change = [0] * (steps + 1)

    def count(life: Lifetime, size: int, on: str) -> None:
        if device is not None and on != device:
            return
        granule = _ROUNDING.get(on.partition(":")[0], 64)
        size = -(-size // granule) * granule
        change[life.start] += size
        if life.stop <= steps:
            change[life.stop] -= size

    slabs = held_slabs(plan, storages) if placed else {}
    shared = {m for slab in slabs for m in slab.members}
    for root, names in storages.items():
        b = program.buffers[root]
        if (b.kind in EXTERNAL_KINDS and not b.donated) or b.memory in _UNCOUNTED:
            continue
        if root in shared or (placed and isinstance(plan.placements[root], InPool)):
            continue
        lives = [plan.lifetimes[n] for n in names]
        whole = Lifetime(min(x.start for x in lives), max(x.stop for x in lives))
        count(whole, program.nbytes(root), b.device)
    if placed:
        for p in (p for p in plan.pools if p.memory not in ARENA_MEMORY):
            count(p.lifetime, evaluate_index(p.nbytes, program.hints), p.device)
        for slab, life in slabs.items():
            count(life, evaluate_index(slab.nbytes, program.hints), slab.device)
    out = list(itertools.accumulate(change[:steps]))
    for step, name in enumerate(plan.order):
        op = program.by_name[name]
        if isinstance(op, Extern) and device in (None, op.device):
            out[step] += evaluate_index(op.scratch, program.hints)
    return tuple(out)
