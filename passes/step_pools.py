"""Pools of a whole step, chosen by what the device's caching allocator would reserve for it.

Three things keep segments from being full: temporaries and saved tensors of all sizes that are born and die in turn,
saved tensors that die one by one while gradients, of other sizes, are born, and segments made for one size that
another one does not fill. So the candidates are: pools of temporaries over stretches of each program, or of what lives
across calls that allocate their own results; slabs of saved tensors, grouped by when the backward drops them, so that a
slab dies as a whole and gradients take its place; and a *reserve*: before the step, one request for all the bytes that
the step will need and that are not free already, freed at once, so that everything comes out of one segment. Each is
simulated (`memplan.passes.allocator_replay`) for several steps; what reserves least is taken, between equals the one
with fewer allocations.

A training step is simulated in three ways: by itself, with an optimiser after it, and with gradients that two passes
accumulate before. Held gradients and the optimiser's states lie across the segments that the first pass had, and a pool
as large as one of them finds no room in the next pass: smaller pools then reserve far less. How the user trains is not
known, so the sum of all three counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..ir.loops import Size
from ..ir.plan import Lifetime, Pool, Slab
from ..ir.program import Phase, SymbolInput
from .allocator import MIB
from .allocator_replay import FREE, NativeReplay, Replayed, Requests, replay_steps
from .core_pool import core_pool
from .pack_search import PackSearch
from .pools import Pooled, aligned, stretch_pools
from .schedule import rounded
from .whole_step import Laid, StepStorage, WholeStep, whole_step

#: In place of a number of cuts: the pool of `memplan.passes.core_pool`, and the one with another place.
CORE, WIDE = -1, -2
#: Cuts between stretches that have a pool each; None: own allocations.
CUTS = (0, None, 1, 2, 3, 7, 15, 31, CORE, WIDE)
#: Slabs that saved tensors are grouped into; 0: own allocations.
SLABS = (8, 0, 2, 4, 12, 16, 24, 32, 48, 64, 96)
#: The second step finds the segments of the first.
STEPS = 2
#: Passes whose gradients are accumulated before an optimiser's update.
PASSES = (1, 2)
#: Live bytes may grow by this part of their peak if less is reserved; each byte more must save so many reserved ones.
LIVE_TOLERANCE = 0.01
LIVE_PRICE = 3
#: The same in steps smaller than `LEAST_RESERVE`: never paid.
SMALL_PRICE = 1 << 30
#: Good enough: reserved bytes over the peak of live ones with every storage an allocation of its own.
CONTENT = 1.005
#: Nor does any kind of step reserve more than this part of its live bytes if another choice can help it: what it does
#: above counts so many times more.
WITHIN, ABOVE_PRICE = 1.03, 3
#: What one allocation fewer is worth in reserved bytes.
ALLOCATION = 16 << 10
#: Bytes of a reserve over those that the step's large allocations need at one time; 0: no reserve. A little more room
#: lets fragments lie unused where a new segment would be made otherwise; but it is alive for a moment, so it is only
#: tried where more than `ENOUGH` of the live peak would be reserved else, and not where simulations are slow.
RESERVES = (1.0, 0.0)
LARGER_RESERVES = (1.006, 1.003, 1.009, 1.0015)
#: The same where bytes that are alive for a moment cost nothing, since a budget is of those that are reserved.
BUDGET_RESERVES = (*LARGER_RESERVES, 1.05, 1.1, 1.2)
#: How often a step by itself counts under a budget, which is held against it, beside those with an optimiser.
BUDGET_WEIGHT = 3
ENOUGH = 1.02
#: A step that needs less than this has no reserve: the allocator's own segments are as large.
LEAST_RESERVE = 32 * MIB
#: Simulations of one step: with the compiled replay, and in Python.
MOST_TRIALS, MOST_TRIALS_PYTHON = 160, 6


@dataclass(frozen=True)
class StepPools:
    """For each program its pools, by which storage roots are placed; ``slabs`` as the last program gets them.

    ``reserve`` is the bytes to have free before the step, 0 for none; ``requests`` the large allocations of a training
    step that is worth a reserve, and their frees, if all sizes are known.
    """

    pooled: tuple[Pooled, ...]
    slabs: tuple[Slab, ...] = ()
    reserve: Size = 0
    requests: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Cuts of each program's pools, the number of slabs, and the reserve as in `RESERVES`."""

    cuts: tuple[int | None, ...]
    slabs: int
    reserve: float


@dataclass(frozen=True)
class _Group:
    """Saved tensors in one allocation: the forward's pool, its (root, offset) pairs, when the last of them dies."""

    pool: Pool
    offsets: tuple[tuple[str, int], ...]
    received: tuple[str, ...]
    stop: int


@dataclass(frozen=True, slots=True)
class _Trial:
    """Bytes that a candidate reserves and that are alive at most in a step by itself, and its allocations in it."""

    reserved: int
    live: int
    allocations: int


@dataclass
class _Search:
    step: WholeStep
    pack: PackSearch | None
    replay: NativeReplay | None
    #: pools and slabs even where own allocations would do
    always: bool
    may_reserve: bool
    fixed: StepPools | None
    #: reserved bytes count alone, however many are alive
    budget: bool = False
    pooled: dict[tuple[int, int | None], Pooled] = field(default_factory=dict)
    groups: dict[int, tuple[_Group, ...]] = field(default_factory=dict)
    tried: dict[_Candidate, _Trial] = field(default_factory=dict)
    #: bytes reserved and alive, for each of `PASSES`
    updated: dict[_Candidate, tuple[Replayed, ...]] = field(default_factory=dict)
    #: by cuts and number of slabs
    asked: dict[tuple[tuple[int | None, ...], int], Requests] = field(default_factory=dict)

    def run(self) -> StepPools:
        programs = len(self.step.laid)
        none = _Candidate((None,) * programs, 0, 0.0)
        base, lives = self.trial(none), [found.live for found in self.updating(none)]
        updated = sum(lives)
        allowed, needed = int(base.live * (1 + LIVE_TOLERANCE)), base.live + updated
        content = int(needed * CONTENT)

        # segments are large beside a small step, and what is alive in it must not pass eager's for one of them
        price = LIVE_PRICE * (1 + len(PASSES) * (updated > 0)) if base.live >= LEAST_RESERVE else SMALL_PRICE
        price, weight = (0, BUDGET_WEIGHT) if self.budget else (price, 1)
        content += int((weight - 1) * base.live * CONTENT)

        def alone(c: _Candidate) -> int:
            """Bytes that count against it in a step by itself. Live bytes may buy reserved ones, but no quicker step:
            what fits the segments that small tensors have anyway would be alive for nothing."""
            found = self.trial(c)
            above = max(0, found.live - (allowed if found.reserved < base.reserved else base.live))
            allocations = base.allocations if above else found.allocations
            excess = weight * ABOVE_PRICE * max(0, found.reserved - int(WITHIN * base.live))
            return weight * found.reserved + ALLOCATION * allocations + price * above + excess

        def rank(c: _Candidate) -> int:
            reserved = [found.reserved for found in self.updating(c)]
            excess = sum(max(0, r - int(WITHIN * live)) for r, live in zip(reserved, lives, strict=True))
            return alone(c) + sum(reserved) + ABOVE_PRICE * excess

        def better(best: _Candidate, other: _Candidate) -> _Candidate:
            """The other one only if it is; the longer simulation is left out where it cannot change that."""
            return best if alone(other) + updated >= rank(best) else min(best, other, key=rank)

        most = MOST_TRIALS if self.replay is not None else MOST_TRIALS_PYTHON
        found: list[_Candidate] = []
        for k, reserve in enumerate(self.reserves(), 1):
            if reserve > 1 and min(map(rank, found)) <= int((needed + (weight - 1) * base.live) * ENOUGH):
                break
            for start in self.starts(reserve):
                best = start
                for what in (*range(programs), "slabs", *range(programs), "slabs"):
                    if rank(best) <= content:
                        return self.result(best)
                    for other in self.others(best, what):
                        if other in self.tried or len(self.tried) < k * most:
                            best = better(best, other)
                found.append(best)
        return self.result(min(found, key=rank))

    def reserves(self) -> tuple[float, ...]:
        """What is tried; sizes that are not known yet are reserved as they are."""
        if not self.may_reserve:
            return (0.0,)
        known = all(isinstance(s.size, int) for s in self.step.stores)
        larger = BUDGET_RESERVES if self.budget else LARGER_RESERVES
        return (*RESERVES, *larger) if known and self.replay is not None else RESERVES

    def starts(self, reserve: float) -> list[_Candidate]:
        """Where the search begins: one pool in each program and few slabs, and own allocations."""
        programs = len(self.step.laid)
        pooled = _Candidate((0,) * programs, SLABS[0] if programs > 1 else 0, reserve)
        own = _Candidate((None,) * programs, 0, reserve)
        return [pooled] if self.always or self.fixed is not None else [pooled, own]

    def others(self, best: _Candidate, what: int | str) -> list[_Candidate]:
        """Candidates that differ from the best so far in one thing: a program's pools, or the slabs."""
        if what == "slabs":
            counts = SLABS if len(self.step.laid) > 1 and self.fixed is None else ()
            return [replace(best, slabs=k) for k in counts if k or not self.always]
        if self.fixed is not None and what != len(self.step.laid) - 1:
            return []
        cuts = [c for c in CUTS if c is not None or not self.always]
        return [replace(best, cuts=tuple(c if k == what else old for k, old in enumerate(best.cuts))) for c in cuts]

    # -- what a candidate is ----------------------------------------------------------------------------------------

    def pools_of(self, owner: int, cuts: int | None) -> Pooled:
        if self.fixed is not None and owner != len(self.step.laid) - 1:
            kept = self.fixed.pooled[owner]
            slabs = {s.name for s in self.fixed.slabs}
            offsets = {r: at for r, at in (kept.offsets or {}).items() if at[0] not in slabs}
            return Pooled(tuple(p for p in kept.pools if p.name not in slabs), offsets)
        if (owner, cuts) not in self.pooled:
            one, none = self.step.laid[owner], Pooled()
            movable = [s for s in one.movable if one.program.buffers[s.root].device == self.step.device]
            if cuts is None or not movable:
                self.pooled[owner, cuts] = none
            else:
                devices = {b.device for b in one.program.buffers.values()}
                prefix = "pool" if len(devices) == 1 else f"pool_{self.step.device.replace(':', '')}_"
                if cuts in (CORE, WIDE):
                    calls, alive = self.step.allocating_calls(owner, MIB), self.step.alive(owner)
                    found = core_pool(
                        movable, calls, alive, self.step.device, native=self.pack, name=prefix, wide=cuts == WIDE
                    )
                else:
                    found = stretch_pools(one.program, one.order, movable, cuts, self.pack, prefix=prefix)
                self.pooled[owner, cuts] = found
        return self.pooled[owner, cuts]

    def groups_of(self, count: int) -> tuple[_Group, ...]:
        if self.fixed is not None:
            return self.fixed_groups()
        if count not in self.groups:
            self.groups[count] = tuple(_grouped(self.step, count))
        return self.groups[count]

    def fixed_groups(self) -> tuple[_Group, ...]:
        assert self.fixed is not None
        first = self.fixed.pooled[0]
        ends = {s.root: s.stop for s in self.step.stores if s.owner == 0}
        found = []
        for slab in self.fixed.slabs:
            pool = next(p for p in first.pools if p.name == slab.name)
            offsets = tuple((r, offset) for r, (name, offset) in (first.offsets or {}).items() if name == slab.name)
            found.append(_Group(pool, offsets, slab.members, max(ends[r] for r, _ in offsets)))
        return tuple(found)

    def trial(self, c: _Candidate) -> _Trial:
        if c not in self.tried:
            requests = self.requests(c)
            reserve = self.reserve(requests, c.reserve)
            found = replay_steps(requests, reserve=reserve, steps=STEPS, native=self.replay)
            self.tried[c] = _Trial(found.reserved, found.live, len(requests.keys) // 2)
        return self.tried[c]

    def requests(self, c: _Candidate) -> Requests:
        """The allocator's calls: the same whatever is reserved beforehand."""
        if (c.cuts, c.slabs) not in self.asked:
            self.asked[c.cuts, c.slabs] = self.calls(c)
        return self.asked[c.cuts, c.slabs]

    def updating(self, c: _Candidate) -> tuple[Replayed, ...]:
        """Of training steps of each of `PASSES` that end with an optimiser's update; nothing of an inference."""
        requests = self.requests(c)
        if not len(requests.gradients):
            return ()
        if c not in self.updated:
            reserve = self.reserve(requests, c.reserve)
            self.updated[c] = tuple(
                replay_steps(requests.accumulated(passes=n), reserve=reserve, steps=1, native=self.replay)
                for n in PASSES
            )
        return self.updated[c]

    def calls(self, c: _Candidate) -> Requests:
        pools: list[tuple[int, Pool, int]] = []
        inside: set[tuple[int, str]] = set()
        for owner, cuts in enumerate(c.cuts):
            found = self.pools_of(owner, cuts)
            here = [p for p in found.pools if p.device == self.step.device]
            pools += [(owner, p, self.step.starts[owner] + p.lifetime.stop) for p in here]
            inside.update((owner, root) for root in found.offsets or {})
        for group in self.groups_of(c.slabs):
            pools.append((0, group.pool, group.stop))
            inside.update((0, root) for root, _ in group.offsets)
        return self.step.requests(pools, frozenset(inside))

    def reserve(self, requests: Requests, factor: float) -> int:
        """What large allocations need at one time, times the factor: small ones have segments of their own."""
        needed = self.step.large_peak(requests, MIB) if factor else 0
        return int(needed * factor) if needed >= LEAST_RESERVE else 0

    def result(self, c: _Candidate) -> StepPools:
        pooled = [self.pools_of(owner, cuts) for owner, cuts in enumerate(c.cuts)]
        groups = self.groups_of(c.slabs)
        if groups:
            offsets = dict(pooled[0].offsets or {})
            for group in groups:
                offsets.update({root: (group.pool.name, offset) for root, offset in group.offsets})
            pooled[0] = Pooled((*pooled[0].pools, *(g.pool for g in groups)), offsets)
        slabs = tuple(
            Slab(g.pool.name, g.pool.nbytes, g.pool.device, g.received, tuple(at for _, at in g.offsets))
            for g in groups
        )
        reserve: Size = self.reserve(self.requests(c), c.reserve)
        if reserve:
            known = frozenset(i.symbol for i in self.step.laid[0].program.inputs if isinstance(i, SymbolInput))
            expression = self.step.peak_expression(known)
            reserve = reserve if expression is None else expression
        return StepPools(tuple(pooled), slabs, reserve, self.large(self.requests(c)))

    def large(self, requests: Requests) -> tuple[tuple[int, int], ...]:
        """What a later step has to find room for, in another state of the allocator."""
        known = all(isinstance(s.size, int) for s in self.step.stores)
        if not (self.may_reserve and len(requests.gradients) and known and self.reserve(requests, 1.0)):
            return ()
        large: set[int] = set()
        found: list[tuple[int, int]] = []
        for key, size in zip(requests.keys.tolist(), requests.sizes.tolist(), strict=True):
            if size > MIB:
                large.add(key)
                found.append((key, size))
            elif size == FREE and key in large:
                large.remove(key)
                found.append((key, FREE))
        return tuple(found)


def _grouped(step: WholeStep, count: int) -> Iterator[_Group]:
    """The saved tensors in ``count`` slabs of about equal bytes, by when the backward drops them, the last first."""
    saved = sorted((s for s in step.stores if s.saved), key=lambda s: (-s.stop, s.start, s.root))
    total, seen, group = sum(aligned(s.nbytes) for s in saved), 0, 0
    count = min(count, len(saved) // 2)
    members: list[list[StepStorage]] = [[] for _ in range(count)]
    for s in saved if count else ():
        members[group].append(s)
        seen += aligned(s.nbytes)
        group = min(count - 1, seen * count // total)
    after = len(step.laid[0].order) + 1
    for k, inside in enumerate(m for m in members if len(m) > 1):
        offsets, size = [], 0
        for s in inside:
            offsets.append((s.root, size))
            size += aligned(s.nbytes)
        life = Lifetime(min(s.start for s in inside), after)
        pool = Pool(f"slab{step.device.replace(':', '')}_{k}", rounded(size, step.device), step.device, life)
        yield _Group(pool, tuple(offsets), tuple(s.received for s in inside), max(s.stop for s in inside))


def choose_step_pools(
    laid: Sequence[Laid],
    joins: Sequence[tuple[str, str]],
    device: str,
    *,
    pack: PackSearch | None,
    replay: NativeReplay | None,
    always: bool = False,
    fixed: StepPools | None = None,
    budget: bool = False,
) -> StepPools:
    """Pools, slabs and the reserve of the programs of a step, on one device.

    Parameters
    ----------
    laid:
        A forward and its backward, or one program alone.
    joins:
        (buffer of the forward, input of the backward that receives it).
    always:
        Pools and slabs even where own allocations are predicted to need less.
    fixed:
        An earlier choice for the forward, which holds: only the backward's pools are chosen.
    budget:
        The bytes that are reserved are what counts, not how many of them are alive.
    """
    step = whole_step(laid, joins, device)
    reserves = device.startswith("cuda") and laid[0].program.phase is not Phase.BACKWARD
    return _Search(step, pack, replay, always, reserves, fixed, budget).run()
