"""The plan verifier: a sweep over time, with neighbours by offset. It imports no pass and shares no code with one.

What it takes a plan to mean:

* a *storage* is a buffer with all that is written in place of it, however indirectly; it exists from the first
  start to the last stop of its members, and has the bytes of its root (the member that takes nobody's place);
* a buffer in place of another starts at the step that runs the last reader of the other, or later;
* live bytes at a step are those of the storages that exist then, each rounded up as its device's allocator does,
  without the externals that the caller keeps (donated inputs count from step 0 until they stop), and the scratch of
  the operation that runs; the certificate's peak is the largest of these;
* arenas of communication memory, and what lies in them, are in no count: they are there before and after;
* held bytes count whole pools instead of the storages inside them: the plan's timeline, and its placed peak;
* a slab is an allocation of the forward with several donated inputs in it: it is held from step 0 until the last of
  their storages ends, and none of them may leave with the results, which would keep all of it alive.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import sympy

from .errors import VerificationError
from .loops import Size
from .plan import External, InPlaceOf, InPool, Own, Plan, Pool
from .program import EXTERNAL_KINDS, Buffer, BufferKind, Contract, Copy, Extern, KernelOp, Operation, UserKernel
from .verify import location, sizes_needed, verify_program
from .verify_access import extern_hazard, in_place_hazard, same_elements
from .verify_communication import check_arenas, check_flights
from .verify_kernel import evaluate_index
from .verify_slabs import check_slabs
from .verify_timeline import bytes_by_step

Values = Mapping[sympy.Symbol, int]
_LEAVING = frozenset({BufferKind.OUTPUT, BufferKind.SAVED})


def verify_plan(plan: Plan, *, check_program: bool = True) -> None:
    """Check a plan, and first its program.

    Raises
    ------
    VerificationError
        At the first rule broken, naming both buffers, the steps with their operations, the bytes and the user's line.
    """
    if check_program:
        verify_program(plan.program)
    _PlanCheck(plan).run()


def overlapping_pairs(plan: Plan, values: Values) -> Iterator[tuple[str, str]]:
    """All pairs of pool buffers that clash, by comparing every two of them: for small plans, in tests."""
    check = _PlanCheck(plan)
    boxes = [b for p in plan.pools for b in check.boxes(p, values)]
    for k, a in enumerate(boxes):
        for b in boxes[:k]:
            together = a.start < b.stop and b.start < a.stop
            if a.pool == b.pool and together and a.low < b.high and b.low < a.high:
                yield b.name, a.name


def trial_sizes(plan: Plan) -> tuple[Values, ...]:
    """The hinted sizes, and, where sizes are symbolic, a few others that a plan must hold for as well."""
    hints = plan.program.hints
    used: set[sympy.Symbol] = set()
    sizes: list[Size] = [b.nbytes for b in plan.program.buffers.values()]
    sizes += [p.offset for p in plan.placements.values() if isinstance(p, InPool)]
    for size in sizes:
        used |= set() if isinstance(size, int) else size.free_symbols
    if not used:
        return (hints,)
    order = sorted(hints, key=lambda s: s.name)
    odd = {s: 2 * k + 3 for k, s in enumerate(order)}
    falling = {s: 64 * (len(order) - k) + 1 for k, s in enumerate(order)}
    others = ({s: 3 * hints[s] + 1 for s in order}, dict.fromkeys(order, 2), odd, falling)
    return (hints, *(values for values in others if _computable(sizes, values)))


def _computable(sizes: Iterable[Size], values: Values) -> bool:
    """Whether a call may have such sizes: a window's step that is made of one is not 0."""
    try:
        for size in dict.fromkeys(sizes):
            evaluate_index(size, values)
    except ZeroDivisionError:
        return False
    return True


def recomputed_timeline(plan: Plan) -> tuple[int, ...]:
    """Held bytes at every step, by this module's definition."""
    return _PlanCheck(plan).timeline(placed=True)


class _Box:
    """A buffer's bytes in a pool over the steps in which nobody else may have them."""

    __slots__ = ("high", "low", "name", "pool", "start", "stop")

    def __init__(self, name: str, pool: str, start: int, stop: int, low: int, high: int) -> None:
        self.name, self.pool, self.start, self.stop, self.low, self.high = name, pool, start, stop, low, high


class _PlanCheck:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program = plan.program
        self.steps = len(plan.order)
        self.hints: Values = plan.program.hints
        self.position = {name: k for k, name in enumerate(plan.order)}
        self.used = {b for op in plan.program.operations for b in (*op.reads, *op.writes, *op.mutates)}

    def run(self) -> None:
        self.check_order()
        for b in self.program.buffers.values():
            self.check_lifetime(b)
        for op in self.program.operations:
            self.check_uses(op)
        check_flights((self.program.by_name[name] for name in self.plan.order), self.fail)
        self.check_pools()
        for b in self.program.buffers.values():
            self.check_placement(b)
        if self.plan.slabs:
            check_slabs(self.plan, self.members(), lambda text, b: self.fail(text, buffer=b))
        self.check_fresh_results()
        self.check_storages()
        check_arenas(self.plan, self.fail)
        for values in trial_sizes(self.plan):
            self.check_bytes(values)
        self.check_claims()

    def fail(self, message: str, *ops: Operation, buffer: Buffer | None = None) -> VerificationError:
        where = next((w for w in map(location, ops) if w), "")
        if not where and buffer is not None:
            writer = next((op for op in self.program.operations if buffer.name in op.writes), None)
            where = buffer.origin.location or ("" if writer is None else location(writer)) or buffer.origin.node
        return VerificationError(f"plan of {self.program.name!r}: {message}", where=where)

    def at(self, step: int) -> str:
        """``step 3 ('mm_1')``"""
        return f"step {step} ({self.plan.order[step]!r})" if 0 <= step < self.steps else f"step {step} (the end)"

    def operation(self, step: int) -> tuple[Operation, ...]:
        return (self.program.by_name[self.plan.order[step]],) if 0 <= step < self.steps else ()

    # -- order ------------------------------------------------------------------------------------------------------

    def check_order(self) -> None:
        if len(self.position) != self.steps:
            twice = next(n for k, n in enumerate(self.plan.order) if self.position[n] != k)
            raise self.fail(f"operation {twice!r} runs twice")
        names = set(self.program.by_name)
        for name in self.plan.order:
            if name not in names:
                raise self.fail(f"it runs {name!r}, which is no operation of the program")
        for op in self.program.operations:
            if op.name not in self.position:
                raise self.fail(f"operation {op.name!r} never runs", op)
        self.check_conflicts()
        self.check_sizes_known()

    def check_conflicts(self) -> None:
        """Every access that conflicts with an earlier one of the program must still come after it."""
        last_read: dict[str, Operation] = {}
        last_write: dict[str, Operation] = {}
        last_change: dict[str, Operation] = {}
        effect: Operation | None = None

        def later(table: dict[str, Operation], buffer: str, op: Operation) -> None:
            if buffer not in table or self.position[table[buffer].name] < self.position[op.name]:
                table[buffer] = op

        for op in self.program.operations:
            for b in op.reads:
                self.require(last_write.get(b), op, f"reads {b!r}, which {{}} writes")
                self.require(last_change.get(b), op, f"reads {b!r}, which {{}} changes")
            for b in op.mutates:
                self.require(last_read.get(b), op, f"changes {b!r}, whose old value {{}} reads")
            for b in op.writes:
                self.require(last_change.get(b), op, f"writes {b!r}, which {{}} changes before")
            if isinstance(op, Extern) and op.effect:
                self.require(effect, op, "has a side effect, and so has {} before it")
                effect = op
            for b in op.reads:
                later(last_read, b, op)
            for b in op.writes:
                later(last_write, b, op)
            for b in op.mutates:
                later(last_change, b, op)

    def check_sizes_known(self) -> None:
        """A size that a call makes known is used after it."""
        makers = {s: op for op in self.program.operations if isinstance(op, Extern) for _, s in op.symbols}
        for op in self.program.operations if makers else ():
            for symbol in sizes_needed(op) & makers.keys():
                self.require(makers[symbol], op, f"uses the size {symbol}, which {{}} makes known")

    def require(self, before: Operation | None, op: Operation, what: str) -> None:
        if before is None or before is op or self.position[before.name] < self.position[op.name]:
            return
        first, second = self.position[op.name], self.position[before.name]
        raise self.fail(f"{self.at(first)} {what.format(repr(before.name))}, but that runs only at step {second}", op)

    # -- lifetimes --------------------------------------------------------------------------------------------------

    def check_lifetime(self, b: Buffer) -> None:
        life = self.plan.lifetimes.get(b.name)
        if life is None:
            if b.kind not in EXTERNAL_KINDS and b.name not in self.used:
                return
            raise self.fail(f"buffer {b.name!r} has no lifetime", buffer=b)
        if life.stop > self.steps + 1:
            raise self.fail(f"buffer {b.name!r} lives until step {life.stop} of {self.steps}", buffer=b)
        if b.kind in EXTERNAL_KINDS:
            if life.start != 0:
                raise self.fail(f"buffer {b.name!r} is external, yet starts at {self.at(life.start)}", buffer=b)
            if not b.donated and life.stop < self.steps:
                raise self.fail(f"buffer {b.name!r} is the caller's, yet it ends at {self.at(life.stop)}", buffer=b)
        elif (b.kind in _LEAVING or b.name in self.program.output_buffers) and life.stop != self.steps + 1:
            raise self.fail(f"buffer {b.name!r} outlives the program, yet it ends at {self.at(life.stop)}", buffer=b)

    def check_uses(self, op: Operation) -> None:
        step = self.position[op.name]
        for name in dict.fromkeys((*op.reads, *op.writes, *op.mutates)):
            life = self.plan.lifetimes[name]
            if not life.start <= step < life.stop:
                raise self.fail(f"{self.at(step)} uses {name!r}, which lives over [{life.start}, {life.stop}) only", op)

    # -- places -----------------------------------------------------------------------------------------------------

    def check_pools(self) -> None:
        seen: set[str] = set()
        for p in self.plan.pools:
            if p.name in seen:
                raise self.fail(f"two pools are called {p.name!r}")
            seen.add(p.name)
            if p.lifetime.stop > self.steps + 1:
                raise self.fail(f"pool {p.name!r} lives until step {p.lifetime.stop} of {self.steps}")

    def check_placement(self, b: Buffer) -> None:
        placement = self.plan.placements.get(b.name)
        if placement is None:
            if b.name not in self.plan.lifetimes:
                return
            raise self.fail(f"buffer {b.name!r} has no place", buffer=b)
        if (b.kind in EXTERNAL_KINDS) != isinstance(placement, External):
            kind = type(placement).__name__
            raise self.fail(f"buffer {b.name!r} is {b.kind.value}, yet it is placed as {kind}", buffer=b)
        if b.kind is BufferKind.WORKSPACE and b.zero_fill and not isinstance(placement, Own):
            kind = type(placement).__name__
            raise self.fail(f"workspace {b.name!r} is filled with zeros once, yet it is placed as {kind}", buffer=b)
        if isinstance(placement, InPool):
            self.check_in_pool(b, b.name, placement)
        elif isinstance(placement, InPlaceOf):
            self.check_in_place(b, placement.buffer)

    def check_in_pool(self, b: Buffer, root: str, placement: InPool) -> None:
        pool = next((p for p in self.plan.pools if p.name == placement.pool), None)
        through = "" if root == b.name else f" (in place of {root!r})"
        if pool is None:
            raise self.fail(f"buffer {b.name!r} is in the pool {placement.pool!r}, which does not exist", buffer=b)
        if pool.device != b.device:
            raise self.fail(f"buffer {b.name!r} on {b.device} is in pool {pool.name!r} on {pool.device}", buffer=b)
        leaves = b.kind in _LEAVING or b.name in self.program.output_buffers
        if leaves and (b.kind is not BufferKind.SAVED or pool.lifetime.stop != self.steps + 1):
            raise self.fail(
                f"buffer {b.name!r} ({b.kind.value}) leaves the program, but is in pool {pool.name!r}{through}, which "
                + ("dies before it" if pool.lifetime.stop <= self.steps else "it would keep alive"),
                buffer=b,
            )
        life = self.plan.lifetimes[b.name]
        if life.start < pool.lifetime.start or life.stop > pool.lifetime.stop:
            raise self.fail(
                f"buffer {b.name!r} lives over [{life.start}, {life.stop}), its pool {pool.name!r}{through} over "
                f"[{pool.lifetime.start}, {pool.lifetime.stop}) only",
                buffer=b,
            )

    def check_in_place(self, b: Buffer, old: str) -> None:
        chain = [b.name]
        name: str | None = old
        while name is not None:
            if name not in self.program.buffers:
                raise self.fail(f"buffer {b.name!r} is in place of {name!r}, which does not exist", buffer=b)
            if name in chain:
                raise self.fail(f"buffers {', '.join(map(repr, chain))} are each in place of one another", buffer=b)
            chain.append(name)
            placement = self.plan.placements.get(name)
            name = placement.buffer if isinstance(placement, InPlaceOf) else None
        root = self.program.buffers[chain[-1]]
        if root.device != b.device:
            raise self.fail(f"buffer {b.name!r} on {b.device} is in place of {root.name!r} on {root.device}", buffer=b)
        if root.kind in EXTERNAL_KINDS and not root.donated:
            raise self.fail(f"buffer {b.name!r} overwrites {root.name!r}, which is the caller's", buffer=b)
        at_root = self.plan.placements.get(root.name)
        if isinstance(at_root, InPool):
            self.check_in_pool(b, root.name, at_root)

    def check_fresh_results(self) -> None:
        """What a call allocates itself cannot be told where to lie."""
        for op in self.program.operations:
            if not isinstance(op, Extern) or op.contract not in (Contract.FRESH, Contract.DYNAMIC):
                continue
            for name in op.writes:
                placement = self.plan.placements[name]
                if not isinstance(placement, Own):
                    kind = type(placement).__name__
                    raise self.fail(f"{op.target} allocates {name!r} itself, yet it is placed as {kind}", op)

    # -- in place ---------------------------------------------------------------------------------------------------

    def members(self) -> dict[str, list[str]]:
        """The buffers of each storage by their start, under the storage's root."""
        found: dict[str, list[str]] = {}
        for name in self.plan.placements:
            found.setdefault(self.plan.storage_of(name), []).append(name)
        for names in found.values():
            names.sort(key=lambda n: (self.plan.lifetimes[n].start, self.plan.lifetimes[n].stop))
        return found

    def check_storages(self) -> None:
        for names in self.members().values():
            for old, new in itertools.pairwise(names):
                self.check_handover(old, new)

    def check_handover(self, old: str, new: str) -> None:
        first, second = self.plan.lifetimes[old], self.plan.lifetimes[new]
        if first.stop <= second.start:
            return
        placement = self.plan.placements[new]
        both = f"{new!r} (from {self.at(second.start)}) takes the storage of {old!r}"
        if not isinstance(placement, InPlaceOf) or placement.buffer != old or first.stop > second.start + 1:
            readers = [
                o.name for o in self.program.operations if old in o.reads and self.position[o.name] >= second.start
            ]
            held = f", which {', '.join(map(repr, readers))} still read" if readers else ""
            raise self.fail(
                f"{both}{held}, which lives until step {first.stop} ({self.program.nbytes(old)} bytes)",
                *self.operation(second.start),
            )
        op = self.operation(second.start)[0]
        hazard = self.hazard(op, old, new)
        if hazard:
            raise self.fail(f"{both} ({self.program.nbytes(old)} bytes) while reading it: {hazard}", op)

    def hazard(self, op: Operation, old: str, new: str) -> str:
        """Why ``op`` may not write ``new`` over ``old``."""
        if old not in op.reads or new not in op.writes:
            return f"{op.name!r} does not turn the one into the other"
        if old in op.mutates:
            return f"{op.name!r} changes {old!r} as well"
        if self.program.buffers[new].zero_fill:
            return f"{new!r} is filled with zeros before {op.name!r} reads {old!r}"
        match op:
            case KernelOp():
                return in_place_hazard(op.kernel, old, new)
            case Extern():
                return extern_hazard(op, old, new)
            case Copy():
                return "" if same_elements(op.source, op.target) else "it copies to another layout"
            case UserKernel():
                return f"nobody knows in which order {op.kernel.function.name} reads and writes"

    # -- bytes ------------------------------------------------------------------------------------------------------

    def check_bytes(self, values: Values) -> None:
        for root, names in self.members().items():
            for name in names:
                self.check_fits(root, name, values)
        for pool in self.plan.pools:
            self.check_pool_bytes(pool, values)

    def check_fits(self, root: str, name: str, values: Values) -> None:
        need, have = self.nbytes(name, values), self.nbytes(root, values)
        if need > have:
            raise self.fail(
                f"{name!r} has {need} bytes, the storage of {root!r} that it takes {have}{self.sized(values)}",
                buffer=self.program.buffers[name],
            )
        alignments = [self.program.buffers[n].alignment for n in (name, root)]
        if alignments[0] > alignments[1] and not isinstance(self.plan.placements[root], InPool):
            raise self.fail(
                f"{name!r} needs alignment {alignments[0]}, the storage of {root!r} that it takes has {alignments[1]}",
                buffer=self.program.buffers[name],
            )

    def nbytes(self, name: str, values: Values) -> int:
        return evaluate_index(self.program.buffers[name].nbytes, values)

    def sized(self, values: Values) -> str:
        return "" if values is self.hints else f" (at {', '.join(f'{s}={v}' for s, v in values.items())})"

    def boxes(self, pool: Pool, values: Values) -> list[_Box]:
        """The pool's buffers; one that is written over its predecessor begins when the other has ended."""
        found: list[_Box] = []
        for root, names in self.members().items():
            placement = self.plan.placements[root]
            if not isinstance(placement, InPool) or placement.pool != pool.name:
                continue
            low = evaluate_index(placement.offset, values)
            free = 0
            for name in names:
                life = self.plan.lifetimes[name]
                size = self.nbytes(name, values)
                if size and max(life.start, free) < life.stop:
                    found.append(_Box(name, pool.name, max(life.start, free), life.stop, low, low + size))
                free = max(free, life.stop)
        return found

    def check_pool_bytes(self, pool: Pool, values: Values) -> None:
        capacity = evaluate_index(pool.nbytes, values)
        boxes = self.boxes(pool, values)
        for box in boxes:
            b = self.program.buffers[box.name]
            if box.low < 0 or box.high > capacity:
                raise self.fail(
                    f"{box.name!r} is at bytes [{box.low}, {box.high}) of pool {pool.name!r}, which has {capacity}"
                    f"{self.sized(values)}",
                    buffer=b,
                )
            if box.low % b.alignment:
                raise self.fail(
                    f"{box.name!r} is at byte {box.low} of pool {pool.name!r}, no multiple of {b.alignment}"
                    f"{self.sized(values)}",
                    buffer=b,
                )
        self.sweep(boxes, values)

    def sweep(self, boxes: list[_Box], values: Values) -> None:
        """Open and close boxes in time, ends before starts; what opens may touch neither neighbour."""
        events = sorted(((b.start, 1, k) for k, b in enumerate(boxes)), key=lambda e: e[0])
        events += [(b.stop, 0, k) for k, b in enumerate(boxes)]
        active: list[tuple[int, int]] = []
        for _, opens, k in sorted(events):
            entry = (boxes[k].low, k)
            place = bisect.bisect_left(active, entry)
            if not opens:
                del active[place]
                continue
            for other in active[max(place - 1, 0) : place + 1]:
                a, b = boxes[other[1]], boxes[k]
                if a.low < b.high and b.low < a.high:
                    raise self.clash(a, b, values)
            active.insert(place, entry)

    def clash(self, a: _Box, b: _Box, values: Values) -> VerificationError:
        step = max(a.start, b.start)
        return self.fail(
            f"{a.name!r} at bytes [{a.low}, {a.high}) over steps [{a.start}, {a.stop}) and {b.name!r} at bytes "
            f"[{b.low}, {b.high}) over steps [{b.start}, {b.stop}) overlap "
            f"by {min(a.high, b.high) - max(a.low, b.low)} bytes in pool {a.pool!r} at {self.at(step)}"
            f"{self.sized(values)}",
            *self.operation(step),
            buffer=self.program.buffers[b.name],
        )

    # -- claims -----------------------------------------------------------------------------------------------------

    def timeline(self, *, placed: bool, device: str | None = None) -> tuple[int, ...]:
        return bytes_by_step(self.plan, self.members(), placed=placed, device=device)

    def check_claims(self) -> None:
        held = self.timeline(placed=True)
        if len(self.plan.timeline) != len(held):
            raise self.fail(f"its timeline has {len(self.plan.timeline)} steps, not {len(held)}")
        for step, (claimed, found) in enumerate(zip(self.plan.timeline, held, strict=True)):
            if claimed != found:
                raise self.fail(
                    f"it claims {claimed} bytes held at {self.at(step)}; there are {found}", *self.operation(step)
                )
        certificate = self.plan.certificate
        checks: list[tuple[str, int, int, Callable[[int, int], bool]]] = [
            ("a peak of live bytes of", certificate.peak, max(self.timeline(placed=False)), int.__eq__),
            ("a placed peak of", certificate.placed_peak, max(held), int.__eq__),
            ("a bound over all orders of", certificate.order_bound, certificate.peak, int.__le__),
        ]
        for device, claimed in self.plan.predicted_peak.items():
            reserve = evaluate_index(self.plan.reserve.get(device, 0), self.hints)
            found = max(*self.timeline(placed=True, device=device), reserve)
            checks.append((f"a peak on {device} of", claimed, found, int.__eq__))
        for what, claimed, found, holds in checks:
            if not holds(claimed, found):
                raise self.fail(f"it claims {what} {claimed} bytes; its own order and places give {found}")
