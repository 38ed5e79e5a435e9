"""Which saved tensors go to the host: as few as bring the peak within a limit, on the timeline of plans without copies.

Tensors are taken in the order in which the forward makes them: the earliest are needed last, so their copies have most
time both ways, and they stand at every peak between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.ir.device import DeviceFigures
from memplan.ir.plan import External, Plan
from memplan.ir.program import BufferKind

from .offload import Clock, inward, outward
from .schedule import rounded

#: Smaller tensors stay: a copy has a price of its own.
LEAST = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A saved tensor by its backward input: forward steps that make it and use it last, backward's first, bytes."""

    name: str
    made: int
    last: int
    need: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A choice: names of backward inputs, the peak by the model, microseconds that copies make the step wait."""

    names: tuple[str, ...]
    peak: int
    microseconds: float


def candidates(plans: Sequence[Plan], joins: Mapping[str, str], allowed: frozenset[str], least: int) -> list[Candidate]:
    """What may go to the host, in the order in which it is made.

    Parameters
    ----------
    joins:
        Backward input -> forward buffer.
    allowed:
        Backward inputs that a copy may stand for.
    least:
        Bytes of the smallest tensor that is worth it.
    """
    forward, backward = plans
    first = _accesses(backward)
    used = _accesses(forward)
    writers = {b: k for k, n in reversed(list(enumerate(forward.order))) for b in forward.program.by_name[n].writes}
    found = []
    for name, earlier in joins.items():
        buffer = forward.program.buffers.get(earlier)
        if name not in allowed or buffer is None or buffer.kind is not BufferKind.SAVED or earlier not in writers:
            continue
        nbytes = forward.program.nbytes(earlier)
        if nbytes >= least and name in first and not isinstance(forward.placements[earlier], External):
            found.append(Candidate(name, writers[earlier], used[earlier][1], first[name][0], nbytes))
    return sorted(found, key=lambda c: (c.made, c.name))


def _accesses(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last step that names each buffer."""
    found: dict[str, tuple[int, int]] = {}
    for k, name in enumerate(plan.order):
        op = plan.program.by_name[name]
        for b in (*op.reads, *op.writes):
            found[b] = (found[b][0] if b in found else k, k)
    return found


@dataclass(frozen=True)
class OffloadModel:
    """A step planned without copies, and what taking candidates to the host would do to it."""

    series: tuple[int, ...]
    forward: Clock
    backward: Clock
    candidates: tuple[Candidate, ...]
    bandwidth: float
    device: str

    @classmethod
    def of(
        cls,
        plans: Sequence[Plan],
        joins: Mapping[str, str],
        series: Sequence[int],
        allowed: frozenset[str],
        figures: DeviceFigures,
        device: str,
        least: int = LEAST,
    ) -> OffloadModel:
        """``series``: bytes at every step of both plans."""
        clocks = [Clock.of(p.program, p.order, figures) for p in plans]
        found = candidates(plans, joins, allowed, least)
        return cls(tuple(series), clocks[0], clocks[1], tuple(found), figures.host_bandwidth, device)

    def within(self, limit: int) -> Offloaded | None:
        """The fewest candidates that bring the peak to ``limit`` bytes or below; None if none of the numbers does."""
        # one by one: what is copied back for one tensor may make another start earlier, so peaks need not fall
        taken = (self.taking(count) for count in range(len(self.candidates) + 1))
        return next((t for t in taken if t.peak <= limit), None)

    def least(self) -> Offloaded:
        """The fewest candidates that reach the lowest peak: more only queue for the bus."""
        found = [self.taking(count) for count in range(len(self.candidates) + 1)]
        return min(found, key=lambda f: (f.peak, len(f.names)))

    def taking(self, count: int) -> Offloaded:
        """The first ``count`` candidates on the host."""
        chosen = self.candidates[:count]
        out, waited = outward(self.forward, [(c.name, c.made, c.nbytes / self.bandwidth) for c in chosen])
        back, late = inward(self.backward, [(c.name, c.need, c.nbytes / self.bandwidth) for c in chosen])
        steps = len(self.forward.starts) - 1
        change = [0] * (len(self.series) + 1)
        freed = {f.name: f.wait for f in out}
        issued = {f.name: f.issue for f in back}
        for c in chosen:
            size = rounded(c.nbytes, self.device)
            change[max(freed[c.name], c.last + 1)] -= size
            change[steps + issued[c.name]] += size
        live = peak = 0
        for by, held in zip(change, self.series, strict=False):
            live += by
            peak = max(peak, held + live)
        return Offloaded(tuple(c.name for c in chosen), peak, waited + late)
