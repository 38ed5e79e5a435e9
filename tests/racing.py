"""Runs programs with storages shared as in-place reuse says, and kernels in the worst order that is allowed.

Every row of a kernel (every point of a pointwise one) is a thread; threads are interleaved at random, point by point.
A row is passed over once per reduction stage; each pass reads memory anew and makes its stores (`due_stores`) at once.
So a kernel that reads what another point has overwritten gives a wrong answer here, sooner or later.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import sympy
import torch

from memplan.ir.loops import Call, Cast, Constant, Index, Kernel, Level, Load, Reduce, Store, operands
from memplan.ir.program import EXTERNAL_KINDS, KernelOp, Program, evaluate
from tests.program_runner import ProgramRunner

_FUNCTIONS: dict[str, Callable[..., float]] = {
    "neg": lambda a: -a,
    "tanh": math.tanh,
    "exp": math.exp,
    "sin": math.sin,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": lambda a, b: a if math.isnan(a) else b if math.isnan(b) else max(a, b),
}
_REDUCTIONS: dict[str, Callable[[float, float], float]] = {"sum": lambda a, b: a + b, "max": max}


class InPlaceRunner(ProgramRunner):
    """A `ProgramRunner` in which ``in_place[new]`` shares the bytes of the buffer it names."""

    def __init__(self, program: Program, inputs: Sequence[object], in_place: Mapping[str, str], seed: int) -> None:
        super().__init__(program, inputs)
        self.in_place = in_place
        self.random = random.Random(seed)

    def storage(self, name: str) -> torch.Tensor:
        if name not in self.buffers and name in self.in_place:
            buffer = self.program.buffers[name]
            count = evaluate(buffer.nbytes, self.symbols) // buffer.dtype.itemsize
            shared = self.storage(self.in_place[name]).untyped_storage()
            self.buffers[name] = torch.empty(0, dtype=buffer.dtype).set_(shared, 0, (count,), (1,))
        return super().storage(name)

    def step(self, op: object) -> None:
        if not isinstance(op, KernelOp):
            super().step(op)  # type: ignore[arg-type]
            return
        memory = {n: self.storage(n).numpy() for n in (*op.kernel.written_buffers, *op.kernel.read_buffers)}
        run_racing(op.kernel, memory, self.random)


def run_in_place(
    program: Program, inputs: Sequence[object], in_place: Mapping[str, str], seed: int = 0
) -> list[object]:
    return InPlaceRunner(program, inputs, in_place, seed).run()


def run_racing(kernel: Kernel, memory: Mapping[str, np.ndarray], rng: random.Random) -> None:
    """Interleave the rows of a kernel."""
    threads = [
        _row(kernel, dict(zip((r.symbol for r in kernel.outer), point, strict=True)), memory, rng)
        for point in itertools.product(*[range(int(r.size)) for r in kernel.outer])
    ]
    while threads:
        k = rng.randrange(len(threads))
        if next(threads[k], "ended") == "ended":
            threads[k] = threads[-1]
            threads.pop()


def _row(
    kernel: Kernel, outer: dict[sympy.Symbol, int], memory: Mapping[str, np.ndarray], rng: random.Random
) -> Generator[None]:
    ready: list[int] = []
    for node in kernel.nodes:
        ready.append(max((ready[k] for k in operands(node)), default=0) + isinstance(node, Reduce))
    reduced: dict[int, float] = {}
    symbols = [r.symbol for r in kernel.row]
    for number in range(max(ready, default=0) + 1):
        points = list(itertools.product(*[range(int(r.size)) for r in kernel.row]))
        rng.shuffle(points)
        due = due_stores(kernel, ready, number)
        sums = {k: n for k, n in enumerate(kernel.nodes) if isinstance(n, Reduce) and ready[k] == number + 1}
        for point in points:
            at = {**outer, **dict(zip(symbols, point, strict=True))}
            values: dict[int, float] = {}
            results = [_value(kernel, s.value, at, memory, reduced, values) for s in due]
            for k, node in sums.items():
                value = _value(kernel, node.args[0], at, memory, reduced, values)
                reduced[k] = value if k not in reduced else _REDUCTIONS[node.op](reduced[k], value)
            yield
            for store, value in zip(due, results, strict=True):
                _store(store, value, at, memory)
            yield


def due_stores(kernel: Kernel, ready: Sequence[int], number: int) -> list[Store]:
    """The stores of pass ``number``: those that cannot be made before and not later without computing more for them."""
    reductions = [ready[k] - 1 for k, n in enumerate(kernel.nodes) if isinstance(n, Reduce)]
    last = max(
        [*reductions, *(ready[s.value] for s in kernel.stores if kernel.store_level(s) is Level.POINT)], default=0
    )

    def values(roots: Sequence[int]) -> set[int]:
        along_row = {r.symbol for r in kernel.row}
        found: set[int] = set()
        for k in roots:
            node = kernel.nodes[k]
            if not isinstance(node, Reduce):
                own = {k} if isinstance(node, Load) and node.index.free_symbols & along_row else set()
                below = values(operands(node))
                found |= below | own | ({k} if below else set())
        return found

    def computed(p: int) -> set[int]:
        reduced = [o for k, n in enumerate(kernel.nodes) if isinstance(n, Reduce) and ready[k] == p + 1 for o in n.args]
        return values(reduced + [s.value for s in kernel.stores if p == last == ready[s.value]])

    def made(store: Store) -> int:
        needed = values([store.value])
        later = [p for p in range(ready[store.value] + 1, last + 1) if needed and needed <= computed(p)]
        return max(later, default=ready[store.value])

    return [s for s in kernel.stores if made(s) == number]


def _store(store: Store, value: float, at: Mapping[sympy.Symbol, int], memory: Mapping[str, np.ndarray]) -> None:
    index = int(store.index.xreplace({s: sympy.Integer(v) for s, v in at.items()}))
    array = memory[store.buffer]
    array[index] = value if array.dtype.kind == "f" else int(value) if math.isfinite(value) else 0


def _value(
    kernel: Kernel,
    k: int,
    at: Mapping[sympy.Symbol, int],
    memory: Mapping[str, np.ndarray],
    reduced: Mapping[int, float],
    values: dict[int, float],
) -> float:
    if k in values:
        return values[k]
    node = kernel.nodes[k]

    def operand(position: int) -> float:
        return _value(kernel, position, at, memory, reduced, values)

    match node:
        case Load():
            index = int(node.index.xreplace({s: sympy.Integer(v) for s, v in at.items()}))
            value = memory[node.buffer][index].item()
        case Reduce():
            value = reduced[k]
        case Constant():
            value = float(node.value)
        case Index():
            value = int(node.expr.xreplace({s: sympy.Integer(v) for s, v in at.items()}))
        case Cast():
            value = operand(node.arg)
        case Call():
            value = _FUNCTIONS[node.op](*[operand(a) for a in node.args])
        case _:
            raise AssertionError(node)
    values[k] = value
    return value


def sharing_is_harmless(program: Program, in_place: Mapping[str, str], inputs: Callable[[], list[object]]) -> bool:
    """Whether some interleavings of the program with shared storages all give what separate storages give."""
    expected = ProgramRunner(program, inputs()).run()
    for seed in range(4):
        found = run_in_place(program, inputs(), in_place, seed)
        for a, b in zip(expected, found, strict=True):
            if isinstance(a, torch.Tensor) and not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):  # type: ignore[arg-type]
                return False
    return True


def caller_keeps(program: Program) -> list[str]:
    """Buffers that a run must leave as they were: inputs that are not donated."""
    return [b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS and not b.donated]
