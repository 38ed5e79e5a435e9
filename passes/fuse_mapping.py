"""How the ranges of one kernel follow from those of another: the iteration spaces that make two kernels one.

A mapping gives every range symbol of ``other`` as an expression over the ranges of ``base``. Candidates come from
accesses of both kernels to the same buffer (``other_index(y) = base_index(x)`` solved for ``y``), and from running
through both spaces in row-major order. Every candidate is a bijection of the whole spaces: the counts of points are
equal, every coordinate stays within its range, and ``other_index(y(x)) == base_index(x)`` holds as an identity while
``base_index`` is injective, so that ``y`` is too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import sympy
import torch

from memplan.ir.index import (
    Ranges,
    affine,
    bounds,
    delinearize,
    expand,
    flat_index,
    is_nonnegative,
    ranges_of,
    simplify,
)
from memplan.ir.index_inversion import invert
from memplan.ir.loops import Kernel, Size, StoreMode, value_references

Map = dict[sympy.Symbol, sympy.Expr]
Access = tuple[str, sympy.Expr, torch.dtype, bool]
_TARGET = sympy.Symbol("fusion_target", integer=True, nonnegative=True)
_ZERO = sympy.Integer(0)
#: candidates that are worth a look; more never helped on the models measured
_MOST_LINKS = 6


@lru_cache(maxsize=1 << 14)
def count(ranges: Ranges) -> sympy.Expr:
    """Number of points."""
    out = sympy.Integer(1)
    for _, size in ranges:
        out = out * size
    return expand(out)


@lru_cache(maxsize=1 << 16)
def is_injective(index: sympy.Expr, ranges: Ranges) -> bool:
    """Whether distinct points surely have distinct indices (nested strides)."""
    return invert(index, ranges, _TARGET, ()) is not None


@lru_cache(maxsize=1 << 16)
def solve(
    other: sympy.Expr, space: Ranges, base: sympy.Expr, ranges: Ranges
) -> tuple[tuple[sympy.Symbol, sympy.Expr], ...] | None:
    """The point of ``space`` where ``other`` equals ``base``, exact and within bounds, else None."""
    found = invert(other, space, base, ranges)
    if found is None:
        return None
    for symbol, size in space:
        if not within(found[symbol], size, ranges):
            return None
    if not same_index(simplify(other.xreplace(found), ranges), base, ranges):
        return None
    return tuple(found.items())


def within(expr: sympy.Expr, size: Size, ranges: Ranges) -> bool:
    """Whether ``0 <= expr < size`` is proved."""
    if expr.is_Integer and expr == 0:
        return True
    limits = bounds(expr, ranges)
    if limits is not None and isinstance(size, int) and limits[0].is_Integer and limits[1].is_Integer:
        return int(limits[0]) >= 0 and int(limits[1]) < size
    return (
        limits is not None and is_nonnegative(limits[0]) and is_nonnegative(expand(sympy.sympify(size) - 1 - limits[1]))
    )


def same_index(a: sympy.Expr, b: sympy.Expr, ranges: Ranges) -> bool:
    """Whether two index expressions are proved equal over the ranges."""
    return bool(a == b) or _same(a, b, ranges)


@lru_cache(maxsize=1 << 16)
def _same(a: sympy.Expr, b: sympy.Expr, ranges: Ranges) -> bool:
    first, second = affine(a), affine(b)
    if first is not None and second is not None:
        ones = {s for s, n in ranges if n == 1}
        kept = [(f[0], {t for t in f[1] if t[0] not in ones}) for f in (first, second)]
        return kept[0] == kept[1]
    return bool(simplify(a - b, ranges) == 0)


@lru_cache(maxsize=1 << 14)
def linear(space: Ranges, base: Ranges) -> tuple[tuple[sympy.Symbol, sympy.Expr], ...]:
    """``space`` and ``base`` (of equal counts) in row-major order together."""
    if tuple(n for _, n in space if n != 1) == tuple(n for _, n in base if n != 1):
        symbols = iter([s for s, n in base if n != 1])
        return tuple((s, _ZERO if n == 1 else next(symbols)) for s, n in space)
    strides: list[Size] = []
    step: Size = 1
    for _, size in reversed(base):
        strides.append(step)
        step = step * size
    flat = flat_index([s for s, _ in base], list(reversed(strides)))
    values = delinearize(flat, tuple(n for _, n in space), base)
    return tuple((s, simplify(v, base)) for (s, _), v in zip(space, values, strict=True))


def accesses(kernel: Kernel) -> tuple[Access, ...]:
    """Direct accesses: buffer, index, dtype, whether it is a plain store; each once, stores first."""
    found: dict[Access, None] = {}
    for s in kernel.stores:
        if not value_references(s.index):
            found[(s.buffer, s.index, s.dtype, s.mode is StoreMode.SET)] = None
    for n in kernel.loads:
        if not value_references(n.index):
            found[(n.buffer, n.index, n.dtype, False)] = None
    return tuple(found)


def links(base: Kernel, other: Kernel) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Pairs (index in ``base``, index in ``other``) at which both touch the same buffer; flows of data first."""
    by_buffer: dict[str, list[Access]] = {}
    for a in accesses(base):
        by_buffer.setdefault(a[0], []).append(a)
    flows: dict[tuple[sympy.Expr, sympy.Expr], None] = {}
    shared: dict[tuple[sympy.Expr, sympy.Expr], None] = {}
    for b in accesses(other):
        for a in by_buffer.get(b[0], ()):
            if a[2] == b[2]:
                (flows if a[3] != b[3] else shared)[(a[1], b[1])] = None
    return list({**flows, **shared})


def mappings(base: Kernel, other: Kernel) -> Iterator[Map]:
    """Candidate mappings of ``other``'s ranges over ``base``'s; each keeps rows to rows where ``other`` has rows."""
    if other.row and not base.row:
        return
    seen: set[tuple[tuple[sympy.Symbol, sympy.Expr], ...]] = set()
    found = _row_mappings(base, other) if other.row else _point_mappings(base, other)
    for candidate in found:
        key = tuple(sorted(candidate.items(), key=lambda item: item[0].name))
        if key not in seen:
            seen.add(key)
            yield candidate


def _point_mappings(base: Kernel, other: Kernel) -> Iterator[Map]:
    """``other`` has no row: over all of ``base``'s points, or over its outer points alone."""
    space, outer, row = ranges_of(other.outer), ranges_of(base.outer), ranges_of(base.row)
    points, whole = count(space), (*outer, *row)
    pairs = links(base, other)[:_MOST_LINKS]
    if points == count(whole):
        yield from _solutions(pairs, space, whole)
        yield from _partial(pairs, space, outer, row)
        yield dict(linear(space, whole))
    if row and points == count(outer):
        row_symbols = {s for s, _ in row}
        outer_pairs = [p for p in pairs if not p[0].free_symbols & row_symbols]
        yield from _solutions(outer_pairs, space, outer)
        yield dict(linear(space, outer))


def _solutions(pairs: list[tuple[sympy.Expr, sympy.Expr]], space: Ranges, base: Ranges) -> Iterator[Map]:
    for base_index, other_index in pairs:
        if is_injective(base_index, base):
            solved = solve(other_index, space, base_index, base)
            if solved is not None:
                yield dict(solved)


def _partial(pairs: list[tuple[sympy.Expr, sympy.Expr]], space: Ranges, outer: Ranges, row: Ranges) -> Iterator[Map]:
    """A value per row, used along the row: the symbols that the access lacks run through the row."""
    if not row:
        return
    row_symbols = {s for s, _ in row}
    for base_index, other_index in pairs:
        if base_index.free_symbols & row_symbols:
            continue
        used = tuple(r for r in space if r[0] in other_index.free_symbols)
        rest = tuple(r for r in space if r not in used)
        if count(used) != count(outer) or count(rest) != count(row) or not is_injective(base_index, outer):
            continue
        solved = solve(other_index, used, base_index, outer)
        if solved is not None:
            yield {**dict(solved), **dict(linear(rest, row))}


def _row_mappings(base: Kernel, other: Kernel) -> Iterator[Map]:
    """Both reduce: outer to outer, row to row."""
    outer, row = ranges_of(base.outer), ranges_of(base.row)
    other_outer, other_row = ranges_of(other.outer), ranges_of(other.row)
    if count(outer) != count(other_outer) or count(row) != count(other_row):
        return
    outer_symbols, row_symbols = {s for s, _ in outer}, {s for s, _ in row}
    pairs = links(base, other)[:_MOST_LINKS]
    for found in _solutions(pairs, (*other_outer, *other_row), (*outer, *row)):
        rows = all(not found[s].free_symbols & outer_symbols for s, _ in other_row)
        outers = all(not found[s].free_symbols & row_symbols for s, _ in other_outer)
        if rows and outers:
            yield found
    rest = dict(linear(other_row, row))
    own_rows = {s for s, _ in other_row}
    outer_pairs = [p for p in pairs if not p[0].free_symbols & row_symbols and not p[1].free_symbols & own_rows]
    for found in _solutions(outer_pairs, other_outer, outer):
        yield {**found, **rest}
    yield {**dict(linear(other_outer, outer)), **rest}
