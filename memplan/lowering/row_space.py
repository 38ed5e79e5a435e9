"""The loops of a reduction: kept dimensions outside, reduced ones along the row; split in two where that is too few.

On a GPU a reduction with few outer points leaves most of the device idle. Then the row is cut into chunks: a first
kernel has the chunk as one more outer dimension and writes partial results, a second one reduces these. The cut is
decided by sizes alone, so the result is the same in every run.

The pass `split_reductions` does the same after fusion, which finds more to fuse in whole reductions. So a reduction is
split here only where that pass cannot: sizes known at run time, moments of rows that divide into no equal parts,
arguments of extrema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from ..ir.index import FloorDiv
from ..ir.loops import IndexExpr, Size
from ..ir.program import View
from .builder import ZERO, Coordinates, KernelBuilder, Value
from .call_site import CallSite, Operations

PROGRAMS = 132 * 8  #: programs that keep a large GPU busy
COLUMNS = 64  #: columns that one program reduces where the row is not contiguous
ELEMENTS = 4096  #: elements that a program should read at least


@dataclass(frozen=True, slots=True)
class Split:
    """Dimension ``dim`` of the source is cut into ``chunks`` pieces of ``length``; ``exact`` if it divides."""

    dim: int
    chunks: int
    length: Size
    exact: bool


@dataclass(frozen=True, slots=True)
class RowSpace:
    """A builder over a reduction's loops.

    ``point`` are the source's coordinates of the current point, ``kept`` those of the outer dimensions in the order
    of the source (the chunk first, where the row is split); ``inside`` is false beyond the end of an inexact split.
    """

    builder: KernelBuilder
    point: Coordinates
    kept: Coordinates
    inside: Value | None

    def load(self, view: View) -> Value:
        """The source's element in the type that is computed in."""
        return self.builder.compute(self.builder.load(view, self.point, self.inside))

    def result_coordinates(self, result: View, rank: int, reduced: frozenset[int]) -> Coordinates:
        """Where the row's result goes; reduced dimensions may have been kept with size 1."""
        if len(result.sizes) == len(self.kept):
            return self.kept
        kept = iter(self.kept)
        return tuple(ZERO if d in reduced else next(kept) for d in range(rank))


def row_space(sizes: Sequence[Size], reduced: frozenset[int], split: Split | None = None) -> RowSpace:
    """Loops over ``sizes`` with the dimensions ``reduced`` along the row."""
    kept = [d for d in range(len(sizes)) if d not in reduced]
    row = [d for d in range(len(sizes)) if d in reduced]
    outer_sizes: list[Size] = [sizes[d] for d in kept]
    row_sizes = [split.length if split is not None and d == split.dim else sizes[d] for d in row]
    if split is not None:
        outer_sizes.insert(0, split.chunks)
    builder = KernelBuilder(outer_sizes, row_sizes)
    outer = builder.outer_coordinates
    own = outer if split is None else outer[1:]
    where: dict[int, IndexExpr] = dict(zip(kept, own, strict=True)) | dict(
        zip(row, builder.row_coordinates, strict=True)
    )
    inside = None
    if split is not None:
        where[split.dim] = outer[0] * split.length + where[split.dim]
        if not split.exact:
            inside = builder.index(where[split.dim]) < builder.index(sizes[split.dim])
    return RowSpace(builder, tuple(where[d] for d in range(len(sizes))), outer, inside)


def choose_split(
    site: CallSite, source: View, reduced: frozenset[int], *, exact_only: bool = False, after_fusion: bool = True
) -> Split | None:
    """How to cut the row of a reduction of ``source``, or None where it is busy enough as it is.

    ``after_fusion``: the pass after fusion knows this reduction, and cuts it where the sizes allow that.
    """
    if not site.device.startswith("cuda") or not reduced:
        return None
    context = site.context
    sizes = [context.hint(s) for s in source.sizes]
    outer = row = 1
    for d, size in enumerate(sizes):
        if d in reduced:
            row *= size
        else:
            outer *= size
    if outer == 0 or row < 2 * ELEMENTS // COLUMNS:
        return None
    wide = [d for d, size in enumerate(sizes) if size > 1]
    inner = min(wide, key=lambda d: (context.hint(source.strides[d]), -d), default=0)
    along_row = inner in reduced or outer == 1
    programs = outer if along_row else -(-outer // COLUMNS)
    per_program = row if along_row else row * min(outer, COLUMNS)
    chunks = min(-(-PROGRAMS // programs), per_program // ELEMENTS)
    if chunks < 4:
        return None
    static = all(isinstance(s, int) for s in source.sizes)
    equal = any(row % c == 0 for c in range(max(chunks // 2, 2), 2 * chunks + 1))
    if after_fusion and static and (equal or not exact_only):
        return None
    return _cut(source, sizes, sorted(reduced), chunks, exact_only)


def _cut(source: View, sizes: list[int], reduced: list[int], chunks: int, exact_only: bool) -> Split | None:
    """The cut nearest to ``chunks`` pieces along the reduced dimension with the largest stride that allows it."""
    order = sorted(reduced, key=lambda d: -int(source.strides[d]) if isinstance(source.strides[d], int) else d)
    for d in order:
        size = source.sizes[d]
        if not isinstance(size, int) or size < chunks // 2:
            continue
        near = [c for c in range(max(chunks // 2, 2), min(2 * chunks, size) + 1) if size % c == 0]
        if near:
            best = min(near, key=lambda c: abs(c - chunks))
            return Split(d, best, size // best, True)
    if exact_only:
        return None
    d = max(order, key=lambda d: sizes[d])
    chunks = min(chunks, max(sizes[d] // 2, 1))
    if chunks < 2:
        return None
    length = FloorDiv(sympy.sympify(source.sizes[d]) + chunks - 1, chunks)
    whole = int(length) if length.is_Integer else length
    return Split(d, chunks, whole, False)


def reduce_in_two(
    site: CallSite,
    source: View,
    reduced: frozenset[int],
    split: Split,
    first: Callable[[RowSpace], tuple[Value, ...]],
    second: Callable[[KernelBuilder, tuple[Value, ...]], Sequence[tuple[View, Value]]],
) -> Operations:
    """Partial results by ``first`` for every chunk, then ``second`` over the chunks.

    ``second`` is given the partial values along its row and says what is stored where.
    """
    space = row_space(source.sizes, reduced, split)
    partial = first(space)
    kept: list[Size] = [s for d, s in enumerate(source.sizes) if d not in reduced]
    views = [site.temporary(f"partial{k}", [split.chunks, *kept], p.dtype) for k, p in enumerate(partial)]
    for view, value in zip(views, partial, strict=True):
        space.builder.store(view, space.kept, value)
    builder = KernelBuilder(kept, [split.chunks])
    point = (*builder.row_coordinates, *builder.outer_coordinates)
    loaded = tuple(builder.load(view, point) for view in views)
    whole = RowSpace(builder, point, builder.outer_coordinates, None)
    for result, value in second(builder, loaded):
        builder.store(result, whole.result_coordinates(result, len(source.sizes), reduced), value)
    return site.kernel(space.builder, "partial"), site.kernel(builder)
