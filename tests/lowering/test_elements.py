"""Pointwise operations and moves of elements over broadcast, permuted, offset, empty and 0-dimensional operands."""

from __future__ import annotations

import itertools

import pytest
import torch

from memplan.ir.loops import Cast, Load
from memplan.ir.program import KernelOp
from tests.lowering.harness import check

aten = torch.ops.aten

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4, 5),
    "permuted": lambda: torch.randn(5, 3, 4).permute(1, 2, 0),
    "offset": lambda: torch.randn(4, 6, 7)[1:, 1:5, 2:],
    "stepped": lambda: torch.randn(6, 8, 5)[::2, ::2],
    "broadcast": lambda: torch.randn(3, 1, 5).expand(3, 4, 5),
}


@pytest.mark.parametrize(("one", "other"), itertools.product(LAYOUTS, repeat=2))
def test_layouts(one: str, other: str) -> None:
    x, y = LAYOUTS[one](), LAYOUTS[other]()
    assert check(aten.sub.Tensor, x, y, alpha=2)
    assert check(aten.where.self, x > 0, x, y)
    assert check(aten.cat.default, [x, y], 1)
    assert check(aten.clone.default, x, memory_format=torch.contiguous_format)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize(("one", "other"), itertools.product(DTYPES, repeat=2))
def test_promotion(one: torch.dtype, other: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = (torch.rand(4, 3) * 5).to(one), (torch.rand(3) * 5).to(other)
    scalar = y[0]
    for overload in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.lt.Tensor, aten.maximum.default):
        assert check(overload, x, y)
        assert check(overload, x, scalar)
        assert check(overload, scalar, x)
    for number in (2, 2.5, True):
        assert check(aten.mul.Tensor, x, number)
        assert check(aten.ge.Scalar, x, number)
    assert check(aten._to_copy.default, x, dtype=other)


def test_half_types_are_computed_in_float32() -> None:
    x = torch.randn(64, dtype=torch.bfloat16)
    (op,) = check(aten.mul.Tensor, x, x)  # type: ignore[misc]
    assert isinstance(op, KernelOp)
    assert [type(n) for n in op.kernel.nodes[:2]] == [Load, Cast]
    assert op.kernel.nodes[-1].dtype is torch.float32
    assert op.kernel.stores[0].dtype is torch.bfloat16


def test_what_only_moves_is_not_cast() -> None:
    x = torch.randn(4, 4, dtype=torch.bfloat16)
    for overload, args in (
        (aten.flip.default, (x, [0])),
        (aten.constant_pad_nd.default, (x, [1, 1])),
        (aten.masked_fill.Scalar, (x, x > 0, 1.5)),
        (aten.gather.default, (x, 1, torch.zeros(4, 2, dtype=torch.int64))),
    ):
        (op,) = check(overload, *args)  # type: ignore[misc]
        assert isinstance(op, KernelOp)
        assert not any(isinstance(n, Cast) and n.dtype is torch.float32 for n in op.kernel.nodes)


def test_empty_results_stay_calls() -> None:
    x = torch.randn(0, 3)
    assert check(aten.relu.default, x) is None
    assert check(aten.cat.default, [x, x], 0) is None


def test_dimensions_of_size_one_have_no_range() -> None:
    (op,) = check(aten.relu.default, torch.randn(1, 4, 1, 5))  # type: ignore[misc]
    assert isinstance(op, KernelOp)
    assert [r.size for r in op.kernel.outer] == [4, 5]


@pytest.mark.parametrize("pad", [[1, 2], [0, 3, 2, 0], [-1, 1], [-1, -1, 2, 2]])
def test_padding(pad: list[int]) -> None:
    x = torch.randn(2, 5, 6)
    assert check(aten.constant_pad_nd.default, x, pad, 3.5)
    assert check(aten.constant_pad_nd.default, x.int(), pad, 7)


def test_mirrored_padding() -> None:
    x = torch.randn(2, 3, 5, 6)
    assert check(aten.reflection_pad2d.default, x, [2, 1, 3, 0])
    assert check(aten.replication_pad2d.default, x, [2, 1, 3, 0])
    assert check(aten.replication_pad2d.default, x, [-1, 1, 3, 0])


def test_moves() -> None:
    x = torch.randn(3, 5, 4)
    assert check(aten.roll.default, x, [1, -7], [0, 1])
    assert check(aten.repeat.default, x, [2, 1, 3, 2])
    assert check(aten.repeat.default, x[:, :1], [2, 3, 1])
    assert check(aten.tril.default, x, -1)
    assert check(aten.triu.default, x, 2)
    assert check(aten.stack.default, [x, x * 2], 1)


@pytest.mark.parametrize("bounds", [(0, None, 1), (1, -1, 1), (-2, 100, 1), (0, None, 2), (1, 4, 3), (4, 2, 1)])
def test_slices(bounds: tuple[int, int | None, int]) -> None:
    x = torch.randn(4, 6, 3)
    start, stop, step = bounds
    part = torch.randn_like(torch.ops.aten.slice.Tensor(x, 1, start, stop, step))
    assert check(aten.slice_scatter.default, x, part, 1, start, stop, step)
    assert check(aten.slice_backward.default, part, [4, 6, 3], 1, start, stop or 6, step)


def test_parts_written_into_a_copy() -> None:
    x = torch.randn(4, 6, 6)
    assert check(aten.select_scatter.default, x, torch.randn(4, 6), 1, -2)
    assert check(aten.select_backward.default, torch.randn(4, 6), [4, 6, 6], 1, -2)
    assert check(aten.diagonal_scatter.default, x, torch.randn(4, 5), 1, 1, 2)
    assert check(aten.diagonal_scatter.default, x, torch.randn(6, 4), 0, 1, 0)
    assert check(aten.as_strided_scatter.default, x, torch.randn(3, 2), [3, 2], [12, 1], 5)
    # overlapping points: eager's order decides
    assert check(aten.as_strided_scatter.default, x, torch.randn(3, 2), [3, 2], [1, 1], 0) is None


def test_indexing() -> None:
    x = torch.randn(4, 5, 6)
    rows, columns = torch.tensor([0, -1, 2]), torch.tensor([[1], [4]])
    assert check(aten.index.Tensor, x, [rows])
    assert check(aten.index.Tensor, x, [rows, columns])
    assert check(aten.index.Tensor, x, [None, columns, None])
    assert check(aten.index.Tensor, x, [rows, None, columns])
    assert check(aten.index.Tensor, x.permute(2, 0, 1), [None, rows.int(), columns.int()])
    assert check(aten.index.Tensor, x, [torch.tensor([True, False, True, False])]) is None
    assert check(aten.embedding.default, x[0], rows[:2].abs())
    assert check(aten.index_select.default, x, 1, columns[:, 0])
    assert check(aten.gather.default, x, 1, torch.randint(0, 5, (2, 3, 6)))


def test_scatters() -> None:
    x, index = torch.zeros(4, 5), torch.tensor([[0, 1, 2], [3, 2, 0]])
    source = torch.randn(3, 5)
    assert check(aten.scatter.src, x, 0, index[:1], source)
    assert check(aten.scatter_add.default, x, 0, index, source)
    assert check(aten.scatter.value, x, 1, index, 2.5)
    assert check(aten.scatter_reduce.two, x.int(), 1, index, torch.ones(2, 5).int(), "amax")
    # atomics in half precision would round at every step
    assert check(aten.scatter_add.default, x.bfloat16(), 0, index, source.bfloat16()) is None
    rows = torch.tensor([0, 2, 2, -1])
    assert check(aten.index_put.default, x, [rows], torch.randn(4, 5), True)
    assert check(aten.index_put.default, x, [None, rows[:1]], torch.randn(4, 1))
    assert check(aten.index_add.default, x, 0, rows.abs(), torch.randn(4, 5), alpha=2)
    assert check(aten.embedding_dense_backward.default, torch.randn(2, 3, 6), index, 7, 2, False)


def test_deterministic_algorithms_leave_scatters_to_eager() -> None:
    index = torch.tensor([[0, 1, 2]])
    torch.use_deterministic_algorithms(True)
    try:
        assert check(aten.scatter_add.default, torch.zeros(4, 5), 0, index, torch.ones(1, 5)) is None
    finally:
        torch.use_deterministic_algorithms(False)
