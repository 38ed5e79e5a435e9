"""Communication beside computation: collectives start as early, and are waited for as late, as memory allows.

Works on a finished order. A collective moves up to behind the last operation that it depends on, its waits move down
to before the first one that depends on them; what is in flight for longer may not raise the peak over a bound. Moving
a start up lengthens the life of what it makes; moving a wait down that of what the collective reads until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.in_flight import Collective, Wait
from ..ir.program import EXTERNAL_KINDS, Program
from .schedule import UNCOUNTED, lifetimes, rounded, storages, timeline


def overlap(program: Program, order: Sequence[str], extra: int = 0) -> tuple[str, ...]:
    """The order with starts risen and waits sunk.

    Parameters
    ----------
    extra:
        Bytes by which the peak of live bytes may rise.
    """
    if not any(isinstance(op, Collective) for op in program.operations):
        return tuple(order)
    state = _Moving(program, list(order))
    state.bound = max(state.live) + extra
    for name in [n for n in order if isinstance(program.by_name[n], Collective)]:
        state.rise(name)
    # the last wait first: an earlier one may sink past it
    for name in [n for n in reversed(order) if isinstance(program.by_name[n], Wait)]:
        state.sink(name)
    return tuple(state.order)


@dataclass
class _Moving:
    program: Program
    order: list[str]
    bound: int = 0
    dependents: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, before in self.program.dependencies.items():
            for earlier in before:
                self.dependents.setdefault(earlier, set()).add(name)
        self.measure()

    def measure(self) -> None:
        """Lifetimes and live bytes of the order as it is now."""
        self.lives = lifetimes(self.program, self.order)
        stores = storages(self.program, self.lives, {})
        self.live = timeline(self.program, self.order, stores, (), frozenset())

    def size(self, buffer: str) -> int:
        b = self.program.buffers[buffer]
        if b.memory in UNCOUNTED or (b.kind in EXTERNAL_KINDS and not b.donated):
            return 0
        return rounded(self.program.nbytes(buffer), b.device)

    def rise(self, name: str) -> None:
        """Start the collective earlier."""
        op = self.program.by_name[name]
        at = self.order.index(name)
        place = {n: k for k, n in enumerate(self.order)}
        first = max((place[n] for n in self.program.dependencies[name]), default=-1) + 1
        made = sum(self.size(b) for b in op.writes if self.lives[b].start == at)
        k = at
        while k > first and self.live[k - 1] + made <= self.bound:
            k -= 1
        self.move(at, k)

    def sink(self, name: str) -> None:
        """Wait later."""
        op = self.program.by_name[name]
        at = self.order.index(name)
        place = {n: k for k, n in enumerate(self.order)}
        last = min((place[n] for n in self.dependents.get(name, ())), default=len(self.order)) - 1
        held = sum(self.size(b) for b in op.reads if self.lives[b].stop == at + 1)
        k = at
        while k < last and self.live[k + 1] + held <= self.bound:
            k += 1
        self.move(at, k)

    def move(self, at: int, to: int) -> None:
        if at == to:
            return
        self.order.insert(to, self.order.pop(at))
        self.measure()
