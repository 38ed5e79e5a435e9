"""What must hold while other processes use a program's buffers. Shares no code with a pass.

A collective in flight writes its results and reads its arguments at any time until the wait: nobody else may look at
the former or change the latter. It is checked along the order in which steps run, whatever waits say that they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .communication import SYMMETRIC_FORMS, Memory
from .errors import VerificationError
from .program import Buffer, Collective, Extern, Operation, View, Wait

Fail = Callable[[str, Operation], VerificationError]


class Flights:
    """The collectives that have started and not been waited for, by what they use."""

    def __init__(self, fail: Fail) -> None:
        self.fail = fail
        self.writing: dict[str, Collective] = {}
        self.reading: dict[str, list[Collective]] = {}

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
        if isinstance(op, Collective):
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
    """Raise if an operation on symmetric memory is given another, or that of another group."""
    if not isinstance(op, Extern) or op.target not in SYMMETRIC_FORMS:
        return
    form = SYMMETRIC_FORMS[op.target]
    view = op.args[form.argument] if form.argument < len(op.args) else None
    if not isinstance(view, View):
        raise fail(f"its argument {form.argument} is no tensor", op)
    given = buffers[view.buffer]
    if given.memory is not Memory.SYMMETRIC:
        raise fail(f"{op.target} takes symmetric memory, and {view.buffer!r} is in {given.memory.value} memory", op)
    named = {a.value for a in op.args if hasattr(a, "value") and isinstance(a.value, str)}
    if given.group not in named:
        raise fail(f"{view.buffer!r} is in the symmetric memory of group {given.group!r}, not of the call's", op)


def check_flights(operations: Iterable[Operation], fail: Fail) -> None:
    """Raise at the first operation that touches what is in flight, in the order given."""
    flights = Flights(fail)
    for op in operations:
        flights.step(op)
    flights.finish()
