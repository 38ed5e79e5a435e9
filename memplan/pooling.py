"""Pools for the programs of a step: by live bytes on a CPU, by what the caching allocator would reserve on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .ir.loops import Size
from .ir.plan import Plan, Slab, StepMemory
from .ir.program import BufferKind
from .passes.pools import Pooled, choose_pools
from .passes.reserved import step_memory
from .passes.step_pools import StepPools, choose_step_pools
from .passes.whole_step import Laid
from .planner import PlannerLibraries, planner_libraries


class Poolable(Protocol):
    """A program that lacks its pools, and which the user wants: ``"auto"``, ``"always"`` or ``"never"``."""

    @property
    def laid(self) -> Laid: ...

    @property
    def pools(self) -> str: ...


@dataclass(frozen=True)
class StepChoice:
    """For each program its pools; the slabs that the last one gets; by device, bytes to reserve and the step's large
    allocations."""

    pooled: tuple[Pooled, ...]
    slabs: tuple[Slab, ...] = ()
    reserve: Mapping[str, Size] = field(default_factory=dict)
    requests: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    by_device: Mapping[str, StepPools] = field(default_factory=dict)


def choose(
    prepared: Sequence[Poolable],
    joins: Sequence[tuple[str, str]],
    fixed: StepChoice | None = None,
    *,
    budget: bool = False,
) -> StepChoice:
    """Pools, slabs and reserves of programs that run one after the other.

    Parameters
    ----------
    fixed:
        An earlier choice whose pools and slabs hold for the forward.
    budget:
        They are held to a budget, which is of reserved bytes where a device's allocator reserves them.
    """
    libraries = planner_libraries()
    laid = [p.laid for p in prepared]
    wanted = {p.pools for p in prepared}
    if "never" in wanted:
        # one of them has no operations, or wants none: each by itself
        alone = [_by_live_bytes(p.laid, None, p.pools == "always", libraries) for p in prepared if p.pools != "never"]
        return StepChoice(tuple(Pooled() if p.pools == "never" else alone.pop(0) for p in prepared))
    always = wanted == {"always"}
    devices = sorted({b.device for one in laid for b in one.program.buffers.values()})
    parts: list[list[Pooled]] = [[] for _ in laid]
    slabs: list[Slab] = []
    reserve: dict[str, Size] = {}
    requests: dict[str, tuple[tuple[int, int], ...]] = {}
    by_device: dict[str, StepPools] = {}
    for device in devices:
        if device.startswith("cuda") or (always and len(laid) > 1):
            earlier = fixed.by_device.get(device) if fixed is not None else None
            found = choose_step_pools(
                laid,
                joins,
                device,
                pack=libraries.pack,
                replay=libraries.replay,
                always=always,
                fixed=earlier,
                budget=budget and device.startswith("cuda"),
            )
            by_device[device] = found
            slabs += found.slabs
            if found.reserve != 0:
                reserve[device] = found.reserve
            if found.requests:
                requests[device] = found.requests
            for part, pooled in zip(parts, found.pooled, strict=True):
                part.append(pooled)
        else:
            for part, one in zip(parts, laid, strict=True):
                part.append(_by_live_bytes(one, device, always, libraries))
    return StepChoice(tuple(map(_joined, parts)), tuple(slabs), reserve, requests, by_device)


def _by_live_bytes(one: Laid, device: str | None, always: bool, libraries: PlannerLibraries) -> Pooled:
    stores = [s for s in one.stores if device in (None, one.program.buffers[s.root].device)]
    return choose_pools(one.program, one.order, stores, native=libraries.pack, always=always)


def _joined(parts: Sequence[Pooled]) -> Pooled:
    offsets: dict[str, tuple[str, int]] = {}
    for part in parts:
        offsets.update(part.offsets or {})
    return Pooled(tuple(pool for part in parts for pool in part.pools), offsets)


def step_memories(plans: Sequence[Plan], joins: Sequence[tuple[str, str]]) -> dict[str, StepMemory]:
    """What the step reserves on each device that has a caching allocator, by simulation."""
    devices = {
        b.device
        for plan in plans
        for b in plan.program.buffers.values()
        if b.device.startswith("cuda") and b.kind is not BufferKind.CONSTANT
    }
    received = {later: earlier for earlier, later in joins}
    return {device: step_memory(plans, received, device=device) for device in sorted(devices)}
