"""A step's storages on one timeline: a forward, what its backward takes over, and the backward after it.

Steps of all programs are counted through. What leaves a program for the user (a loss, gradients) lives to the end of
the step; what the forward saves lives until the backward lets go of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy

from ..ir.communication import Memory
from ..ir.loops import Size
from ..ir.plan import Pool
from ..ir.program import EXTERNAL_KINDS, BufferKind, Contract, Extern, Program, evaluate
from .allocator_replay import Requests
from .schedule import Storage, lifetimes, must_own, rounded, storages


@dataclass(frozen=True)
class Laid:
    """A program in the order in which it runs, with what is written in place of what."""

    program: Program
    order: tuple[str, ...]
    in_place: Mapping[str, str]

    @cached_property
    def stores(self) -> tuple[Storage, ...]:
        lives = lifetimes(self.program, self.order)
        pairs = {new: old for new, old in self.in_place.items() if new in lives and old in lives}
        return tuple(storages(self.program, lives, pairs))

    @cached_property
    def calls_allocate(self) -> frozenset[str]:
        """Buffers that the calls that make them allocate."""
        found: set[str] = set()
        for op in self.program.operations:
            if isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC):
                found.update(v.buffer for v in op.results if v is not None)
        return frozenset(found)

    @cached_property
    def movable(self) -> tuple[Storage, ...]:
        """What may lie in a pool of this program."""
        buffers, own = self.program.buffers, must_own(self.program)
        return tuple(
            s
            for s in self.stores
            if buffers[s.root].kind not in EXTERNAL_KINDS
            and buffers[s.root].memory is Memory.PLAIN
            and s.nbytes > 0
            and not any(m in own for m in s.members)
            and all(isinstance(buffers[m].nbytes, int) for m in s.members)
        )


@dataclass(frozen=True, slots=True)
class StepStorage:
    """One allocation that program number ``owner`` makes, alive over ``[start, stop)``.

    ``saved``: may lie in a slab, that is: the backward gets it as ``received`` and lets go of it, and no call allocates
    it. ``size`` is ``nbytes`` as an expression of the size symbols.
    """

    owner: int
    root: str
    nbytes: int
    size: Size
    start: int
    stop: int
    saved: bool = False
    received: str = ""


@dataclass(frozen=True)
class WholeStep:
    """All that one device holds while a step runs, above what is ``resident``: parameters and inputs."""

    laid: tuple[Laid, ...]
    device: str
    stores: tuple[StepStorage, ...]
    scratch: Mapping[int, int]
    starts: tuple[int, ...]
    total: int
    resident: tuple[int, ...]

    def requests(self, pools: Sequence[tuple[int, Pool, int]], inside: frozenset[tuple[int, str]]) -> Requests:
        """The allocator's calls of one step, in the order in which the wrappers make them.

        Parameters
        ----------
        pools:
            (owner, pool, the step in which it is freed).
        inside:
            (owner, root) of what lies in one of them.
        """
        births: list[list[tuple[Hashable, int]]] = [[] for _ in range(self.total + 2)]
        deaths: list[list[tuple[Hashable, int]]] = [[] for _ in range(self.total + 2)]
        for owner, pool, stop in pools:
            hints = self.laid[owner].program.hints
            births[self.starts[owner] + pool.lifetime.start].append(((owner, pool.name), evaluate(pool.nbytes, hints)))
            deaths[stop].append(((owner, pool.name), -1))
        for s in self.stores:
            if (s.owner, s.root) not in inside:
                births[s.start].append(((s.owner, s.root), s.nbytes))
                deaths[s.stop].append(((s.owner, s.root), -1))
        events: list[tuple[Hashable, int]] = []
        for step in range(self.total + 2):
            events += deaths[step]
            events += births[step]
            if self.scratch.get(step):
                events += [("scratch", self.scratch[step]), ("scratch", -1)]
        return Requests.of(self.resident, events)

    def large_peak(self, requests: Requests, smallest: int) -> int:
        """The most bytes that allocations of more than ``smallest`` bytes have at one time, above the resident ones."""
        live, peak, sizes = 0, 0, {}
        for key, size in zip(requests.keys, requests.sizes, strict=True):
            if size > smallest:
                sizes[key] = rounded(size, self.device)
                live += sizes[key]
                peak = max(peak, live)
            elif size < 0:
                live -= sizes.pop(key, 0)
        return peak

    def peak_expression(self, known: frozenset[sympy.Symbol]) -> Size | None:
        """The bytes alive at the step with the most of them, as an expression; None if it has unknown symbols."""
        if all(isinstance(s.size, int) for s in self.stores):
            return None
        change: list[int] = [0] * (self.total + 3)
        for s in self.stores:
            change[s.start] += s.nbytes
            change[s.stop] -= s.nbytes
        live, highest, peak_step = 0, -1, 0
        for step, by in enumerate(change):
            live += by
            if live > highest:
                highest, peak_step = live, step
        out: Size = 0
        for s in self.stores:
            if s.start <= peak_step < s.stop:
                out = out + s.size
        return out if isinstance(out, int) or out.free_symbols <= known else None


def whole_step(laid: Sequence[Laid], joins: Sequence[tuple[str, str]], device: str) -> WholeStep:
    """The programs, which run one after the other, on one timeline.

    Parameters
    ----------
    joins:
        (buffer of the first program, input of the last one that receives it).
    """
    starts, total = [], 0
    for one in laid:
        starts.append(total)
        total += max(1, len(one.order))
    found = {(s.owner, s.root): s for k, one in enumerate(laid) for s in _made(one, k, starts[k], total, device)}
    if len(laid) > 1:
        _take_over(found, laid, joins, starts[-1], total)
    scratch: dict[int, int] = {}
    for start, one in zip(starts, laid, strict=True):
        for k, name in enumerate(one.order):
            op = one.program.by_name[name]
            if isinstance(op, Extern) and op.device == device and op.scratch != 0:
                scratch[start + k] = evaluate(op.scratch, one.program.hints)
    first = laid[0].program
    resident = tuple(
        first.nbytes(b.name)
        for b in first.buffers.values()
        if b.kind in EXTERNAL_KINDS and b.kind is not BufferKind.CONSTANT and b.device == device
    )
    return WholeStep(tuple(laid), device, tuple(found.values()), scratch, tuple(starts), total, resident)


def _made(one: Laid, owner: int, start: int, total: int, device: str) -> list[StepStorage]:
    """The program's own allocations; what leaves it lives to the end of the step, so far."""
    program = one.program
    out = []
    for s in one.stores:
        buffer = program.buffers[s.root]
        elsewhere = buffer.device != device or buffer.memory is not Memory.PLAIN
        if elsewhere or buffer.kind in EXTERNAL_KINDS or s.nbytes == 0:
            continue
        leaves = s.lifetime.stop > len(one.order)
        kinds = {program.buffers[m].kind for m in s.members}
        saved = (
            BufferKind.SAVED in kinds
            and BufferKind.OUTPUT not in kinds
            and isinstance(buffer.nbytes, int)
            and not any(m in one.calls_allocate for m in s.members)
        )
        stop = total + 1 if leaves else start + s.lifetime.stop
        out.append(StepStorage(owner, s.root, s.nbytes, buffer.nbytes, start + s.lifetime.start, stop, saved))
    return out


def _take_over(
    found: dict[tuple[int, str], StepStorage],
    laid: Sequence[Laid],
    joins: Sequence[tuple[str, str]],
    start: int,
    total: int,
) -> None:
    """When the last program lets go of what the first one saved for it."""
    first, last = laid[0], laid[-1]
    root_of = {m: s.root for s in first.stores for m in s.members}
    ends = {m: s for s in last.stores for m in s.members}
    received: dict[str, list[str]] = {}
    for earlier, later in joins:
        if earlier in root_of and later in ends:
            received.setdefault(root_of[earlier], []).append(later)
    for (owner, root), s in list(found.items()):
        if owner != 0 or s.stop <= total:
            continue
        names = received.get(root, [])
        members = next(x.members for x in first.stores if x.root == root)
        public = any(first.program.buffers[m].kind is BufferKind.OUTPUT for m in members)
        stop, saved = total + 1, False
        if names and not public:
            stops = [_let_go(last, ends[name], name, start) for name in names]
            stop = max(stops) if max(stops) <= total else total + 1
            # what the backward returns in such a place is the user's: it must not hold a whole slab
            saved = s.saved and len(names) == 1 and stop <= total and last.program.buffers[names[0]].donated
        found[owner, root] = StepStorage(owner, root, s.nbytes, s.size, s.start, stop, saved, names[0] if saved else "")


def _let_go(last: Laid, store: Storage, name: str, start: int) -> int:
    """The step after which the backward holds a received input no more; past the end if it leaves with the results."""
    if store.lifetime.stop > len(last.order) or name in last.program.output_buffers:
        return start + len(last.order) + 1
    return start + (store.lifetime.stop if last.program.buffers[name].donated else len(last.order))
