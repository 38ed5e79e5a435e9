"""Loops made ready for a tile: useless ranges dropped, dimensions ordered by stride and merged, axes chosen.

A kernel's ranges become one, two axes of a tile. Within an axis the dimensions are laid out row-major; neighbours merge
where every index expression allows it, so that most kernels are left with one dimension an axis and no division.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import sympy
import torch

from memplan.ir.index import FloorDiv, Mod, affine, bounds, expand, ranges_of, simplify
from memplan.ir.loops import Index, Kernel, Level, Load, Range, Size, Store, StoreMode, free_symbols, value_references
from memplan.ir.program import evaluate

Hints = Mapping[sympy.Symbol, int]

_ZERO = sympy.Integer(0)
#: A second dimension gets a tile axis of its own if accesses contiguous in it move this part of the bytes ...
_CONFLICT_PART = 0.2
#: ... and both dimensions have at least this many elements.
_CONFLICT_SIZE = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the tile: its name (``x``, ``y`` or ``r``) and its dimensions, outermost first."""

    name: str
    ranges: tuple[Range, ...]

    @property
    def numel(self) -> Size:
        out: Size = 1
        for r in self.ranges:
            out = out * r.size
        return out


@dataclass(frozen=True)
class Loops:
    """A kernel over few ranges, and the axes of its tile in tile order: ``x``, ``y x`` or ``x r``."""

    kernel: Kernel
    axes: tuple[Axis, ...]
    #: for reductions: whether the row is the contiguous dimension
    row_contiguous: bool = True

    @cached_property
    def axis_of(self) -> dict[sympy.Symbol, int]:
        return {r.symbol: k for k, axis in enumerate(self.axes) for r in axis.ranges}

    @property
    def reduces(self) -> bool:
        return self.axes[-1].name == "r"


@dataclass(frozen=True, slots=True)
class _Access:
    """One load or store: what it moves, and its stride along every range at the hinted sizes."""

    index: sympy.Expr
    nbytes: int
    strides: dict[sympy.Symbol, int]
    store: bool

    @property
    def contiguous(self) -> sympy.Symbol | None:
        return next((s for s, stride in self.strides.items() if abs(stride) == 1), None)


def arrange(kernel: Kernel, hints: Hints) -> Loops:
    """The loops that a tile runs over. Meaning and order of nodes and stores stay as they are."""
    if kernel.row and not kernel.reductions and all(kernel.store_level(s) is Level.POINT for s in kernel.stores):
        kernel = replace(kernel, outer=(*kernel.outer, *kernel.row), row=())  # nothing is reduced: plain points
    kernel = _simplified(kernel)
    kernel = _ordered(kernel, hints)
    kernel = _merged(kernel)
    if kernel.row or kernel.reductions:
        return _reduction_axes(kernel, hints)
    return _pointwise_axes(kernel, hints)


def with_indices(kernel: Kernel, outer: tuple[Range, ...], row: tuple[Range, ...], new: Iterable[sympy.Expr]) -> Kernel:
    """The kernel over other ranges, its index expressions replaced in the order of `walk_expressions`."""
    found: Iterator[sympy.Expr] = iter(new)
    nodes = []
    for node in kernel.nodes:
        if isinstance(node, Load):
            node = replace(node, index=next(found))
        elif isinstance(node, Index):
            node = replace(node, expr=next(found))
        nodes.append(node)
    stores = tuple(replace(s, index=next(found)) for s in kernel.stores)
    return Kernel(outer, row, tuple(nodes), stores)


def expressions(kernel: Kernel) -> list[sympy.Expr]:
    """Index expressions of nodes and stores, in order."""
    found = [n.index if isinstance(n, Load) else n.expr for n in kernel.nodes if isinstance(n, (Load, Index))]
    return [*found, *(s.index for s in kernel.stores)]


def _simplified(kernel: Kernel) -> Kernel:
    """Ranges of one element dropped, and divisions that the ranges make needless."""
    ranges = ranges_of((*kernel.outer, *kernel.row))
    new = [simplify(sympy.sympify(e), ranges) for e in expressions(kernel)]
    outer = tuple(r for r in kernel.outer if r.size != 1)
    row = tuple(r for r in kernel.row if r.size != 1)
    if kernel.row and not row:
        row = kernel.row[-1:]  # a reduction over one element stays one
    return with_indices(kernel, outer, row, new)


def _stride(expr: sympy.Expr, symbol: sympy.Symbol, zero: dict[sympy.Symbol, sympy.Integer]) -> int:
    if symbol not in free_symbols(expr):
        return 0
    form = affine(expr)
    if form is not None:
        return int(dict(form[1])[symbol])
    at_one = expr.xreplace({**zero, symbol: sympy.Integer(1)})
    return int(at_one - expr.xreplace({**zero, symbol: _ZERO}))


def _accesses(kernel: Kernel, hints: Hints) -> list[_Access]:
    ranges = (*kernel.outer, *kernel.row)
    sizes = {r.symbol: evaluate(r.size, hints) for r in ranges}
    found: list[tuple[sympy.Expr, torch.dtype, bool]] = [(n.index, n.dtype, False) for n in kernel.loads]
    found += [(s.index, s.dtype, True) for s in kernel.stores]
    out = []
    for index, dtype, store in dict.fromkeys(found):
        zero = {s: _ZERO for s in index.free_symbols if s in sizes or value_references(s)}
        zero |= {s: sympy.Integer(hints[s]) for s in index.free_symbols if s not in zero}
        touched = [s for s in index.free_symbols if s in sizes]
        strides = {s: _stride(index, s, zero) for s in sizes}
        out.append(_Access(index, math.prod(sizes[s] for s in touched) * dtype.itemsize, strides, store))
    return out


def _votes(accesses: list[_Access], symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, int]:
    """For each symbol, the bytes moved by accesses that are contiguous along it."""
    votes = dict.fromkeys(symbols, 0)
    for a in accesses:
        if a.contiguous in votes:
            votes[a.contiguous] += a.nbytes
    return votes


def _ordered(kernel: Kernel, hints: Hints) -> Kernel:
    """Dimensions sorted by the strides of the access that matters most; the contiguous dimension comes last."""
    if len(kernel.outer) < 2 and len(kernel.row) < 2:
        return kernel
    accesses = _accesses(kernel, hints)
    reduces = bool(kernel.row)

    def ordered(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        votes = _votes(accesses, (r.symbol for r in ranges))
        if len(ranges) < 2 or not any(votes.values()):
            return ranges
        best = max(votes, key=lambda s: votes[s])
        # what is stored decides in a pointwise kernel, what is read in a reduction
        agreeing = [a for a in accesses if a.contiguous is best]
        leading = max(agreeing, key=lambda a: (a.nbytes, a.store != reduces))
        strides = {r.symbol: abs(leading.strides[r.symbol]) or math.inf for r in ranges}
        return tuple(sorted(ranges, key=lambda r: -strides[r.symbol]))

    return Kernel(ordered(kernel.outer), ordered(kernel.row), kernel.nodes, kernel.stores)


def _merge_pair(expr: sympy.Expr, a: sympy.Symbol, b: sympy.Symbol, size: Size) -> sympy.Expr | None:
    """``expr`` with ``a*size + b`` written as ``b`` (which then runs over both), or None if it is not of that form."""
    free = free_symbols(expr)
    if a not in free and b not in free:
        return expr
    form = affine(expr)
    if form is not None and isinstance(size, int):
        factors = dict(form[1])
        if factors.get(a, 0) != factors.get(b, 0) * size:
            return None
        return sympy.Add(form[0], *(s * c for s, c in form[1] if s != a))
    if isinstance(expr, (FloorDiv, Mod)):
        args = [_merge_pair(x, a, b, size) for x in expr.args]
        return None if None in args else expr.func(*args)
    terms = sympy.Add.make_args(expand(expr))
    outer, inner, rest = _ZERO, _ZERO, _ZERO
    for term in terms:
        free = term.free_symbols
        if a not in free and b not in free:
            rest += term
            continue
        factors = sympy.Mul.make_args(term)
        holding = [f for f in factors if a in f.free_symbols or b in f.free_symbols]
        if len(holding) != 1:
            return None
        other = sympy.Mul(*(f for f in factors if f is not holding[0]))
        if holding[0] == a:
            outer += other
        elif holding[0] == b:
            inner += other
        elif isinstance(holding[0], (FloorDiv, Mod)):
            new = _merge_pair(holding[0], a, b, size)
            if new is None:
                return None
            rest += other * new
        else:
            return None
    if expand(outer - inner * size) != 0:
        return None
    return rest + inner * b


def _merged(kernel: Kernel) -> Kernel:
    """Neighbouring ranges joined for as long as every index expression allows it."""
    groups = [list(kernel.outer), list(kernel.row)]
    exprs = expressions(kernel)
    for group in groups:
        k = len(group) - 2
        while k >= 0:
            a, b = group[k], group[k + 1]
            new = [_merge_pair(e, a.symbol, b.symbol, b.size) for e in exprs]
            if any(e is None for e in new):
                k -= 1
                continue
            exprs = [e for e in new if e is not None]
            group[k : k + 2] = [Range(b.symbol, Axis("", (a, b)).numel)]
            k = min(k, len(group) - 2)
    outer, row = tuple(groups[0]), tuple(groups[1])
    ranges = ranges_of((*outer, *row))
    return with_indices(kernel, outer, row, [simplify(e, ranges) for e in exprs])


def _reduction_axes(kernel: Kernel, hints: Hints) -> Loops:
    votes = _votes(_accesses(kernel, hints), (r.symbol for r in (*kernel.outer, *kernel.row)))
    in_row = max((votes[r.symbol] for r in kernel.row), default=0)
    in_outer = max((votes[r.symbol] for r in kernel.outer), default=0)
    return Loops(kernel, (Axis("x", kernel.outer), Axis("r", kernel.row)), row_contiguous=in_row >= in_outer)


def _pointwise_axes(kernel: Kernel, hints: Hints) -> Loops:
    """One axis; two where reads and writes are contiguous along different dimensions (a transposition)."""
    if len(kernel.outer) < 2:
        return Loops(kernel, (Axis("x", kernel.outer),))
    sizes = {r.symbol: evaluate(r.size, hints) for r in kernel.outer}
    votes = _votes(_accesses(kernel, hints), sizes)
    last = kernel.outer[-1].symbol
    others = [s for s in sizes if s is not last and votes[s] >= _CONFLICT_PART * max(votes.values()) > 0]
    others = [s for s in others if votes[s] > 0 and sizes[s] >= _CONFLICT_SIZE]
    if not others or sizes[last] < _CONFLICT_SIZE:
        return Loops(kernel, (Axis("x", kernel.outer),))
    second = max(others, key=lambda s: votes[s])
    rest = tuple(r for r in kernel.outer if r.symbol not in (last, second))
    inner = next(r for r in kernel.outer if r.symbol is second)
    return Loops(kernel, (Axis("y", (*rest, inner)), Axis("x", kernel.outer[-1:])))


def extents(loops: Loops) -> tuple[Size, ...] | None:
    """One more than the greatest magnitude of every index and of every axis; None if one is not known.

    Values loaded from memory (``v<k>``) count as zero: they are 64 bits wide and widen what is computed from them.
    """
    ranges = ranges_of((*loops.kernel.outer, *loops.kernel.row))
    out: dict[Size, None] = {axis.numel: None for axis in loops.axes}
    for expr in expressions(loops.kernel):
        values = {s: _ZERO for s in expr.free_symbols if value_references(s)}
        if values:
            expr = expand(expr.xreplace(values))
        found = bounds(expr, ranges)
        if found is None:
            return None
        for bound in found:
            out[int(abs(bound)) + 1 if bound.is_Integer else bound + 1] = None
    return tuple(out)


def duplicates(store: Store, kernel: Kernel, level_is_point: bool) -> bool:
    """Whether several points may write the same element: a range that the store runs over is not in its index."""
    ranges = (*kernel.outer, *kernel.row) if level_is_point else kernel.outer
    return store.mode is not StoreMode.SET or any(
        r.symbol not in store.index.free_symbols for r in ranges if r.size != 1
    )
