"""A step's storages on one timeline: a forward, what its backward takes over, and the backward after it.

Steps of all programs are counted through. What leaves a program for the user (a loss, gradients) lives to the end of
the step; what the forward saves lives until the backward lets go of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from ..ir.communication import Memory
from ..ir.loops import Size
from ..ir.plan import Pool
from ..ir.program import EXTERNAL_KINDS, BufferKind, Contract, Extern, Program, View, evaluate
from .allocator_replay import FREE, RESERVE, Requests
from .schedule import ROUNDING, Storage, lifetimes, must_own, storages


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
    def positions(self) -> Mapping[str, int]:
        """Where each buffer that leaves the program first is among its results."""
        found: dict[str, int] = {}
        for k, result in enumerate(self.program.outputs):
            if isinstance(result, View):
                found.setdefault(result.buffer, k)
        return found

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
    it. ``size`` is ``nbytes`` as an expression of the size symbols. ``gradient``: where it is among the
    results of a backward, whose order is that of the parameters; None of what is no such result.
    """

    owner: int
    root: str
    nbytes: int
    size: Size
    start: int
    stop: int
    saved: bool = False
    received: str = ""
    gradient: int | None = None


@dataclass(frozen=True, slots=True)
class _Columns:
    """What `WholeStep.requests` makes of storages and scratch: their moments, bytes, and which are gradients."""

    place: Mapping[tuple[int, str], int]
    made: NDArray[np.int64]
    freed: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    at: NDArray[np.int64]
    scratch: NDArray[np.int64]
    gradients: NDArray[np.int64]


def _pairs(keys: ArrayLike, made: ArrayLike, freed: ArrayLike, nbytes: ArrayLike) -> NDArray[np.int64]:
    """Moments, keys and sizes of what is made and freed, one after the other for each key."""
    sizes = np.asarray(nbytes, dtype=np.int64)
    columns = ((made, freed), (keys, keys), (sizes, np.full(len(sizes), FREE)))
    return np.array([np.stack(pair, axis=1).ravel() for pair in columns], dtype=np.int64)


def _rounded(nbytes: NDArray[np.int64], device: str) -> NDArray[np.int64]:
    """`memplan.passes.schedule.rounded` of each of some sizes; what is negative is rounded down as far."""
    step = ROUNDING.get(device.partition(":")[0], 64)
    found: NDArray[np.int64] = np.sign(nbytes) * (-(-np.abs(nbytes) // step) * step)
    return found


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
        columns = self._columns
        own = np.ones(len(self.stores), dtype=np.bool_)
        own[[columns.place[key] for key in inside if key in columns.place]] = False
        made = [(3 * (self.starts[k] + p.lifetime.start) + 1, 3 * stop) for k, p, stop in pools]
        nbytes = [evaluate(p.nbytes, self.laid[k].program.hints) for k, p, _ in pools]
        # numbers of keys: storages, pools, scratch, the reserve
        first = len(self.stores)
        parts = (
            _pairs(range(first, first + len(pools)), [m for m, _ in made], [f for _, f in made], nbytes),
            _pairs(np.flatnonzero(own), columns.made[own], columns.freed[own], columns.nbytes[own]),
            _pairs([first + len(pools)] * len(columns.scratch), columns.at, columns.at, columns.scratch),
        )
        reserve = np.array([[-1], [first + len(pools) + 1], [RESERVE]])
        when, keys, sizes = np.concatenate((reserve, *parts), axis=1)
        # in each step, what is freed, what is made, and scratch, in this order
        order = np.argsort(when, kind="stable")
        return Requests(np.array(self.resident, dtype=np.int64), keys[order], sizes[order], columns.gradients)

    @cached_property
    def _columns(self) -> _Columns:
        taken = ((s.gradient, s.owner, s.root, k) for k, s in enumerate(self.stores) if s.gradient is not None)
        scratch = {step: nbytes for step, nbytes in self.scratch.items() if nbytes}
        return _Columns(
            {(s.owner, s.root): k for k, s in enumerate(self.stores)},
            np.array([3 * s.start + 1 for s in self.stores], dtype=np.int64),
            np.array([3 * s.stop for s in self.stores], dtype=np.int64),
            np.array([s.nbytes for s in self.stores], dtype=np.int64),
            np.array([3 * step + 2 for step in scratch], dtype=np.int64),
            np.array(list(scratch.values()), dtype=np.int64),
            np.array([k for *_, k in sorted(taken)], dtype=np.int64),
        )

    def alive(self, owner: int) -> NDArray[np.int64]:
        """Bytes alive in each step of a program, every storage of the whole step its own allocation."""
        change = np.zeros(self.total + 3, dtype=np.int64)
        for s in self.stores:
            change[s.start] += s.nbytes
            change[s.stop] -= s.nbytes
        first = self.starts[owner]
        return np.cumsum(change)[first : first + len(self.laid[owner].order)]

    def allocating_calls(self, owner: int, smallest: int) -> list[int]:
        """Steps of a program whose calls allocate a result of more than ``smallest`` bytes themselves."""
        one = self.laid[owner]
        own = {b for b in one.calls_allocate if one.program.nbytes(b) > smallest}
        on_device = {b for b in own if one.program.buffers[b].device == self.device}
        return [k for k, name in enumerate(one.order) if not on_device.isdisjoint(one.program.by_name[name].writes)]

    def large_peak(self, requests: Requests, smallest: int) -> int:
        """The most bytes that allocations of more than ``smallest`` bytes have at one time, above the resident ones."""
        change = requests.allocated()
        large = np.abs(change) > smallest
        return int(np.cumsum(_rounded(change[large], self.device)).max(initial=0))

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
    place = {name: k for k, name in enumerate(program.buffers)}  # what is born together is made in this order
    for s in sorted(one.stores, key=lambda s: place[s.root]):
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
        gradient = _position(one, s) if owner > 0 else None
        first = start + s.lifetime.start
        out.append(StepStorage(owner, s.root, s.nbytes, buffer.nbytes, first, stop, saved, gradient=gradient))
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
        stop, saved, gradient = total + 1, False, None
        if names and not public:
            stops = [_let_go(last, ends[name], name, start) for name in names]
            stop = max(stops) if max(stops) <= total else total + 1
            gradient = min((k for n in names if (k := _position(last, ends[n])) is not None), default=None)
            # what the backward returns in such a place is the user's: it must not hold a whole slab
            saved = s.saved and len(names) == 1 and stop <= total and last.program.buffers[names[0]].donated
        name = names[0] if saved else ""
        found[owner, root] = StepStorage(owner, root, s.nbytes, s.size, s.start, stop, saved, name, gradient)


def _position(one: Laid, store: Storage) -> int | None:
    """Where the storage is among the program's results; None if it is not."""
    positions = [one.positions[m] for m in store.members if m in one.positions]
    return min(positions, default=None)


def _let_go(last: Laid, store: Storage, name: str, start: int) -> int:
    """The step after which the backward holds a received input no more; past the end if it leaves with the results."""
    if store.lifetime.stop > len(last.order) or name in last.program.output_buffers:
        return start + len(last.order) + 1
    return start + (store.lifetime.stop if last.program.buffers[name].donated else len(last.order))
