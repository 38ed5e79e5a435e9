"""Bytes as a device allocator counts them: every request rounded up, a pool counted whole."""

from __future__ import annotations

from collections.abc import Sequence

from .model import Buffer, Graph, Pool, Step, Storage, attribution, storages_of

#: Bytes to which allocators round a request (CUDA's caching allocator: 512; the CPU's: 64).
ROUNDING = {"cuda": 512}
DEFAULT_ROUNDING = 64


def rounded(nbytes: int, device: str) -> int:
    """Bytes that the device's allocator counts for an allocation of ``nbytes``."""
    unit = ROUNDING.get(device.partition(":")[0], DEFAULT_ROUNDING)
    return -(-nbytes // unit) * unit


def live_bytes(buffers: Sequence[Buffer], steps: Sequence[Step]) -> tuple[int, ...]:
    """Bytes in use at each step: counted storages at their exact size, and the step's own scratch."""
    known = attribution(storages_of(buffers), len(steps))
    return tuple(total + step.scratch for total, step in zip(known, steps, strict=True))


def allocated_bytes(
    buffers: Sequence[Buffer], pools: Sequence[Pool], steps: Sequence[Step], device: str | None = None
) -> tuple[int, ...]:
    """Bytes held of the allocator at each step: own allocations rounded, pools whole, scratch; of one device or all."""
    held = [
        _allocation(s.nbytes, s.device, s.birth, s.death) for s in storages_of(buffers) if s.pool is None and s.counted
    ]
    held += [_allocation(p.nbytes, p.device, p.birth, p.death) for p in pools]
    total = attribution([s for s in held if device in (None, s.device)], len(steps))
    return tuple(value + step.scratch for value, step in zip(total, steps, strict=True))


def residue(graph: Graph) -> tuple[int, ...]:
    """What the plan says is allocated less what its buffers explain, per step: zero where they agree."""
    known = allocated_bytes(graph.buffers, graph.pools, graph.steps)
    return tuple(said - value for said, value in zip(graph.allocated, known, strict=True))


def _allocation(nbytes: int, device: str, birth: int, death: int) -> Storage:
    return Storage(
        name="", members=(), nbytes=rounded(nbytes, device), device=device, birth=birth, death=death,
        pool=None, offset=None, counted=True,
    )  # fmt: skip
