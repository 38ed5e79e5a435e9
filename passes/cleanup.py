"""Dead operations, dead stores, common subexpressions, and loops in their simplest form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cmp_to_key, lru_cache
from typing import ClassVar

import sympy

from memplan.ir.config import Config
from memplan.ir.in_flight import Wait
from memplan.ir.index import FloorDiv, Mod, Ranges, affine, expand, ranges_of, simplify, stride_of
from memplan.ir.loops import Kernel, Range, free_symbols, walk_expressions
from memplan.ir.program import EXTERNAL_KINDS, Contract, Copy, Extern, KernelOp, Operation, Program, UserKernel

from .fuse_body import Body
from .fuse_kernels import without_stores

_ZERO = sympy.Integer(0)


@dataclass(frozen=True, slots=True)
class Cleanup:
    """The pass: drops what nobody reads, and normalises every kernel."""

    name: ClassVar[str] = "cleanup"
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, config: Config) -> Cleanup:
        return cls()

    def run(self, program: Program) -> Program:
        operations = live_operations(program)
        operations = tuple(
            replace(op, kernel=kernel)
            if isinstance(op, KernelOp) and (kernel := normalise(op.kernel)) is not op.kernel
            else op
            for op in operations
        )
        same = len(operations) == len(program.operations)
        if same and all(a is b for a, b in zip(operations, program.operations, strict=True)):
            return program
        return program.with_operations(operations)


def live_operations(program: Program) -> tuple[Operation, ...]:
    """Operations whose results somebody reads, kernels without their dead stores; program order is kept.

    What changes a buffer from outside of the program, or has an effect, stays.
    """
    wanted = set(program.output_buffers)
    wanted |= {b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS}
    kept: list[Operation] = []
    for op in reversed(program.operations):
        if isinstance(op, KernelOp):
            dead = frozenset(b for b in op.kernel.written_buffers if b not in wanted)
            if len(dead) == len(op.kernel.written_buffers):
                continue
            if dead:
                mutates = tuple(b for b in op.mutates if b not in dead)
                op = replace(op, kernel=without_stores(op.kernel, dead), mutates=mutates)
        elif not _stays(op, wanted):
            continue
        wanted.update(op.reads)
        kept.append(op)
    return tuple(reversed(kept))


def _stays(op: Extern | Copy | UserKernel, wanted: set[str]) -> bool:
    """Sizes that a call defines are named freely by buffers and loops, so such a call stays."""
    if isinstance(op, Copy):
        return op.target.buffer in wanted
    if isinstance(op, UserKernel):
        return not op.mutates or bool(wanted.intersection(op.mutates))  # one that changes nothing may print
    if op.effect or op.symbols or op.contract is Contract.ALIAS or isinstance(op, Wait):
        return True
    changed = {*op.writes, *op.mutates}
    return not changed or bool(changed & wanted)


def normalise(kernel: Kernel) -> Kernel:
    """The kernel with equal nodes shared, dead ones gone, index expressions simplified, ranges in simplest form.

    Ranges of size 1 go; a range that is only ever used split (``x // 8`` and ``x % 8``) becomes two; neighbours that
    every access runs through as one become one. Outer ranges are ordered as most accesses stride, largest first.
    """
    found = _normalised(kernel.anonymous)
    return kernel if found is kernel.anonymous else found.numbered_over(kernel.buffers)


@lru_cache(maxsize=1 << 14)
def _normalised(kernel: Kernel) -> Kernel:
    """`normalise` for all kernels that are equal but for their buffers' names."""
    body = Body(kernel.outer, kernel.row)
    moved = body.embed(kernel, {r.symbol: _ZERO for r in (*kernel.outer, *kernel.row) if r.size == 1})
    body.stores = body.embed_stores(
        kernel, {r.symbol: _ZERO for r in (*kernel.outer, *kernel.row) if r.size == 1}, moved
    )
    clean = body.kernel()
    outer = tuple(r for r in kernel.outer if r.size != 1)
    # a reduction over one point is still a reduction: its row keeps one range
    row = tuple(r for r in kernel.row if r.size != 1) or kernel.row[:1]
    clean = Kernel(outer, row, clean.nodes, clean.stores)
    clean = collapsed(ordered(split(clean)))
    return kernel if clean == kernel else clean


def with_ranges(
    kernel: Kernel, outer: tuple[Range, ...], row: tuple[Range, ...], mapping: dict[sympy.Symbol, sympy.Expr]
) -> Kernel:
    """The kernel over other ranges, its old symbols replaced."""
    body = Body(outer, row)
    moved = body.embed(kernel, mapping)
    body.stores = body.embed_stores(kernel, mapping, moved)
    return body.kernel()


def ordered(kernel: Kernel) -> Kernel:
    """Outer ranges in the order in which memory lies for most accesses, so that the innermost steps by one element.

    Every index expression has a vote on every pair of ranges that it depends on; ties keep the order. The order of
    outer points has no meaning.
    """
    if len(kernel.outer) < 2:
        return kernel
    votes = [_strides(e, tuple(r.symbol for r in kernel.outer)) for e in dict.fromkeys(_accesses(kernel))]

    def compare(a: Range, b: Range) -> int:
        both = [(v[a.symbol], v[b.symbol]) for v in votes if v.get(a.symbol) and v.get(b.symbol)]
        return sum((y > x) - (x > y) for x, y in both)

    outer = tuple(sorted(kernel.outer, key=cmp_to_key(compare)))
    return kernel if outer == kernel.outer else Kernel(outer, kernel.row, kernel.nodes, kernel.stores)


def _accesses(kernel: Kernel) -> Iterator[sympy.Expr]:
    yield from (n.index for n in kernel.loads)
    yield from (s.index for s in kernel.stores)


@lru_cache(maxsize=1 << 14)
def _strides(e: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> dict[sympy.Symbol, int]:
    """Elements that one step of each range moves an access, where that is a plain stride; sizes count as 97."""
    out: dict[sympy.Symbol, int] = {}
    for s in symbols:
        stride = stride_of(e, s)
        if stride != 0:
            value = stride.xreplace({f: sympy.Integer(97) for f in stride.free_symbols})
            if value.is_Integer:
                out[s] = abs(int(value))
    return out


def collapsed(kernel: Kernel) -> Kernel:
    """Neighbouring ranges merged where all index expressions allow it."""
    old = list(dict.fromkeys(walk_expressions(kernel)))
    ranges = ranges_of((*kernel.outer, *kernel.row))
    outer, new = _collapse(kernel.outer, old, ranges)
    row, new = _collapse(kernel.row, new, ranges_of((*outer, *kernel.row)))
    if len(outer) == len(kernel.outer) and len(row) == len(kernel.row):
        return kernel
    body = Body(outer, row)
    body.rewritten = dict(zip(old, new, strict=True))
    moved = body.embed(kernel, {})
    body.stores = body.embed_stores(kernel, {}, moved)
    return body.kernel()


def _collapse(
    level: tuple[Range, ...], expressions: list[sympy.Expr], ranges: Ranges
) -> tuple[tuple[Range, ...], list[sympy.Expr]]:
    """Merged ranges of one level (under the inner one's symbol) and the expressions over them."""
    kept: list[Range] = list(level)
    for k in range(len(kept) - 2, -1, -1):
        a, b = kept[k], kept[k + 1]
        size = a.size * b.size if _plain(a, b) else expand(sympy.sympify(a.size * b.size))
        merged = tuple((s, size if s == b.symbol else n) for s, n in ranges if s != a.symbol)
        joined = _joined(a, b, expressions, merged)
        if joined is not None:
            expressions, ranges = joined, merged
            kept[k : k + 2] = [Range(b.symbol, size)]
    return tuple(kept), expressions


def _plain(a: Range, b: Range) -> bool:
    return isinstance(a.size, int) and isinstance(b.size, int)


def _joined(a: Range, b: Range, expressions: list[sympy.Expr], merged: Ranges) -> list[sympy.Expr] | None:
    """The expressions over the merged range (under ``b``'s symbol), or None if one of them needs the two apart."""
    if a.size == 0 or b.size == 0:
        return None
    out: list[sympy.Expr] = []
    for e in expressions:
        joined = _joined_one(e, a.symbol, b.symbol, b.size, merged)
        if joined is None:
            return None
        out.append(joined)
    return out


@lru_cache(maxsize=1 << 16)
def _joined_one(
    e: sympy.Expr, a: sympy.Symbol, b: sympy.Symbol, inner: int | sympy.Expr, merged: Ranges
) -> sympy.Expr | None:
    free = free_symbols(e)
    if a not in free and b not in free:
        return e
    form = affine(e)
    if form is not None and isinstance(inner, int):
        factors = dict(form[1])
        if factors.get(a, 0) != factors.get(b, 0) * inner or b not in factors:
            return None
        return sympy.Add(form[0], *(s * c for s, c in form[1] if s != a))
    if not e.has(FloorDiv, Mod):
        ca, cb = e.coeff(a, 1), e.coeff(b, 1)
        if ca != expand(cb * inner) or cb == 0:
            return None
        rest = expand(e - ca * a - cb * b)
        return None if rest.free_symbols & {a, b} else rest + cb * b
    joined = simplify(e.xreplace({a: FloorDiv(b, inner), b: Mod(b, inner)}), merged)
    return joined if _divisions(joined) <= _divisions(e) else None


def _divisions(e: sympy.Expr) -> int:
    return sum(1 for x in sympy.preorder_traversal(e) if isinstance(x, (FloorDiv, Mod)))


def split(kernel: Kernel) -> Kernel:
    """Ranges cut at the divisors that index expressions use, where that removes divisions and adds none."""
    for _ in range(4):
        found = _split_point(kernel)
        if found is None:
            return kernel
        symbol, divisor = found
        smaller = _split_at(kernel, symbol, divisor)
        before = sum(_divisions(e) for e in dict.fromkeys(walk_expressions(kernel)))
        if sum(_divisions(e) for e in dict.fromkeys(walk_expressions(smaller))) >= before:
            return kernel
        kernel = smaller
    return kernel


def _split_point(kernel: Kernel) -> tuple[sympy.Symbol, sympy.Expr] | None:
    """A range and a proper divisor of its size by which some expression divides it."""
    sizes = {r.symbol: r.size for r in (*kernel.outer, *kernel.row)}
    for e in dict.fromkeys(walk_expressions(kernel)):
        if not e.has(FloorDiv, Mod):
            continue
        for x in sympy.preorder_traversal(e):
            if isinstance(x, (FloorDiv, Mod)) and x.args[0] in sizes:
                size, divisor = sympy.sympify(sizes[x.args[0]]), x.args[1]
                if _divides(divisor, size):
                    return x.args[0], divisor
    return None


def _divides(divisor: sympy.Expr, size: sympy.Expr) -> bool:
    if divisor.is_Integer and size.is_Integer:
        return 1 < int(divisor) < int(size) and int(size) % int(divisor) == 0
    quotient = sympy.cancel(size / divisor)
    return bool(quotient.is_integer and quotient != 1 and sympy.fraction(quotient)[1] == 1)


def _split_at(kernel: Kernel, symbol: sympy.Symbol, divisor: sympy.Expr) -> Kernel:
    taken = {r.symbol.name for r in (*kernel.outer, *kernel.row)}
    name = next(n for k in range(len(taken) + 1) if (n := f"{symbol.name[0]}{k}") not in taken)
    upper = sympy.Symbol(name, integer=True, nonnegative=True)

    def cut(level: tuple[Range, ...]) -> tuple[Range, ...]:
        out: list[Range] = []
        for r in level:
            if r.symbol == symbol:
                quotient = sympy.cancel(sympy.sympify(r.size) / divisor)
                out += [Range(upper, _size(quotient)), Range(symbol, _size(divisor))]
            else:
                out.append(r)
        return tuple(out)

    return with_ranges(kernel, cut(kernel.outer), cut(kernel.row), {symbol: upper * divisor + symbol})


def _size(e: sympy.Expr) -> int | sympy.Expr:
    return int(e) if e.is_Integer else e
