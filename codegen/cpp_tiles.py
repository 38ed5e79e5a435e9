"""Transposed loads of pointwise kernels: blocks are transposed in registers into small tiles, then read along rows.

A load that is contiguous along a range other than the vectorised one would touch a new cache line for every element.
Both ranges are cut into blocks; such a load fills a tile first, one cache line per row, and the loops read the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from memplan.ir.loops import Kernel, Load, Range, value_references

from .cpp_loops import Hints, dependencies, hinted, stride
from .cpp_values import storage_type
from .printers import cexpr

if TYPE_CHECKING:
    from .cpp_nest import Printer

_LINE = 64
#: points of the vectorised range in a tile
COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Tiles:
    """Blocks of ``rows`` points of the last but one outer range by `COLUMNS` of the last, for these ``loads``."""

    rows: int
    loads: tuple[int, ...]


def find_tiles(kernel: Kernel, hints: Hints) -> tuple[Kernel, Tiles] | None:
    """The kernel with its transposed range last but one, or None where no load asks for it."""
    if len(kernel.outer) < 2 or hinted(kernel.outer[-1].size, hints) < 8:
        return None
    depends = dependencies(kernel)
    found: dict[Range, list[int]] = {}
    for k, node in enumerate(kernel.nodes):
        if isinstance(node, Load):
            across = _transposed(kernel, node, depends, hints)
            if across is not None:
                found.setdefault(across, []).append(k)
    if not found:
        return None
    across, loads = max(found.items(), key=lambda pair: len(pair[1]))
    others = tuple(r for r in kernel.outer[:-1] if r != across)
    widest = max(node.dtype.itemsize for k in loads if isinstance(node := kernel.nodes[k], Load))
    moved = Kernel((*others, across, kernel.outer[-1]), (), kernel.nodes, kernel.stores)
    return moved, Tiles(_LINE // widest, tuple(loads))


def _transposed(kernel: Kernel, node: Load, depends: tuple[frozenset[sympy.Symbol], ...], hints: Hints) -> Range | None:
    """The range along which this load is contiguous, if that is not the vectorised one."""
    inner = kernel.outer[-1].symbol
    step = stride(node.index, inner)
    if node.mask is not None or step is None or step in (0, 1):
        return None
    for r in kernel.outer[:-1]:
        free = not any({inner, r.symbol} & depends[k] for k in value_references(node.index))
        if free and stride(node.index, r.symbol) == 1 and hinted(r.size, hints) >= 8:
            return r
    return None


def print_tiled(p: Printer) -> None:
    """The whole nest of a pointwise kernel with tiles."""
    tiles = p.schedule.tiles
    assert tiles is not None
    *others, across, inner = p.kernel.outer
    order = [r.symbol for r in p.kernel.outer]
    needed = p.needed(p.roots())
    row, column = across.symbol.name, inner.symbol.name
    collapse = p.schedule.collapse
    with (
        p.nest(others, needed, order, collapse, collapse),
        p.loop(f"{row}_", "0", cexpr(across.size), str(tiles.rows)),
        p.loop(f"{column}_", "0", cexpr(inner.size), str(COLUMNS)),
    ):
        if collapse > len(others):
            p.hoisted(needed, order, len(others))
        for name, size, step in ((row, across.size, tiles.rows), (column, inner.size, COLUMNS)):
            rest = f"{cexpr(size)} - {name}_"
            p.line(f"const int64_t {name}_count = {rest} < {step} ? {rest} : {step};")
        _fill(p, tiles, across, inner)
        with p.loop(row, f"{row}_", f"{row}_ + {row}_count"):
            for k in needed:
                if p.level(k, order) == len(order) - 1:
                    p.define(k)
            p.innermost(column, f"{column}_", f"{column}_ + {column}_count", needed, order)


def _fill(p: Printer, tiles: Tiles, across: Range, inner: Range) -> None:
    row, column = across.symbol, inner.symbol
    start = {s: sympy.Symbol(f"{s.name}_", integer=True, nonnegative=True) for s in (row, column)}
    for k in tiles.loads:
        node = p.kernel.nodes[k]
        assert isinstance(node, Load)
        step = stride(node.index, column)
        assert step is not None
        first = p.texts.element(node.buffer, node.index.xreplace(start), node.dtype)
        p.line(f"alignas(64) {storage_type(node.dtype)} tile{k}[{tiles.rows * COLUMNS}];")
        p.line(f"mp::load_tile<{COLUMNS}>(&{first}, {cexpr(step)}, {row}_count, {column}_count, tile{k});")
        at = f"tile{k}[({row} - {row}_) * {COLUMNS} + {column} - {column}_]"
        p.stored[k] = p.texts.loaded(at, node.dtype)
