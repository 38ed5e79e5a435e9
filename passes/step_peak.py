"""The bytes of a whole training step, forward and backward on one timeline, above those before it.

`StepPeak.needed` is what a budget is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.ir.plan import External, InPool, Plan
from memplan.ir.program import Buffer, evaluate

from .schedule import UNCOUNTED, rounded


@dataclass(frozen=True, slots=True)
class StepPeak:
    """The largest number of bytes alive, and when: step ``step`` of plan number ``plan``; ``series``: every step's.

    ``reserved``: what the device's caching allocator holds for the step beyond parameters and batch, where a device has
    one and its step was simulated (`Plan.step`); of several devices' the largest. It is that of steps whose gradients
    are let go of before the next one: what accumulated gradients and an optimiser's states do to the allocator is the
    caller's, and is simulated apart (`memplan.passes.reserved.optimizer_step_memory`).
    """

    nbytes: int
    plan: int
    step: int
    series: tuple[int, ...]
    reserved: int = 0

    @property
    def needed(self) -> int:
        """Bytes that must be there for the step to run."""
        return max(self.nbytes, self.reserved)


def step_peak(plans: Sequence[Plan], joins: Mapping[str, str]) -> StepPeak:
    """The peak of plans that run one after another: a forward and its backward, or one alone.

    Parameters
    ----------
    joins:
        Backward buffer -> forward buffer, for what the backward gets from the forward.
    """
    series: list[int] = []
    place: list[tuple[int, int]] = []
    between = 0
    for number, plan in enumerate(plans):
        if number:
            between += _left(plans[number - 1]) - _taken_over(plan, plans[number - 1], joins)
        for k, live in enumerate(plan.timeline):
            series.append(between + live)
            place.append((number, k))
    best = max(range(len(series)), key=lambda n: (series[n], -n))
    held = (memory.reserved - memory.resident for plan in plans for memory in plan.step.values())
    return StepPeak(series[best], *place[best], tuple(series), max(held, default=0))


def _left(plan: Plan) -> int:
    """Bytes that a plan made and that are there when it has run."""
    program = plan.program
    n = max(1, len(plan.order))
    total = 0
    ends: dict[str, int] = {}
    for name, life in plan.lifetimes.items():
        root = plan.storage_of(name)
        ends[root] = max(ends.get(root, 0), life.stop)
    for root, stop in ends.items():
        counted = program.buffers[root].memory not in UNCOUNTED
        if stop > n and counted and not isinstance(plan.placements[root], (External, InPool)):
            total += rounded(program.nbytes(root), program.buffers[root].device)
    for pool in plan.pools:
        if pool.lifetime.stop > n:
            total += rounded(evaluate(pool.nbytes, program.hints), pool.device)
    return total


def _taken_over(plan: Plan, earlier: Plan, joins: Mapping[str, str]) -> int:
    """Of what the plan before left, bytes that this plan counts itself: its donated inputs."""
    program = plan.program
    donated = [b for b in program.buffers.values() if b.donated and b.name in plan.lifetimes and b.name in joins]
    made = {earlier.storage_of(joins[b.name]) for b in donated if joins[b.name] in earlier.placements}
    inside = {m for slab in plan.slabs for m in slab.members}
    slabs = sum(rounded(evaluate(slab.nbytes, program.hints), slab.device) for slab in plan.slabs)
    return slabs + sum(rounded(program.nbytes(b.name), b.device) for b in donated if made and b.name not in inside)


def alive_at(plans: Sequence[Plan], joins: Mapping[str, str], at: StepPeak) -> list[tuple[int, Buffer]]:
    """(bytes, buffer) of what stands at a peak, largest first; what the forward left stands in a backward too."""
    found: dict[str, tuple[int, Buffer]] = {}
    plan = plans[at.plan]
    for name, life in plan.lifetimes.items():
        buffer = plan.program.buffers[name]
        root = plan.program.buffers[plan.storage_of(name)]
        outside = isinstance(plan.placements[root.name], External) and not root.donated
        if life.start <= at.step < life.stop and not outside and buffer.memory not in UNCOUNTED:
            origin = buffer
            if name in joins and at.plan:
                origin = plans[at.plan - 1].program.buffers.get(joins[name], buffer)
            found[root.name] = (plan.program.nbytes(root.name), origin)
    return sorted(found.values(), key=lambda row: (-row[0], row[1].name))
