"""What a whole training step reserves on the device: its plans, run through the simulated caching allocator.

A plan's own peak says which bytes are alive; whether a step fits is decided by the segments that the device's allocator
holds. They depend on the order and sizes of all requests from the first step on: parameters and inputs, the forward's
temporaries, what it saves, the backward's temporaries, the gradients, and the same again in the next step, in the
segments that the step before left. Not modelled: scratch that calls take without the plan knowing of it, other streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.communication import Memory
from ..ir.plan import InPool, Own, Plan, StepMemory
from ..ir.program import EXTERNAL_KINDS, BufferKind, Extern, View, evaluate
from .allocator import AllocatorStats, CachingAllocator
from .allocator_replay import top_up
from .room import best_room

#: The second step finds the segments of the first; from the third on nothing changes.
STEPS = 3


class _Device:
    """One device's allocator and what is alive in it, by name."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.live: dict[tuple[str, str], int] = {}
        #: bytes reserved and allocated when a step began, as in `memplan.runtime.reserve`
        self.begun: set[tuple[int, int]] = set()

    def begin(self, found: _Moments) -> None:
        """What the runtime does before a step: the reserve is made free, or, in a state that is not the first, what
        room is found to be best."""
        now = self.allocator.stats
        if (now.reserved, now.allocated) in self.begun:
            return
        if self.begun and found.requests:
            room = best_room(found.requests, self.allocator.segments())
            if room.give_back:
                self.allocator.empty_cache()
            self.allocator.free(self.allocator.alloc(room.nbytes))
        else:
            top_up(self.allocator, found.reserve)
        now = self.allocator.stats
        self.begun.add((now.reserved, now.allocated))

    def make(self, owner: str, name: str, nbytes: int) -> None:
        self.live[owner, name] = self.allocator.alloc(nbytes)

    def drop(self, owner: str, name: str) -> None:
        handle = self.live.pop((owner, name), None)
        if handle is not None:
            self.allocator.free(handle)


@dataclass(frozen=True, slots=True)
class _Moments:
    """What a plan allocates before and gives back after each step, on one device: (name, bytes), names."""

    births: tuple[tuple[tuple[str, int], ...], ...]
    scratch: tuple[int, ...]
    deaths: tuple[tuple[str, ...], ...]
    leaving: tuple[str, ...]
    #: slabs of the forward that are freed after each step
    slabs: tuple[tuple[str, ...], ...]
    #: bytes to have free at the start
    reserve: int
    #: the whole step's large requests
    requests: tuple[tuple[int, int], ...]


def _moments(plan: Plan, device: str) -> _Moments:
    """Pools first, then own allocations, as the wrapper makes them; in-place chains are one allocation."""
    n = len(plan.order)
    births: list[list[tuple[str, int]]] = [[] for _ in range(n)]
    deaths: list[list[str]] = [[] for _ in range(n)]
    leaving: list[str] = []
    program = plan.program
    for pool in plan.pools:
        if pool.device == device and pool.memory is Memory.PLAIN:
            births[pool.lifetime.start].append((pool.name, evaluate(pool.nbytes, program.hints)))
    ends: dict[str, int] = {}
    for name, life in plan.lifetimes.items():
        root = plan.storage_of(name)
        ends[root] = max(ends.get(root, 0), life.stop)
    for root in plan.lifetimes:  # in this order the wrapper makes what is born together
        if root not in ends:
            continue
        stop, buffer = ends[root], program.buffers[root]
        if buffer.device != device or isinstance(plan.placements[root], InPool):
            continue
        if isinstance(plan.placements[root], Own):
            births[plan.lifetimes[root].start].append((root, program.nbytes(root)))
        elif not buffer.donated:
            continue
        if stop <= n:
            deaths[stop - 1].append(root)
        else:
            leaving.append(root)
    for pool in plan.pools:
        if pool.device == device and pool.memory is Memory.PLAIN and pool.lifetime.stop <= n:
            deaths[pool.lifetime.stop - 1].append(pool.name)
    slabs: list[list[str]] = [[] for _ in range(n)]
    for slab in plan.slabs:
        last = max((ends[m] for m in slab.members if m in ends), default=0)
        if slab.device == device and 0 < last <= n:
            slabs[last - 1].append(slab.name)
    scratch = []
    for name in plan.order:
        op = program.by_name[name]
        on_device = isinstance(op, Extern) and op.device == device
        scratch.append(evaluate(op.scratch, program.hints) if on_device and isinstance(op, Extern) else 0)
    return _Moments(
        tuple(map(tuple, births)),
        tuple(scratch),
        tuple(map(tuple, deaths)),
        tuple(leaving),
        tuple(map(tuple, slabs)),
        evaluate(plan.reserve.get(device, 0), program.hints),
        plan.requests.get(device, ()),
    )


def step_memory(
    plans: Sequence[Plan], joins: Mapping[str, str] | None = None, *, device: str = "cuda:0", steps: int = STEPS
) -> StepMemory:
    """Simulate ``steps`` steps of the plans one after the other: a forward and its backward, or an inference graph.

    Parameters
    ----------
    plans:
        In the order in which they run.
    joins:
        For what the backward gets from the forward: backward buffer -> forward buffer.

    Returns
    -------
    Bytes on ``device``; parameters and inputs of the first plan are there before the first step.
    """
    memory = _with_callers(plans, device)
    resident = memory.allocator.stats
    joins = _stored(plans, joins)
    moments = [_moments(plan, device) for plan in plans]
    for _ in range(steps):
        for k, found in enumerate(moments):
            _run(memory, found, str(k), joins if k else {})
        for owner, name in [key for key in memory.live if key[0] != "caller"]:
            memory.drop(owner, name)
    stats: AllocatorStats = memory.allocator.stats
    return StepMemory(resident.allocated, stats.peak_allocated, stats.peak_reserved, resident.reserved)


def optimizer_step_memory(
    plans: Sequence[Plan],
    joins: Mapping[str, str] | None = None,
    *,
    device: str = "cuda:0",
    steps: int = STEPS,
    passes: int = 2,
    states: int = 2,
) -> StepMemory:
    """Simulate steps of which each accumulates the gradients of some passes and then updates the parameters.

    A backward returns all its gradients before any is added to those that are held. The optimiser makes its states
    (``states`` tensors for each gradient) in the first step, and in each one more tensor for each gradient that it
    gives back: the square roots of torch's AdamW over lists of tensors, its default on a GPU. It lets go of the
    gradients at the end of the step.
    """
    memory = _with_callers(plans, device)
    resident = memory.allocator.stats
    joins = _stored(plans, joins)
    moments = [_moments(plan, device) for plan in plans]
    last, program = str(len(plans) - 1), plans[-1].program
    place: dict[str, int] = {}  # among the results, whose order is that of the parameters
    for k, result in enumerate(program.outputs):
        if isinstance(result, View) and result.buffer in plans[-1].placements:
            place.setdefault(plans[-1].storage_of(result.buffer), k)
    leaving = sorted(moments[-1].leaving, key=lambda name: place.get(name, len(place)))
    gradients = {name: program.nbytes(name) for name in leaving}
    # a gradient may lie where the forward had saved something
    returned = {("0", joins[name]) if name in joins and len(plans) > 1 else (last, name): name for name in gradients}
    for step in range(steps):
        for number in range(passes):
            for k, found in enumerate(moments):
                _run(memory, found, str(k), joins if k else {})
            for owner, name in [key for key in memory.live if key[0] not in ("caller", "held")]:
                if number == 0 and (owner, name) in returned:
                    memory.live["held", returned[owner, name]] = memory.live.pop((owner, name))
                else:
                    memory.drop(owner, name)
        for name, nbytes in gradients.items():
            for k in range(states if step == 0 else 0):
                memory.make("caller", f"{name} (state {k})", nbytes)
        for name, nbytes in gradients.items():
            memory.make("optimizer", name, nbytes)
        for owner in ("optimizer", "held"):
            for name in gradients:
                memory.drop(owner, name)
    stats: AllocatorStats = memory.allocator.stats
    return StepMemory(resident.allocated, stats.peak_allocated, stats.peak_reserved, resident.reserved)


def _with_callers(plans: Sequence[Plan], device: str) -> _Device:
    """A device with parameters and inputs of the first plan."""
    memory = _Device()
    for b in plans[0].program.buffers.values() if plans else ():
        if b.kind in EXTERNAL_KINDS and b.device == device and b.kind is not BufferKind.CONSTANT:
            memory.make("caller", b.name, plans[0].program.nbytes(b.name))
    return memory


def _stored(plans: Sequence[Plan], joins: Mapping[str, str] | None) -> dict[str, str]:
    """``joins`` with the storages of the first plan."""
    first = plans[0] if plans else None
    return {k: first.storage_of(v) if first and v in first.placements else v for k, v in (joins or {}).items()}


def _run(memory: _Device, found: _Moments, owner: str, joins: Mapping[str, str]) -> None:
    if found.reserve or found.requests:
        memory.begin(found)
    steps = zip(found.births, found.scratch, found.deaths, found.slabs, strict=True)
    for births, scratch, deaths, slabs in steps:
        for name, nbytes in births:
            memory.make(owner, name, nbytes)
        if scratch:
            memory.make(owner, "(scratch)", scratch)
            memory.drop(owner, "(scratch)")
        for name in deaths:
            memory.drop("0" if name in joins else owner, joins.get(name, name))
        for name in slabs:
            memory.drop("0", name)
