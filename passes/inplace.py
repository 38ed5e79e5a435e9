"""In-place reuse: an output takes the storage of an input that nobody needs afterwards.

Decided on a fixed order, after fusion, on the kernels' external buffers. A user of the old value is inconsequential
if it was removed, has run, or is this operation itself reading each element just before writing it; so a value is
dead at its last user in the order, whatever other users the program once had.

At one operation the pairs (dying input, output) are matched so that the most bytes are saved at that step. A pair whose
output is smaller than the storage it takes holds the rest for longer than need be; it is taken only where the
simulated timeline shows that this does not raise the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import sympy
from scipy.optimize import linear_sum_assignment

from ..ir.index import expand, is_nonnegative
from ..ir.loops import Size
from ..ir.program import EXTERNAL_KINDS, Buffer, BufferKind, Contract, Extern, KernelOp, Operation, Program, evaluate
from .kernel_access import kernel_safe as safe_by_data
from .kernel_access import may_take
from .schedule import lifetimes, rounded

KernelSafe = Callable[[KernelOp, str, str], bool]
_NEVER_TAKEN = frozenset(
    {BufferKind.COMM, BufferKind.CONSTANT, BufferKind.PARAMETER, BufferKind.OUTPUT, BufferKind.SAVED}
)


@dataclass(frozen=True)
class InPlace:
    """``taken[output] = input`` whose storage it takes; ``notes`` says of other pairs why they were left."""

    taken: dict[str, str]
    notes: tuple[tuple[str, str], ...] = ()


def decide_in_place(
    program: Program, order: Sequence[str], *, kernel_safe: KernelSafe = safe_by_data
) -> dict[str, str]:
    """Outputs that take the storage of an input dying at the operation that makes them.

    Parameters
    ----------
    order:
        Names of all operations that run, in the order of the plan.
    kernel_safe:
        ``(operation, old, new)``: whether the emitted kernel may write ``new`` over ``old``; asked after the kernel's
        data has shown it safe.

    Returns
    -------
    ``{new: old}``; ``old`` may itself be in place of another buffer.
    """
    return plan_in_place(program, order, kernel_safe=kernel_safe).taken


def plan_in_place(program: Program, order: Sequence[str], *, kernel_safe: KernelSafe = safe_by_data) -> InPlace:
    """As `decide_in_place`, with the reasons for what was left."""
    return _Decision(program, order, kernel_safe).run()


@dataclass
class Reuse:
    """In-place reuse of one program, decided once for each order that is asked about; None where it is switched off."""

    program: Program
    kernel_safe: KernelSafe = safe_by_data
    enabled: bool = True
    known: dict[tuple[str, ...], InPlace] = field(default_factory=dict)

    def __call__(self, order: tuple[str, ...]) -> InPlace | None:
        """As `plan_in_place`."""
        if not self.enabled:
            return None
        if order not in self.known:
            self.known[order] = plan_in_place(self.program, order, kernel_safe=self.kernel_safe)
        return self.known[order]

    def taken(self, order: tuple[str, ...]) -> dict[str, str]:
        """As `decide_in_place`."""
        found = self(order)
        return {} if found is None else found.taken


@dataclass
class _Decision:
    program: Program
    order: Sequence[str]
    kernel_safe: KernelSafe
    taken: dict[str, str] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> InPlace:
        self.lives = lifetimes(self.program, self.order)
        self.live = self.simulate()
        self.peak = max(self.live, default=0)
        for step, name in enumerate(self.order):
            op = self.program.by_name[name]
            pairs = self.candidates(op, step)
            for old, new in self.match(pairs):
                self.take(old, new, step)
        return InPlace(self.taken, tuple(self.notes))

    def simulate(self) -> list[int]:
        """Live bytes at each step without any reuse."""
        change = [0] * (len(self.order) + 2)
        for name, life in self.lives.items():
            b = self.program.buffers[name]
            if b.kind not in EXTERNAL_KINDS or b.donated:
                change[life.start] += self.size(name)
                change[life.stop] -= self.size(name)
        live, out = 0, []
        for step, name in enumerate(self.order):
            live += change[step]
            op = self.program.by_name[name]
            scratch = evaluate(op.scratch, self.program.hints) if isinstance(op, Extern) else 0
            out.append(live + scratch)
        return out

    def size(self, name: str) -> int:
        return rounded(self.program.nbytes(name), self.program.buffers[name].device)

    # -- candidates -------------------------------------------------------------------------------------------------

    def candidates(self, op: Operation, step: int) -> list[tuple[str, str, int]]:
        """(old, new, bytes saved at this step) for every pair that is safe."""
        if isinstance(op, Extern) and op.contract is not Contract.OUT:
            return []
        made = [n for n in op.writes if self.lives[n].start == step and self.may_be_new(n)]
        if not made:
            return []
        dying = [n for n in op.reads if self.lives[n].stop == step + 1 and self.may_be_old(n)]
        found = []
        for new in made:
            for old in dying:
                reason = self.reason(op, old, new, step)
                if not reason:
                    found.append((old, new, min(self.size(old), self.size(new))))
                elif self.size(old) == self.size(new):
                    self.notes.append((new, f"not in place of {old!r} at {op.name!r}: {reason}"))
        return found

    def may_be_old(self, name: str) -> bool:
        b = self.program.buffers[name]
        if b.kind is BufferKind.INPUT:
            return b.donated and name not in self.program.output_buffers
        return b.kind not in _NEVER_TAKEN and name not in self.program.output_buffers

    def may_be_new(self, name: str) -> bool:
        b = self.program.buffers[name]
        return not b.zero_fill and b.kind is not BufferKind.COMM and b.kind not in EXTERNAL_KINDS

    def reason(self, op: Operation, old: str, new: str, step: int) -> str:
        root = self.program.buffers[self.root.get(old, old)]
        mine = self.program.buffers[new]
        if root.device != mine.device:
            return "it is on another device"
        if (root.memory, root.group) != (mine.memory, mine.group):
            return f"it is in {mine.memory.value} memory, the old value in {root.memory.value} memory"
        if mine.alignment > root.alignment:
            return f"it needs alignment {mine.alignment}"
        if not at_least(root.nbytes, mine.nbytes):
            return "its storage is not shown to be large enough"
        if not self.affordable(root, new, step):
            return "keeping the larger storage would raise the peak"
        found = may_take(op, old, new)
        if not found and isinstance(op, KernelOp) and not self.kernel_safe(op, old, new):
            found = "the emitted kernel would race"
        return found

    def affordable(self, root: Buffer, new: str, step: int) -> bool:
        """Whether the bytes of the storage that ``new`` does not need may stay until ``new`` dies."""
        extra = self.size(root.name) - self.size(new)
        stop = min(self.lives[new].stop, len(self.order))
        return extra == 0 or max(self.live[step + 1 : stop], default=0) + extra <= self.peak

    # -- choice -----------------------------------------------------------------------------------------------------

    def match(self, pairs: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
        """Each old and each new buffer at most once, for the most bytes; between equals the oldest storages.

        So what was made last is freed first, as on a stack, and leaves no gap below what goes on.
        """
        if len(pairs) <= 1:
            return [(old, new) for old, new, _ in pairs]
        olds = sorted(dict.fromkeys(old for old, _, _ in pairs), key=self.born)
        news = list(dict.fromkeys(new for _, new, _ in pairs))
        saved = np.zeros((len(olds), len(news)))
        for old, new, nbytes in pairs:
            saved[olds.index(old), news.index(new)] = nbytes
        rows, columns = linear_sum_assignment(saved, maximize=True)
        return [(olds[i], news[j]) for i, j in zip(rows, columns, strict=True) if saved[i, j] > 0]

    def born(self, name: str) -> int:
        """The step that made the storage of a buffer."""
        return self.lives[self.root.get(name, name)].start

    def take(self, old: str, new: str, step: int) -> None:
        root = self.root.get(old, old)
        self.taken[new] = old
        self.root[new] = root
        extra = self.size(root) - self.size(new)
        self.live[step] -= self.size(new)
        for k in range(step + 1, min(self.lives[new].stop, len(self.order))) if extra else ():
            self.live[k] += extra


def at_least(large: Size, small: Size) -> bool:
    """Whether ``large >= small`` for all sizes."""
    if large == small:
        return True
    return is_nonnegative(expand(sympy.sympify(large) - sympy.sympify(small)))
