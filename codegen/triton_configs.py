"""Launch configurations: block sizes, warps and stages by rule, best guess first.

The rules aim at memory-bound kernels on a large GPU (132 multiprocessors): 16 bytes a thread and access, enough
program instances for every multiprocessor to hold several, few enough values a thread not to spill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from memplan.ir.loops import Level
from memplan.ir.program import evaluate
from memplan.ir.totals import rows_together

from .row_schedule import Schedule, kept_values
from .triton_loops import Loops

_MULTIPROCESSORS = 132
#: elements that a block may keep over several sections
_PERSISTENT_ELEMENTS = 16384
_PERSISTENT_STRIDED = 1024
#: elements from which on wide blocks of columns pay where they are stored too
_WIDE_STORES = 25_000_000


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Block sizes by the names of the constexpr parameters, in their order; warps of 32 threads; pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1

    def block(self, name: str) -> int:
        return dict(self.blocks)[name]


@dataclass(frozen=True, slots=True)
class Shape:
    """Elements along every axis at the hinted sizes, and whether the row's size is known exactly."""

    sizes: Mapping[str, int]
    row_known: bool

    @staticmethod
    def of(loops: Loops, hints: Mapping[sympy.Symbol, int]) -> Shape:
        sizes = {a.name: evaluate(a.numel, hints) for a in loops.axes}
        row = loops.axes[-1].numel
        return Shape(sizes, isinstance(row, int) or bool(row.is_Integer))


def next_power(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _power_below(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


def choose(shape: Shape, plan: Schedule, loops: Loops) -> tuple[tuple[LaunchConfig, ...], bool]:
    """Candidate configurations, and whether the row is held in one block (persistent)."""
    if not loops.reduces:
        if "y" in shape.sizes:
            return _tiles(shape.sizes["y"], shape.sizes["x"]), False
        return _pointwise(shape.sizes["x"], loops), False
    x, r = shape.sizes["x"], shape.sizes["r"]
    if rows := rows_together(loops.kernel):
        return _summed_rows(rows, next_power(r)), True
    kept = max(kept_values(loops.kernel, plan), 1)
    if loops.row_contiguous:
        if shape.row_known and next_power(r) * min(kept, 4) <= _PERSISTENT_ELEMENTS:
            return _persistent_rows(x, next_power(r), kept), True
        return _looped_rows(x, r), False
    if shape.row_known and len(plan.sections) > 1 and next_power(r) * kept <= _PERSISTENT_STRIDED:
        return _persistent_columns(x, next_power(r)), True
    if any(loops.kernel.store_level(s) is Level.POINT for s in loops.kernel.stores):
        return _stored_columns(x, r, _beside(loops)), False
    return _looped_columns(x, r), False


def _beside(loops: Loops) -> int:
    """Results of a reduction over columns that lie beside each other, as far as is known."""
    size = loops.kernel.outer[-1].size if loops.kernel.outer else 1
    return int(size) if isinstance(size, int) or size.is_Integer else 1


def _unique(found: list[LaunchConfig]) -> tuple[LaunchConfig, ...]:
    return tuple(dict.fromkeys(found))


def _pointwise(n: int, loops: Loops) -> tuple[LaunchConfig, ...]:
    buffers = len(set(loops.kernel.read_buffers) | set(loops.kernel.written_buffers))
    smallest = min(
        [*(n.dtype.itemsize for n in loops.kernel.loads), *(s.dtype.itemsize for s in loops.kernel.stores)],
        default=4,
    )
    lanes = max(2, min(8, 16 // max(smallest, 2)))  # elements a thread moves in 16 bytes

    def config(block: int, warps: int) -> LaunchConfig:
        block = min(block, max(32, next_power(n)))
        while block > 128 and n < block * _MULTIPROCESSORS * 2:
            block //= 2
        return LaunchConfig((("XBLOCK", block),), max(1, min(warps, block // (32 * min(lanes, 4)))))

    # 16 elements a thread: two loads of 16 bytes of a half type in flight. Of 30 kernels of seven models, tried on an
    # H200 with up to 16 blocks and warps, those of bandwidth alone are 1.00 to 1.09 times as fast as with 8
    base, warps = (512, 4) if buffers > 8 else (1024, 2)
    return _unique(
        [config(base, warps), config(base * 2, 8), config(base, 4), config(base // 2, 4), config(base // 2, 2)]
    )


def _tiles(y: int, x: int) -> tuple[LaunchConfig, ...]:
    def config(rows: int, columns: int, warps: int) -> LaunchConfig:
        rows, columns = min(rows, next_power(y)), min(columns, next_power(x))
        while rows * columns > 512 and -(-y // rows) * -(-x // columns) < 2 * _MULTIPROCESSORS:
            rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
        warps = max(1, min(warps, rows * columns // 128))
        return LaunchConfig((("YBLOCK", rows), ("XBLOCK", columns)), warps)

    return _unique([config(64, 64, 8), config(32, 64, 4), config(64, 32, 4), config(32, 32, 4), config(128, 32, 8)])


def _persistent_rows(x: int, r: int, kept: int) -> tuple[LaunchConfig, ...]:
    def config(rows: int, per_thread: int) -> LaunchConfig:
        rows = max(1, min(rows, next_power(x)))
        while rows > 1 and x < rows * _MULTIPROCESSORS * 4:
            rows //= 2
        warps = max(1, min(16 if kept < 4 else 32, rows * r // (32 * per_thread)))
        return LaunchConfig((("XBLOCK", rows), ("RBLOCK", r)), _power_below(warps))

    # one row an instance from 1024 elements on: vectors along the row need no exchange between layouts then
    rows = max(1, 1024 // r)
    return _unique([config(rows, 8), config(rows, 16), config(rows * 2, 8), config(rows, 4), config(rows * 4, 16)])


def _summed_rows(together: int, r: int) -> tuple[LaunchConfig, ...]:
    """For kernels that go over ``together`` rows an instance and sum their columns (`memplan.passes.row_totals`)."""

    def config(rows: int, per_thread: int) -> LaunchConfig:
        rows = max(1, min(rows, _power_below(together)))
        warps = max(1, min(16, rows * r // (32 * per_thread)))
        return LaunchConfig((("XBLOCK", rows), ("RBLOCK", r), ("XGROUP", together)), _power_below(warps))

    rows = max(1, 1024 // r)
    return _unique([config(rows, 4), config(rows, 8), config(rows * 2, 8), config(rows, 16)])


def _looped_rows(x: int, r: int) -> tuple[LaunchConfig, ...]:
    def config(rows: int, block: int, warps: int) -> LaunchConfig:
        block = min(block, max(32, next_power(r)))
        rows = max(1, min(rows, next_power(x)))
        warps = max(1, min(warps, rows * block // 128))
        return LaunchConfig((("XBLOCK", rows), ("RBLOCK", block)), warps)

    if r <= 1024:
        return _unique([config(max(1, 2048 // next_power(r)), 1024, 4), config(1, 1024, 4)])
    found = [config(1, 4096, 16), config(1, 2048, 8), config(1, 2048, 16), config(1, 8192, 16)]
    two = config(2, 1024, 8)
    # measured on an H200 for 8192 rows of 50257 and 768 of 67000: 1.17 and 1.21 times the bandwidth
    long_and_many = r >= 2 * _PERSISTENT_ELEMENTS and x >= 4 * _MULTIPROCESSORS
    return _unique([two, *found] if long_and_many else [*found, two])


def _persistent_columns(x: int, r: int) -> tuple[LaunchConfig, ...]:
    def config(columns: int) -> LaunchConfig:
        columns = max(1, min(columns, next_power(x)))
        while columns > 8 and (columns * r > 8192 or x < columns * _MULTIPROCESSORS):
            columns //= 2
        return LaunchConfig((("XBLOCK", columns), ("RBLOCK", r)), max(1, min(16, _power_below(columns * r // 256))))

    return _unique([config(32), config(64), config(16)])


def _stored_columns(x: int, r: int, columns: int) -> tuple[LaunchConfig, ...]:
    """For kernels that store along the columns that they reduce (`memplan.passes.store_and_reduce`).

    ``columns``: how many lie beside each other.
    """

    def config(wide: int, block: int, warps: int) -> LaunchConfig:
        wide, block = min(wide, next_power(x)), min(block, next_power(r))
        return LaunchConfig((("XBLOCK", wide), ("RBLOCK", block)), max(1, min(warps, wide * block // 64)))

    # of 17 blocks and warps, tried on an H200 on 40 kernels of four models, these take 1.06 times the best of each
    found = [config(64, 16, 4), config(32, 16, 2), config(128, 16, 8), config(64, 64, 16)]
    if columns % 128 == 0 and x * r >= _WIDE_STORES:
        found.insert(0, found[2])
    elif columns % 64:
        found.insert(0, found[1])
    return _unique(found)


def _looped_columns(x: int, r: int) -> tuple[LaunchConfig, ...]:
    def config(columns: int, block: int, warps: int) -> LaunchConfig:
        columns = max(1, min(columns, next_power(x)))
        while columns > 16 and x < columns * _MULTIPROCESSORS:
            columns, block = columns // 2, block * 2
        block = max(1, min(block, next_power(r)))
        return LaunchConfig((("XBLOCK", columns), ("RBLOCK", block)), max(1, min(warps, columns * block // 64)))

    # two loads of 16 bytes in flight a thread. Of 31 blocks and warps with 4 to 32 instances a multiprocessor, tried on
    # an H100 on seven sums over 8192 to 16384 rows, the first is within 3 % of the best of each in the geometric mean
    # with 8 instances; the last is within 8 % so, and within 18 % with 4
    return _unique([config(64, 32, 4), config(32, 64, 4), config(64, 64, 8), config(128, 16, 4), config(64, 32, 8)])


def divisible(numel: int | sympy.Expr, block: str, configs: tuple[LaunchConfig, ...]) -> bool:
    """Whether every candidate's block divides the axis, so that no mask is needed."""
    if not isinstance(numel, int) and not numel.is_Integer:
        return False
    return all(int(numel) % c.block(block) == 0 for c in configs)
