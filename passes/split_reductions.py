"""Long reductions of few rows, split into partial ones so that every multiprocessor of a GPU has work.

A bias's gradient sums 16384 rows into 768 columns, a batch norm's statistics 800,000 pixels into 64 channels: one
program instance for each result leaves most of a GPU idle. Such a kernel becomes two: the first reduces parts of the
row into a small buffer of partial results, the second reduces those and does what came after. The parts are fixed, so
that the result is the same in every run. Only the order of summation changes. A row that divides into no suitable
number of equal parts has a shorter last one, where what is reduced has a neutral element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
import torch

from memplan.ir.config import Config
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Level,
    Load,
    Node,
    Random,
    Range,
    Reduce,
    Store,
    StoreMode,
    index_symbols,
    operands,
    outer_symbol,
    row_symbol,
    value_references,
    value_symbol,
)
from memplan.ir.program import Buffer, BufferKind, KernelOp, Operation, Origin, Program

from .fuse_costs import row_is_contiguous

_MULTIPROCESSORS = 132
#: program instances that a kernel should have for each multiprocessor
_INSTANCES = 8
#: columns that one instance takes where the columns are contiguous (`codegen.triton_configs`)
_COLUMNS = 64
#: fewest elements of the row that a part must keep: contiguous ones, and strided ones
_CONTIGUOUS_PART = 2048
_STRIDED_PART = 64
_LEAST_ELEMENTS = 1 << 20
#: elements that one instance reads in the time of two launches with work for all: it reads a million in 54 us, where
#: the two take 3.6 (measured on an H100)
_LONG = 1 << 17
#: bytes of partial results above which splitting is not worth its memory
_LARGEST_PARTIALS = 4 << 20

_SIMPLE = frozenset({"sum", "prod", "max", "min", "any", "all"})
#: where no divisor of the row is within this factor of the number of parts that is wanted, the last part is shorter
_FAR = 2.0
_PARTS = {"welford": 3, "welford_combine": 3}


@dataclass(frozen=True, slots=True)
class SplitReductions:
    """The pass. It comes after fusion, which would not find its pattern in split kernels.

    ``least_elements``: fewest elements that a kernel must read; below, a second launch costs more than idle
    multiprocessors. A kernel that leaves more than ``long`` elements to one program instance is split all the same.
    """

    name: ClassVar[str] = "split_reductions"
    requires: ClassVar[tuple[str, ...]] = ("fusion",)
    least_elements: int = _LEAST_ELEMENTS
    long: int = _LONG

    @classmethod
    def configured(cls, config: Config) -> SplitReductions:
        return cls()

    def run(self, program: Program) -> Program:
        operations: list[Operation] = []
        buffers = dict(program.buffers)
        for op in program.operations:
            found = None
            if isinstance(op, KernelOp) and op.device.startswith("cuda"):
                found = split(op, buffers, self.least_elements, self.long)
            if found is None:
                operations.append(op)
                continue
            first, second, made = found
            operations += [first, second]
            buffers.update((b.name, b) for b in made)
        if len(operations) == len(program.operations):
            return program
        return replace(program, operations=tuple(operations), buffers=buffers)


def split(
    op: KernelOp, buffers: dict[str, Buffer], least_elements: int = _LEAST_ELEMENTS, long: int = _LONG
) -> tuple[KernelOp, KernelOp, tuple[Buffer, ...]] | None:
    """The two kernels and the buffers between them, or None where splitting is impossible or does not pay."""
    kernel = op.kernel
    parts = _parts(kernel, least_elements, long)
    if parts is None or not splittable(kernel):
        return None
    chosen, count = parts
    origin = op.origins[0] if op.origins else Origin()
    slots = partials(kernel)
    rows = math.prod(int(r.size) for r in kernel.outer)
    made = []
    for k, (_, _, dtype) in enumerate(slots):
        name = f"{op.name}_part{k}"
        if name in buffers:
            raise ValueError(f"buffer {name} exists")
        nbytes = rows * count * dtype.itemsize
        made.append(Buffer(name, nbytes, dtype, op.device, BufferKind.TEMPORARY, origin))
    if sum(int(b.nbytes) for b in made) > _LARGEST_PARTIALS:
        return None
    names = tuple(b.name for b in made)
    first = _first_kernel(kernel, chosen, count, slots, names)
    second = second_kernel(kernel, count, slots, names)
    return (
        KernelOp(f"{op.name}_parts", first, op.device, op.origins),
        replace(op, kernel=second),
        tuple(made),
    )


def splittable(kernel: Kernel) -> bool:
    """One level of reductions of known kinds over a static space, nothing stored along the row."""
    if not kernel.reductions or any(not isinstance(r.size, int) or r.size == 0 for r in (*kernel.outer, *kernel.row)):
        return False
    needs: list[bool] = []  # whether a node needs a reduction
    for node in kernel.nodes:
        needs.append(isinstance(node, Reduce) or any(needs[a] for a in operands(node)))
        if isinstance(node, Reduce) and (
            (node.op not in _SIMPLE and node.op not in _PARTS) or any(needs[a] for a in node.args)
        ):
            return False
    return all(kernel.store_level(s) is not Level.POINT and s.mode is StoreMode.SET for s in kernel.stores)


def _parts(kernel: Kernel, least_elements: int, long: int) -> tuple[int, int] | None:
    """Which row range to split, and into how many parts; None where there are instances enough."""
    if not all(isinstance(r.size, int) for r in (*kernel.outer, *kernel.row)) or not kernel.row:
        return None
    outer = math.prod(int(r.size) for r in kernel.outer)
    row = math.prod(int(r.size) for r in kernel.row)
    contiguous = row_is_contiguous(kernel)
    instances = outer if contiguous else -(-outer // _COLUMNS)
    if outer * row < least_elements and outer * row < long * instances:
        return None
    wanted = round(_MULTIPROCESSORS * _INSTANCES / instances)
    most = row // (_CONTIGUOUS_PART if contiguous else _STRIDED_PART)
    if wanted < 2 or most < 2:
        return None
    target = min(wanted, most)
    best: tuple[float, int, int] | None = None
    for k, r in enumerate(kernel.row):
        for count in _divisors(int(r.size)):
            # the nearest to the target; at equal distance the outermost range, whose parts stay contiguous
            if 2 <= count <= most:
                distance = abs(math.log(count / target))
                if best is None or distance < best[0]:
                    best = (distance, k, count)
    if (best is None or best[0] > math.log(_FAR)) and _may_be_cut(kernel):
        k = max(range(len(kernel.row)), key=lambda k: int(kernel.row[k].size))
        size = int(kernel.row[k].size)
        length = -(-size // min(target, size))
        count = -(-size // length)
        distance = abs(math.log(count / target))
        if count >= 2 and (best is None or distance < best[0]):
            best = (distance, k, count)
    return None if best is None else best[1:]


def _may_be_cut(kernel: Kernel) -> bool:
    """Whether parts may reach beyond the end of the row: what is there has to count for nothing, and not be checked."""
    simple = all(isinstance(n, Reduce) and n.op in _SIMPLE for n in (kernel.nodes[k] for k in kernel.reductions))
    return simple and not kernel.checks_indices


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


Slot = tuple[int, int, torch.dtype]
"""A partial result: the reduction's position, which of its results (-1: it has one), and the type that is kept."""


def partials(kernel: Kernel) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    for k in kernel.reductions:
        node = kernel.nodes[k]
        assert isinstance(node, Reduce)
        kept = torch.float32 if node.dtype.is_floating_point and node.dtype.itemsize < 4 else node.dtype
        slots += [(k, i, kept) for i in range(_PARTS[node.op])] if node.op in _PARTS else [(k, -1, kept)]
    return tuple(slots)


def _row_major(outer: tuple[Range, ...]) -> tuple[sympy.Expr, int]:
    """Flat position of a point of the outer ranges, and their number of points."""
    flat, stride = sympy.Integer(0), 1
    for r in reversed(outer):
        flat, stride = flat + stride * r.symbol, stride * int(r.size)
    return flat, stride


def _unused(numbered: Callable[[int], sympy.Symbol], ranges: tuple[Range, ...]) -> sympy.Symbol:
    """The first symbol that none of the ranges has: after fusion they are not always numbered without gaps."""
    taken = {r.symbol for r in ranges}
    return next(s for s in map(numbered, itertools.count()) if s not in taken)


def _first_kernel(kernel: Kernel, chosen: int, count: int, slots: tuple[Slot, ...], names: tuple[str, ...]) -> Kernel:
    """The original reductions over ``1 / count`` of row range ``chosen``, their results stored."""
    part = _unused(outer_symbol, (*kernel.outer, *kernel.row))
    split_range = kernel.row[chosen]
    size = int(split_range.size)
    length = -(-size // count)
    place = part * length + split_range.symbol
    row = tuple(replace(r, size=length) if k == chosen else r for k, r in enumerate(kernel.row))
    roots = tuple(k for k, _, _ in slots)
    if length * count == size:
        nodes, renamed = subset(kernel, roots, {split_range.symbol: place})
    else:
        nodes, renamed = _cut_off(kernel, roots, split_range.symbol, place, size)
    flat, rows = _row_major(kernel.outer)
    stores = []
    for (k, item, dtype), name in zip(slots, names, strict=True):
        value = renamed[k]
        if item >= 0:
            nodes.append(Item(value, item, dtype))
            value = len(nodes) - 1
        stores.append(Store(name, part * rows + flat, value, dtype))
    return Kernel((Range(part, count), *kernel.outer), row, tuple(nodes), tuple(stores))


def _cut_off(
    kernel: Kernel, roots: tuple[int, ...], symbol: sympy.Symbol, place: sympy.Expr, size: int
) -> tuple[list[Node], dict[int, int]]:
    """The nodes that reductions need where the last part reaches beyond the end: nothing is read there, or counts."""
    nodes: list[Node] = [Index(place), Constant(size, torch.int64), Call("lt", (0, 1), torch.bool)]
    inside, renamed = 2, dict[int, int]()

    def add(node: Node) -> int:
        nodes.append(node)
        return len(nodes) - 1

    for k in sorted(_closure(kernel, roots, renamed)):
        old = kernel.nodes[k]
        node = _renamed(old, renamed, {symbol: place})
        # what is the same for the whole row stays so, and is read once
        if isinstance(node, Load) and (symbol in index_symbols(old) or operands(old)):
            mask = inside if node.mask is None else add(Call("logical_and", (node.mask, inside), torch.bool))
            node = replace(node, mask=mask)
        if isinstance(node, Reduce):
            (value,) = node.args
            dtype = nodes[value].dtype
            nothing = add(Constant(_nothing(node.op, dtype), dtype))
            node = replace(node, args=(add(Call("where", (inside, value, nothing), dtype)),))
        renamed[k] = add(node)
    return nodes, renamed


def _nothing(op: str, dtype: torch.dtype) -> bool | int | float:
    """What counts for nothing in a reduction of `_SIMPLE`."""
    if dtype == torch.bool:
        return op in ("all", "prod", "min")
    if op in ("max", "min"):
        if dtype.is_floating_point:
            return -math.inf if op == "max" else math.inf
        return torch.iinfo(dtype).min if op == "max" else torch.iinfo(dtype).max
    value = int(op in ("prod", "all"))
    return float(value) if dtype.is_floating_point else value


def second_kernel(kernel: Kernel, count: int, slots: tuple[Slot, ...], names: tuple[str, ...]) -> Kernel:
    """The partial results reduced, and everything that the kernel did once a row."""
    part = _unused(row_symbol, kernel.outer)
    flat, rows = _row_major(kernel.outer)
    nodes: list[Node] = []
    reduced: dict[int, int] = {}
    for k in kernel.reductions:
        node = kernel.nodes[k]
        assert isinstance(node, Reduce)
        loads = []
        for (of, _, dtype), name in zip(slots, names, strict=True):
            if of == k:
                nodes.append(Load(name, part * rows + flat, dtype))
                loads.append(len(nodes) - 1)
        op = "welford_combine" if node.op == "welford" else node.op
        nodes.append(replace(node, op=op, args=tuple(loads)))
        reduced[k] = len(nodes) - 1
    roots = [a for s in kernel.stores for a in _store_references(s)]
    nodes, renamed = subset(kernel, tuple(roots), {}, nodes, reduced)
    return Kernel(
        kernel.outer,
        (Range(part, count),),
        tuple(nodes),
        tuple(_renamed_store(s, renamed) for s in kernel.stores),
    )


def _store_references(store: Store) -> tuple[int, ...]:
    mask = () if store.mask is None else (store.mask,)
    return (store.value, *value_references(store.index), *mask)


def subset(
    kernel: Kernel,
    roots: tuple[int, ...],
    position: dict[sympy.Symbol, sympy.Expr],
    nodes: list[Node] | None = None,
    known: dict[int, int] | None = None,
) -> tuple[list[Node], dict[int, int]]:
    """The nodes that the roots need, appended to ``nodes``; and where each of them is now."""
    nodes, renamed = list(nodes or ()), dict(known or {})
    for k in sorted(_closure(kernel, roots, renamed)):
        nodes.append(_renamed(kernel.nodes[k], renamed, position))
        renamed[k] = len(nodes) - 1
    return nodes, renamed


def _closure(kernel: Kernel, roots: tuple[int, ...], known: dict[int, int]) -> set[int]:
    """The nodes that the roots need, up to known ones."""
    needed: set[int] = set()
    pending = list(roots)
    while pending:
        k = pending.pop()
        if k not in needed and k not in known:
            needed.add(k)
            pending.extend(operands(kernel.nodes[k]))
    return needed


def _substitute(expr: sympy.Expr, renamed: dict[int, int], position: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    values = {value_symbol(k): value_symbol(renamed[k]) for k in value_references(expr)}
    changes = {**values, **position}
    return sympy.expand(expr.xreplace(changes)) if changes else expr


def _renamed(node: Node, renamed: dict[int, int], position: dict[sympy.Symbol, sympy.Expr]) -> Node:
    """A node with its operands and symbols under their new names."""
    if isinstance(node, Load):
        mask = None if node.mask is None else renamed[node.mask]
        return replace(node, index=_substitute(node.index, renamed, position), mask=mask)
    if isinstance(node, Index):
        return replace(node, expr=_substitute(node.expr, renamed, position))
    if isinstance(node, (Call, Reduce)):
        return replace(node, args=tuple(renamed[a] for a in node.args))
    if isinstance(node, (Cast, Item)):
        return replace(node, arg=renamed[node.arg])
    if isinstance(node, Random):
        return replace(node, seed=renamed[node.seed], offset=renamed[node.offset])
    return node


def _renamed_store(store: Store, renamed: dict[int, int]) -> Store:
    mask = None if store.mask is None else renamed[store.mask]
    return replace(store, index=_substitute(store.index, renamed, {}), value=renamed[store.value], mask=mask)
