"""The order of a program's operations while some are merged into others: those that leave do not move the rest."""

from __future__ import annotations

from memplan.ir.program import EXTERNAL_KINDS, Operation, Program


class Slots:
    """Operations by their place in the order. A slot may be empty, or hold one operation and what has to follow it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.operations: list[tuple[Operation, ...]] = [(op,) for op in program.operations]
        #: slots in which something is stored to a buffer, and in which it is read
        self.makers: dict[str, set[int]] = {}
        self.readers: dict[str, set[int]] = {}
        for k in range(len(self.operations)):
            self._note(k)

    def _note(self, slot: int) -> None:
        for op in self.operations[slot]:
            for b in (*op.writes, *op.mutates):
                self.makers.setdefault(b, set()).add(slot)
            for b in op.reads:
                self.readers.setdefault(b, set()).add(slot)

    def place(self, first: int, second: int) -> int | None:
        """The slot of two in which their operations can run as one: the first if possible, or None."""
        return first if self.fits_first(first, second) else second if self.fits_second(first, second) else None

    def fits_first(self, first: int, second: int) -> bool:
        """Whether nothing that the second needs is made or changed between."""
        return not self._changed(first, second) & self._of(second)[0]

    def fits_second(self, first: int, second: int) -> bool:
        """Whether the first can wait for the second.

        Nobody between needs what it makes, nothing that it reads is changed, and what it reads for the last time is not
        more than what it makes: it would be alive between in its place.
        """
        reads, writes = self._of(first)
        changed = self._changed(first, second)
        touched = changed | {b for k in range(first + 1, second) for op in self.operations[k] for b in op.reads}
        if touched & writes or changed & reads:
            return False
        later = self.operations[first + 1 :]
        needed = {b for operations in later for op in operations for b in op.reads}
        dying = sum(self.program.nbytes(b) for b in reads - needed if self._may_free(b))
        return dying <= sum(map(self.program.nbytes, writes))

    def _changed(self, first: int, second: int) -> set[str]:
        """What is made or changed between two slots."""
        between = self.operations[first + 1 : second]
        return {b for operations in between for op in operations for b in (*op.writes, *op.mutates)}

    def merge(self, first: int, second: int, place: int, operations: tuple[Operation, ...]) -> None:
        """Put ``operations`` in the place of the first ones of two slots; what follows those follows them."""
        rest = (*self.operations[first][1:], *self.operations[second][1:])
        for slot in (first, second):
            for op in self.operations[slot]:
                for b in (*op.writes, *op.mutates):
                    self.makers[b].discard(slot)
                for b in op.reads:
                    self.readers[b].discard(slot)
            self.operations[slot] = ()
        self.operations[place] = (operations[0], *rest, *operations[1:])
        self._note(place)

    def flat(self) -> tuple[Operation, ...]:
        return tuple(op for operations in self.operations for op in operations)

    def _of(self, slot: int) -> tuple[set[str], set[str]]:
        """What the operations of a slot read of others, and what they write."""
        writes = {b for op in self.operations[slot] for b in (*op.writes, *op.mutates)}
        return {b for op in self.operations[slot] for b in (*op.reads, *op.mutates)} - writes, writes

    def _may_free(self, buffer: str) -> bool:
        """Whether the program may free a buffer."""
        found = self.program.buffers[buffer]
        return found.kind not in EXTERNAL_KINDS or found.donated
