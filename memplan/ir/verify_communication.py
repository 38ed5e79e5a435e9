"""What must hold while other processes, or streams of copies, use a program's buffers. Shares no code with a pass.

A collective in flight writes its results and reads its arguments at any time until the wait: nobody else may look at
the former or change the latter. It is checked along the order in which steps run, whatever waits say that they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from .communication import ARENA_MEMORY, SYMMETRIC_FORMS, Memory, SymmetricForm
from .errors import VerificationError
from .in_flight import Collective, InFlight, Wait
from .plan import InPool, Plan
from .program import Buffer, Extern, Operation, View
from .verify_kernel import evaluate_index

Fail = Callable[[str, Operation], VerificationError]


class PlanFail(Protocol):
    """Makes the error of a plan; the operations say which of the user's lines is meant."""

    def __call__(self, message: str, *ops: Operation) -> VerificationError: ...


class Flights:
    """The collectives and copies that have started and not been waited for, by what they use."""

    def __init__(self, fail: Fail) -> None:
        self.fail = fail
        self.writing: dict[str, InFlight] = {}
        self.reading: dict[str, list[InFlight]] = {}

    def step(self, op: Operation) -> None:
        """Check the next operation, and note what it starts or ends.

        Raises
        ------
        VerificationError
            If it reads or changes what is in flight.
        """
        if isinstance(op, Wait):
            self.land(op)
            return
        for name in dict.fromkeys((*op.reads, *op.writes, *op.mutates)):
            if name in self.writing:
                other = self.writing[name]
                raise self.fail(f"it uses {name!r}, which {other.name!r} ({other.target}) still writes", op)
        for name in dict.fromkeys((*op.writes, *op.mutates)):
            for other in self.reading.get(name, ()):
                raise self.fail(f"it changes {name!r}, which {other.name!r} ({other.target}) still reads", op)
        if isinstance(op, InFlight):
            self.writing.update(dict.fromkeys(op.in_flight_results, op))
            for name in op.in_flight_arguments:
                self.reading.setdefault(name, []).append(op)

    def land(self, op: Wait) -> None:
        name = op.mutates[0] if op.mutates else ""
        waited = op.args[0] if op.args else None
        if not isinstance(waited, View) or op.mutates != (waited.buffer,):
            raise self.fail("a wait changes the buffer that it waits for, and no other", op)
        found = self.writing.pop(name, None)
        if found is None:
            return
        for argument in found.in_flight_arguments:
            if argument not in op.reads:
                raise self.fail(f"it ends {found.name!r}, and does not keep {argument!r}, which that reads", op)
        if found in self.writing.values():
            return  # other results of it are to be waited for
        for argument in found.in_flight_arguments:
            self.reading[argument].remove(found)

    def finish(self) -> None:
        """Raise if something is in flight at the end."""
        for name, op in self.writing.items():
            raise self.fail(f"nothing waits for its result {name!r}", op)


def check_memory(op: Operation, buffers: Mapping[str, Buffer], fail: Fail) -> None:
    """Raise if an operation on communication memory is given another, or that of another group."""
    if isinstance(op, Collective):
        _check_registered(op, buffers, fail)
    if not isinstance(op, Extern) or op.target not in SYMMETRIC_FORMS:
        return
    form = SYMMETRIC_FORMS[op.target]
    view = _in_symmetric_memory(op, form)
    if view is None:
        raise fail("it has no result" if form.argument is None else f"its argument {form.argument} is no tensor", op)
    given = buffers[view.buffer]
    if given.memory is not Memory.SYMMETRIC:
        raise fail(f"{op.target} takes symmetric memory, and {view.buffer!r} is in {given.memory.value} memory", op)
    named = {a.value for a in op.args if hasattr(a, "value") and isinstance(a.value, str)}
    if given.group not in named:
        raise fail(f"{view.buffer!r} is in the symmetric memory of group {given.group!r}, not of the call's", op)


def _in_symmetric_memory(op: Extern, form: SymmetricForm) -> View | None:
    """What must lie in symmetric memory."""
    given = op.results[:1] if form.argument is None else op.args[form.argument : form.argument + 1]
    return given[0] if given and isinstance(given[0], View) else None


def _check_registered(op: Collective, buffers: Mapping[str, Buffer], fail: Fail) -> None:
    """Raise unless all that a library's collective works on is registered with its own group, or nothing is."""
    names = dict.fromkeys((*op.reads, *op.writes, *op.mutates))
    registered = [n for n in names if buffers[n].memory is Memory.REGISTERED]
    for name in registered:
        if buffers[name].group != op.group:
            raise fail(f"{name!r} is registered with group {buffers[name].group!r}, not with the call's", op)
    for name in names if registered else ():
        if name not in registered:
            raise fail(f"its {registered[0]!r} is registered with its library, and its {name!r} is not", op)


def check_flights(operations: Iterable[Operation], fail: Fail) -> None:
    """Raise at the first operation that touches what is in flight, in the order given."""
    flights = Flights(fail)
    for op in operations:
        flights.step(op)
    flights.finish()


def check_arenas(plan: Plan, fail: PlanFail) -> None:
    """Buffers of communication memory, and no others, lie in the arena of their group and type.

    They are overwritten when no peer reads them. (Registered ones are read and written by the library's calls alone,
    between the call and its wait: `check_flights` holds steps to that.)

    Raises
    ------
    VerificationError
        Naming the buffer, or the operation that overwrites too early.
    """
    pools = {p.name: p for p in plan.pools}
    held: dict[str, InPool] = {}
    for name, b in plan.program.buffers.items():
        if name not in plan.placements:
            continue
        root = plan.program.buffers[plan.storage_of(name)]
        place = plan.placements[root.name]
        pool = pools.get(place.pool) if isinstance(place, InPool) else None
        there = Memory.PLAIN if pool is None else pool.memory
        if (b.memory, b.group) != (root.memory, root.group):
            raise fail(f"{name!r} ({b.memory.value} memory) is in place of {root.name!r} ({root.memory.value} memory)")
        if there is not (b.memory if b.memory in ARENA_MEMORY else Memory.PLAIN):
            raise fail(f"{name!r} wants {b.memory.value} memory, and lies in {there.value} memory")
        if pool is not None and b.memory in ARENA_MEMORY:
            if pool.group != b.group:
                raise fail(f"{name!r} is of group {b.group!r}, its arena {pool.name!r} of group {pool.group!r}")
            if pool.lifetime.start != 0 or pool.lifetime.stop != len(plan.order) + 1:
                raise fail(f"the arena {pool.name!r} does not stay from call to call")
            assert isinstance(place, InPool)
            held[name] = place
    _check_barriers(plan, held, fail)


def _check_barriers(plan: Plan, held: Mapping[str, InPool], fail: PlanFail) -> None:
    """No byte of an arena is written before a barrier has shown that every peer has read it.

    What is still unguarded when the program ends is so when it (or another program in the same arena) begins again.
    """
    hints = plan.program.hints
    open_reads: dict[str, list[tuple[str, int, int, Operation]]] = {}  # by group: pool, bytes, who reads them

    def span(name: str) -> tuple[str, int, int]:
        low = evaluate_index(held[name].offset, hints)
        return held[name].pool, low, low + evaluate_index(plan.program.buffers[name].nbytes, hints)

    for step in plan.order:
        op = plan.program.by_name[step]
        form = SYMMETRIC_FORMS.get(op.target) if isinstance(op, Extern) else None
        view = _in_symmetric_memory(op, form) if isinstance(op, Extern) and form is not None else None
        group = plan.program.buffers[view.buffer].group if isinstance(view, View) else ""
        if form is not None and form.barrier_before:
            open_reads.pop(group, None)
        for name in (n for n in (*op.writes, *op.mutates) if n in held):
            pool, low, high = span(name)
            for other, start, stop, reader in open_reads.get(plan.program.buffers[name].group, ()):
                if other == pool and start < high and low < stop:
                    raise fail(
                        f"bytes [{low}, {high}) of arena {pool!r} are written for {name!r}, while peers may still read "
                        f"[{start}, {stop}) for {reader.name!r} ({getattr(reader, 'target', '')}), which ends without "
                        "a barrier",
                        op,
                    )
        if form is not None and isinstance(view, View) and not form.barrier_after:
            open_reads.setdefault(group, []).append((*span(view.buffer), op))
    for reads in open_reads.values():
        for pool, start, stop, reader in reads:
            raise fail(
                f"bytes [{start}, {stop}) of arena {pool!r} may still be read by peers when the next call writes them: "
                "nothing after it has a barrier",
                reader,
            )
