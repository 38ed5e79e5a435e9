"""Matrix products that become templates: the ATen call and the kernel after it in one launch.

Which do, and in what configuration, was measured beforehand (`chosen`); this pass finds the places and rewrites them.
It comes before planning, since it changes what buffers there are: the product itself is never written, and workspaces
are added.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import sympy
import torch

from memplan.ir.config import Config
from memplan.ir.index import expand, flat_index, ranges_of, simplify
from memplan.ir.index_inversion import invert
from memplan.ir.loops import CHECKED_INDEX, Call, Kernel, Load, Range, Store, StoreMode, outer_symbol, value_references
from memplan.ir.program import Contract, Extern, KernelOp, Literal, Operation, Program, View
from memplan.ir.template import ACCUMULATOR, Product, ProductConfig, Template, canonical_product

from .cleanup import with_ranges
from .order_bound import forced_bound
from .order_model import adjacency
from .reorder import order_graph
from .schedule import lifetimes, storages, timeline

#: target -> position of the bias (or None) and of the factors
_PRODUCTS: dict[str, tuple[int | None, int, int]] = {
    "aten.mm.out": (None, 0, 1),
    "aten.addmm.out": (0, 1, 2),
    "aten.bmm.out": (None, 0, 1),
    "aten.baddbmm.out": (0, 1, 2),
}
_HALVES = frozenset({torch.float16, torch.bfloat16})
#: fewest rows, columns and terms: below, a tile is mostly empty
_LEAST = 16
_ALIGNMENT = 16
UNCHOSEN = ProductConfig(0, 0, 0)


@dataclass(frozen=True)
class Candidate:
    """A product that could be a template: the call, the kernel that takes it up (or None), and what they compute."""

    call: Extern
    kernel: KernelOp | None
    product: Product

    @property
    def key(self) -> Product:
        """Equal for equal work, whatever the buffers are called."""
        return canonical_product(self.product).product


#: (candidates, their program) -> configurations by key
Choose = Callable[[Sequence[Candidate], Program], Mapping[Product, ProductConfig]]


def _none(found: Sequence[Candidate], program: Program) -> Mapping[Product, ProductConfig]:
    return {}


@dataclass(frozen=True, slots=True)
class Templates:
    """The pass. ``choose`` gives, for the keys of candidates that are to become templates, their configuration.

    It is a function of data alone: what was measured on the device.
    """

    name: ClassVar[str] = "templates"
    requires: ClassVar[tuple[str, ...]] = ("fusion",)
    choose: Choose = field(default=_none)

    @classmethod
    def configured(cls, config: Config) -> Templates:
        return cls()

    def run(self, program: Program) -> Program:
        found = candidates(program)
        chosen = self.choose(found, program) if found else {}
        taken = {}
        for candidate in found:
            config = chosen.get(candidate.key)
            if config is not None:
                taken[candidate.call.name] = replace(candidate, product=replace(candidate.product, config=config))
        limit = peak(program)
        while taken:
            changed = _rewritten(program, taken)
            if peak(changed) <= limit:
                return changed
            # workspaces that the peak has no room for: the largest goes first
            taken.pop(max(taken, key=lambda name: (sum(w.count for w in taken[name].product.workspaces()), name)))
        return program


def peak(program: Program) -> int:
    """Most live bytes at once in program order, every storage by itself."""
    order = [op.name for op in program.operations]
    stores = storages(program, lifetimes(program, order), {})
    return max(timeline(program, order, stores, (), frozenset()), default=0)


def least_peak(found: Iterable[Candidate], program: Program) -> int:
    """Bytes that the program holds at one of these products in whatever order it runs: its peak is no less."""
    graph = order_graph(program, {})
    near = adjacency(graph)
    position = {op.name: k for k, op in enumerate(program.operations)}
    return max((forced_bound(graph, near, position[c.call.name]) for c in found), default=0)


def candidates(program: Program) -> list[Candidate]:
    """Products of halves on a GPU, with static sizes, each with the pointwise kernel that takes up its result."""
    found: list[Candidate] = []
    used: set[str] = set()
    uses = _Uses.of(program)
    for position, op in enumerate(program.operations):
        if not isinstance(op, Extern) or op.target not in _PRODUCTS or op.contract is not Contract.OUT:
            continue
        factors = _factors(op)
        if factors is None:
            continue
        candidate = None
        consumer = _consumer(program, uses, op, position)
        if consumer is not None and consumer.name not in used:
            candidate = _with_epilogue(program, uses, op, factors, consumer)
        found.append(candidate or _alone(op, factors))
        if candidate is not None and candidate.kernel is not None:
            used.add(candidate.kernel.name)
    return found


Factors = tuple[View, View, View | None]


def _factors(op: Extern) -> Factors | None:
    """The factors and the bias as stacks of matrices, or None where no template takes them."""
    bias_at, first, second = _PRODUCTS[op.target]
    result = op.results[0]
    views = [op.args[k] for k in (first, second)] + ([] if bias_at is None else [op.args[bias_at]])
    if not op.device.startswith("cuda") or op.mutates or result is None:
        return None
    if any(not isinstance(a, Literal) or a.value != 1 for _, a in op.kwargs):
        return None  # alpha and beta
    stacks = []
    for v in views:
        if not isinstance(v, View) or v.dtype is not result.dtype or v.dtype not in _HALVES:
            return None
        if not all(isinstance(s, int) for s in (*v.sizes, *v.strides, v.offset)):
            return None
        if int(v.offset) * v.dtype.itemsize % _ALIGNMENT:
            return None
        stacks.append(_stack(v, len(result.sizes)))
    a, b = stacks[:2]
    rows, columns, inner = int(a.sizes[1]), int(b.sizes[2]), int(a.sizes[2])
    if min(rows, columns, inner) < _LEAST or any(1 not in (v.strides[1], v.strides[2]) for v in (a, b)):
        return None
    bias = None
    if bias_at is not None:
        bias = _broadcast(stacks[2], (int(a.sizes[0]), rows, columns))
    return a, b, bias


def _stack(view: View, rank: int) -> View:
    """The view with a batch before it where it has none."""
    missing = 3 - len(view.sizes)
    if rank == 3 and missing == 0:
        return view
    return replace(view, sizes=(*(1,) * missing, *view.sizes), strides=(*(0,) * missing, *view.strides))


def _broadcast(view: View, sizes: tuple[int, ...]) -> View:
    strides = tuple(0 if n == 1 != m else s for n, m, s in zip(view.sizes, sizes, view.strides, strict=True))
    return replace(view, sizes=sizes, strides=strides)


def _ranges(factors: Factors) -> tuple[Range, ...]:
    a, b, _ = factors
    return tuple(Range(outer_symbol(k), n) for k, n in enumerate((a.sizes[0], a.sizes[1], b.sizes[2])))


def _result_index(result: View, ranges: tuple[Range, ...]) -> sympy.Expr:
    stack = _stack(result, len(result.sizes))
    return flat_index([r.symbol for r in ranges], stack.strides, stack.offset)


def _row_major(ranges: tuple[Range, ...]) -> sympy.Expr:
    (x, _), (y, m), (z, n) = ((r.symbol, r.size) for r in ranges)
    return expand(x * m * n + y * n + z)


def _alone(op: Extern, factors: Factors) -> Candidate:
    result = op.results[0]
    assert result is not None
    ranges = _ranges(factors)
    load = Load(ACCUMULATOR, _row_major(ranges), result.dtype)
    store = Store(result.buffer, _result_index(result, ranges), 0, result.dtype)
    return Candidate(op, None, Product(*factors, Kernel(ranges, (), (load,), (store,)), UNCHOSEN))


@dataclass(frozen=True)
class _Uses:
    """Where in program order each buffer is read, and where it is written or mutated."""

    reads: Mapping[str, list[int]]
    changes: Mapping[str, list[int]]

    @classmethod
    def of(cls, program: Program) -> _Uses:
        reads: dict[str, list[int]] = {}
        changes: dict[str, list[int]] = {}
        for position, op in enumerate(program.operations):
            for name in dict.fromkeys(op.reads):
                reads.setdefault(name, []).append(position)
            for name in dict.fromkeys((*op.writes, *op.mutates)):
                changes.setdefault(name, []).append(position)
        return cls(reads, changes)

    def next_change(self, buffer: str, position: int) -> int | None:
        """The first position after this one at which the buffer is written or mutated."""
        return _after(self.changes.get(buffer, []), position)

    def next_read(self, buffer: str, position: int) -> int | None:
        return _after(self.reads.get(buffer, []), position)


def _after(positions: list[int], position: int) -> int | None:
    k = bisect.bisect_right(positions, position)
    return positions[k] if k < len(positions) else None


def _consumer(program: Program, uses: _Uses, op: Extern, position: int) -> KernelOp | None:
    """The next operation that reads the result, if it is a kernel that may run where the product does."""
    result = op.results[0]
    assert result is not None
    at, changed = uses.next_read(result.buffer, position), uses.next_change(result.buffer, position)
    if at is None or (changed is not None and changed < at):
        return None
    later = program.operations[at]
    if not isinstance(later, KernelOp) or later.mutates or later.device != op.device:
        return None
    # it moves to the product, so what it reads has to be there, and what it writes may not be touched between
    touched = {*later.kernel.read_buffers, *later.kernel.written_buffers} - {result.buffer}
    if any((n := uses.next_change(b, position)) is not None and n < at for b in touched):
        return None
    return later


def _with_epilogue(program: Program, uses: _Uses, op: Extern, factors: Factors, consumer: KernelOp) -> Candidate | None:
    """The candidate with the kernel's work done on the product's tiles; None where it does not walk the product."""
    result = op.results[0]
    assert result is not None
    kernel = consumer.kernel
    ranges = _ranges(factors)
    loads = [n for n in kernel.nodes if isinstance(n, Load) and n.buffer == result.buffer]
    plain = all(s.mode is StoreMode.SET and s.mask is None for s in kernel.stores)
    if kernel.row or not plain or any(isinstance(n, Call) and n.op == CHECKED_INDEX for n in kernel.nodes):
        return None
    if not loads or any(n.index != loads[0].index or n.mask is not None or n.dtype is not result.dtype for n in loads):
        return None
    if value_references(loads[0].index) or result.buffer in kernel.written_buffers:
        return None
    if any(not isinstance(r.size, int) for r in kernel.outer):
        return None
    target = _result_index(result, ranges)
    solved = invert(loads[0].index, ranges_of(kernel.outer), target, ranges_of(ranges))
    points = sympy.prod([r.size for r in kernel.outer]) - sympy.prod([r.size for r in ranges])
    if solved is None or points != 0:
        return None
    moved = with_ranges(kernel, ranges, (), solved)
    nodes = []
    for node in moved.nodes:
        if isinstance(node, Load) and node.buffer == result.buffer:
            if simplify(expand(node.index - target), ranges_of(ranges)) != 0:
                return None
            node = replace(node, buffer=ACCUMULATOR, index=_row_major(ranges))
        nodes.append(node)
    stores = list(moved.stores)
    if _needed_besides(program, uses, op, consumer):
        position = next(k for k, n in enumerate(nodes) if isinstance(n, Load) and n.buffer == ACCUMULATOR)
        stores.append(Store(result.buffer, target, position, result.dtype))
    epilogue = Kernel(ranges, (), tuple(nodes), tuple(stores))
    return Candidate(op, consumer, Product(*factors, epilogue, UNCHOSEN))


def _needed_besides(program: Program, uses: _Uses, op: Extern, consumer: KernelOp) -> bool:
    """Whether somebody else reads the product as it is."""
    result = op.results[0]
    assert result is not None
    if result.buffer in program.output_buffers:
        return True
    return any(program.operations[k].name != consumer.name for k in uses.reads.get(result.buffer, ()))


def template_operation(candidate: Candidate, program: Program) -> Template:
    """The operation that does what the candidate's call and kernel do."""
    product, call = candidate.product, candidate.call
    epilogue = product.epilogue
    flat = {b: _flat(program, b) for b in (*epilogue.read_buffers, *epilogue.written_buffers) if b != ACCUMULATOR}
    spaces = product.workspaces()
    made = [w.buffer(call.name, call.device) for w in spaces]
    scratch = [View(b.name, b.dtype, (int(b.nbytes) // b.dtype.itemsize,), (1,), 0) for b in made]
    read = [flat[b] for b in epilogue.read_buffers if b != ACCUMULATOR]
    factors = [product.a, product.b, *([] if product.bias is None else [product.bias])]
    origins = call.origins if candidate.kernel is None else (*call.origins, *candidate.kernel.origins)
    return Template(
        call.name,
        "memplan.product.template",
        (*factors, *read),
        (),
        (*(flat[b] for b in epilogue.written_buffers), *scratch),
        Contract.OUT,
        call.device,
        tuple(dict.fromkeys(origins)),
        product=product,
        workspaces=spaces,
    )


def _flat(program: Program, buffer: str) -> View:
    b = program.buffers[buffer]
    return View(buffer, b.dtype, (int(b.nbytes) // b.dtype.itemsize,), (1,), 0)


def _rewritten(program: Program, taken: Mapping[str, Candidate]) -> Program:
    gone = {c.kernel.name for c in taken.values() if c.kernel is not None}
    buffers = dict(program.buffers)
    operations: list[Operation] = []
    for op in program.operations:
        if op.name in taken:
            template = template_operation(taken[op.name], program)
            for space in template.workspaces:
                made = space.buffer(op.name, op.device)
                buffers[made.name] = made
            operations.append(template)
        elif op.name not in gone:
            operations.append(op)
    return replace(program, buffers=buffers).with_operations(tuple(operations))
