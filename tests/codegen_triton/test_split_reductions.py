"""Split reductions mean what the whole ones mean, and build."""

from __future__ import annotations

from dataclasses import replace

import operation_kernels as o
import pytest
import sample_kernels as s
import torch
from reference_kernel import run_reference
from sample_kernels import BF16, F32

from memplan.ir.loops import Kernel, Level, Load, outer_symbol, row_symbol
from memplan.ir.program import BufferKind, KernelOp
from memplan.passes.split_reductions import split


def operation(kernel: Kernel) -> KernelOp:
    return KernelOp(
        "op", kernel, "cuda:0", mutates=tuple(b for b in kernel.written_buffers if b in kernel.read_buffers)
    )


def masked_sum(rows: int, columns: int) -> Kernel:
    """Sums over columns of every third element, with something else in the place of the others."""
    k = s.Builder((columns,), (rows,))
    third = k.call("eq", k.call("mod", k.index(s.R[0]), k.index(3)), k.index(0), dtype=torch.bool)
    value = k.load("a", s.R[0] * columns + s.X[0], F32, third, 0.5)
    k.store("out", s.X[0], k.reduce("sum", value), F32)
    return k.done()


CASES = {
    "bias gradient": (s.column_sum(4096, 24, F32), {"a": torch.randn(4096 * 24), "out": torch.zeros(24)}),
    "batch norm": (
        s.batch_norm_statistics(16, 3, 3136),
        {"a": torch.randn(16 * 3 * 3136), **{n: torch.randn(3) for n in ("mean", "variance", "running")}},
    ),
    "total": (s.total_sum(300, 400), {"a": torch.randn(120_000), "out": torch.zeros(1)}),
    **{
        f"{op} {dtype}": o.reduction(op, dtype, 6, 20_000)[1:]
        for op, dtype in (
            ("max", F32),
            ("any", torch.bool),
            ("welford_combine", F32),
            ("sum", BF16),
            ("min", torch.int32),
        )
    },
    # no equal parts: the last one is shorter
    "a prime number of rows": (s.column_sum(4099, 24, F32), {"a": torch.randn(4099 * 24), "out": torch.zeros(24)}),
    "masked rows, a prime number": (masked_sum(4099, 24), {"a": torch.randn(4099 * 24), "out": torch.zeros(24)}),
    **{
        f"{op} {dtype}, a prime length": o.reduction(op, dtype, 6, 20_011)[1:]
        for op, dtypes in o.REDUCTIONS
        for dtype in dtypes
        if op in ("sum", "prod", "max", "min", "any", "all")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_same_meaning(name: str, check) -> None:
    kernel, buffers = CASES[name]
    found = split(operation(kernel), {}, least_elements=0)
    assert found is not None
    first, second, made = found
    assert all(b.kind is BufferKind.TEMPORARY for b in made)
    assert second.mutates == operation(kernel).mutates
    expected = {b: t.clone() for b, t in buffers.items()}
    run_reference(kernel, expected)
    got = {b: t.clone() for b, t in buffers.items()}
    got |= {b.name: torch.full((b.nbytes // b.dtype.itemsize,), 77).to(b.dtype) for b in made}
    run_reference(first.kernel, got)
    run_reference(second.kernel, got)
    for b in buffers:
        torch.testing.assert_close(got[b], expected[b], rtol=1e-4, atol=1e-4, equal_nan=True)
    for op in (first, second):
        assert check.builds(op.kernel).spilled_bytes == 0


@pytest.mark.parametrize(
    ("kernel", "parts"),
    [
        (s.total_sum(1, 1 << 16), None),
        (s.total_sum(1, 1 << 17), 64),  # 7 us of one instance
        (s.total_sum(1000, 1000), 250),
        (s.column_sum(1 << 13, 32), 128),  # the columns of one instance
        (s.column_sum(1 << 10, 768), None),  # of 12 instances, none reads much
        (s.column_sum(1 << 14, 768), 64),
        (s.column_sum(6304, 768), 88),  # 32 pictures of 197 pieces, which have no divisor near: parts of 72 rows
        (s.column_sum(12608, 1024), 64),
    ],
)
def test_one_instance_alone_is_not_left_to_read_a_long_row(kernel: Kernel, parts: int | None) -> None:
    found = split(operation(kernel), {})
    assert (None if found is None else found[0].kernel.outer[0].size) == parts


@pytest.mark.parametrize(
    "kernel",
    [
        s.column_sum(4096, 1 << 16),  # columns enough
        s.column_sum(64, 64),  # too short
        s.softmax(4, 100_000),  # stores along the row
        s.argmax(4, 100_000),
        s.cross_entropy(4, 100_000),  # a reduction of a reduction
        s.add_relu(64),
    ],
)
def test_left_alone(kernel: Kernel) -> None:
    assert split(operation(kernel), {}, least_elements=0) is None


@pytest.mark.parametrize(("outer", "row"), [(1, 0), (0, 1), (7, 3)])
def test_ranges_that_fusion_left_numbered_with_gaps(outer: int, row: int) -> None:
    columns, rows = s.X[0], s.R[0]
    k = s.column_sum(4096, 24, F32)
    moved = {columns: outer_symbol(outer), rows: row_symbol(row)}
    kernel = Kernel(
        tuple(replace(r, symbol=moved[r.symbol]) for r in k.outer),
        tuple(replace(r, symbol=moved[r.symbol]) for r in k.row),
        tuple(replace(n, index=n.index.xreplace(moved)) if isinstance(n, Load) else n for n in k.nodes),
        tuple(replace(store, index=store.index.xreplace(moved)) for store in k.stores),
    )
    found = split(operation(kernel), {}, least_elements=0)
    assert found is not None
    got = {"a": torch.randn(4096 * 24), "out": torch.zeros(24)}
    got |= {b.name: torch.full((b.nbytes // b.dtype.itemsize,), 77.0) for b in found[2]}
    for op in found[:2]:
        symbols = [r.symbol for r in (*op.kernel.outer, *op.kernel.row)]
        assert len(set(symbols)) == len(symbols)
        run_reference(op.kernel, got)
    torch.testing.assert_close(got["out"], got["a"].view(4096, 24).sum(0), rtol=1e-4, atol=1e-4)


def test_what_is_the_same_for_a_row_stays_so_where_the_last_part_is_shorter() -> None:
    k = s.Builder((24,), (4099,))
    value = k.call("sub", k.load("a", s.R[0] * 24 + s.X[0], F32), k.load("mean", s.X[0], F32))
    k.store("out", s.X[0], k.reduce("sum", value), F32)
    found = split(operation(k.done()), {}, least_elements=0)
    assert found is not None
    kernel = found[0].kernel
    levels = {n.buffer: kernel.levels[i] for i, n in enumerate(kernel.nodes) if isinstance(n, Load)}
    assert levels == {"a": Level.POINT, "mean": Level.OUTER}
