"""Padded rows: only where every access can move, and with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan.ir.program import BufferKind, Contract, Extern, Program, View
from memplan.ir.verify import verify_program
from memplan.passes.padding import pad_rows
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.programs import F32, ProgramBuilder

ROWS, COLUMNS, PADDED = 64, 257, 260
POINTWISE = {"aten.tanh.default", "aten.neg.default", "aten.add.Tensor"}
Shape = tuple[int, ...]


def on(device: str, program: Program) -> Program:
    buffers = {n: replace(b, device=device) for n, b in program.buffers.items()}
    return replace(program, buffers=buffers, operations=tuple(replace(op, device=device) for op in program.operations))


def padded(program: Program) -> Program:
    """The program as padded for a GPU, back on the CPU; verified."""
    moved = on("cpu", pad_rows(on("cuda:0", program), POINTWISE.__contains__))
    verify_program(moved)
    return moved


def padded_buffers(program: Program) -> set[str]:
    moved = padded(program)
    return {n for n, b in moved.buffers.items() if b.nbytes != program.buffers[n].nbytes}


def same_numbers(program: Program) -> Program:
    """Both programs run; returns the padded one."""
    moved = padded(program)
    inputs = make_inputs(program)
    for a, b in zip(run_program(moved, copy_inputs(inputs)), run_program(program, copy_inputs(inputs)), strict=True):
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return moved


def product(p: ProgramBuilder, *, rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = F32) -> View:
    """The temporary that is padded: the result of a product, (rows, columns)."""
    x, w = p.input("x", (rows, 8), dtype=dtype), p.input("w", (8, columns), dtype=dtype)
    return p.extern("logits", "aten.mm.default", (x, w), (rows, columns), dtype=dtype)


def ending(p: ProgramBuilder, value: View, sizes: Shape) -> Program:
    return p.program(p.extern("result", "aten.sum.dim_IntList", (value, [0]), sizes[1:]))


def test_rows_of_a_product_are_padded() -> None:
    p = ProgramBuilder()
    logits = product(p)
    tanh = p.extern("tanh", "aten.tanh.default", (logits,), logits.sizes)
    weight = p.input("weight", (COLUMNS, 16))
    program = p.program(p.extern("out", "aten.mm.default", (tanh, weight), (ROWS, 16)))
    moved = same_numbers(program)
    for name in ("logits", "tanh"):
        assert moved.buffers[name].nbytes == ROWS * PADDED * 4
    first = moved.by_name["tanh"]
    assert isinstance(first, Extern)
    assert [v.strides for v in (*first.args, *first.results) if isinstance(v, View)] == [(PADDED, 1), (PADDED, 1)]
    # what the caller gave or gets stays as it is
    assert moved.inputs == program.inputs
    assert moved.outputs == program.outputs
    assert moved.buffers["out"] == program.buffers["out"]


@pytest.mark.parametrize(
    ("dtype", "columns", "expected"),
    [
        (F32, 260, 260),
        (F32, 261, 264),
        (torch.bfloat16, 260, 264),
        (torch.bfloat16, 50257, 50264),
        (torch.float64, 257, 258),
    ],
)
def test_rows_start_at_multiples_of_16_bytes(dtype: torch.dtype, columns: int, expected: int) -> None:
    p = ProgramBuilder()
    logits = product(p, columns=columns, dtype=dtype)
    program = p.program(p.extern("out", "aten.sum.dim_IntList", (logits, [0]), (columns,), dtype=dtype))
    assert padded(program).buffers["logits"].nbytes == ROWS * expected * dtype.itemsize


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [
        ((COLUMNS, ROWS), (1, COLUMNS), 0),  # transposed
        ((4, 16, COLUMNS), (16 * COLUMNS, COLUMNS, 1), 0),  # rows split in two
        ((ROWS // 2, COLUMNS), (2 * COLUMNS, 1), COLUMNS),  # every other row
        ((8, 5), (COLUMNS, 2), 3 * COLUMNS + 7),  # a window
        ((3, ROWS, COLUMNS), (0, COLUMNS, 1), 0),  # expanded
        ((ROWS, 1), (COLUMNS, 99), 256),  # one column, with a stride that means nothing
        ((1, COLUMNS), (77, 1), 0),  # one row, likewise
    ],
)
def test_views_that_move(sizes: Shape, strides: Shape, offset: int) -> None:
    p = ProgramBuilder()
    product(p)
    seen = p.extern("seen", "aten.add.Tensor", (View("logits", F32, sizes, strides, offset), 1.0), sizes)
    program = p.program(seen)
    assert padded_buffers(program) == {"logits"}
    same_numbers(program)


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [
        ((ROWS * COLUMNS,), (1,), 0),  # flat
        ((COLUMNS, ROWS), (ROWS, 1), 0),  # read as another matrix
        ((ROWS - 1, COLUMNS), (COLUMNS, 1), 5),  # rows that start inside of rows
        ((ROWS - 1,), (COLUMNS + 1,), 0),  # the diagonal
    ],
)
def test_views_that_cross_rows_keep_the_buffer(sizes: Shape, strides: Shape, offset: int) -> None:
    p = ProgramBuilder()
    product(p)
    seen = p.extern("seen", "aten.add.Tensor", (View("logits", F32, sizes, strides, offset), 1.0), sizes)
    program = p.program(seen)
    assert padded_buffers(program) == set()
    assert padded(program) == program


def left_alone(build: Callable[[ProgramBuilder], Program]) -> None:
    program = build(ProgramBuilder())
    assert padded_buffers(program) == set()


def test_what_leaves_is_not_padded() -> None:
    left_alone(lambda p: p.program(product(p)))


def test_small_matrices_are_not_worth_it() -> None:
    for rows, columns in ((32, COLUMNS), (ROWS, 255), (ROWS, 256)):
        left_alone(
            lambda p, rows=rows, columns=columns: ending(p, product(p, rows=rows, columns=columns), (rows, columns))
        )


def test_a_writer_that_cannot_write_strided_rows() -> None:
    def build(p: ProgramBuilder) -> Program:
        x = p.input("x", (ROWS, COLUMNS))
        made = p.extern("sorted", "aten.sort.stable", (x,), (ROWS, COLUMNS))
        weight = p.input("weight", (COLUMNS, 16))
        return p.program(p.extern("out", "aten.mm.default", (made, weight), (ROWS, 16)))

    left_alone(build)


def test_a_buffer_that_is_mutated() -> None:
    def build(p: ProgramBuilder) -> Program:
        logits = product(p)
        p.extern(
            "half", "aten.mul_.Scalar", (logits, 0.5), contract=Contract.MUTATE, mutates=("logits",), result=logits
        )
        return ending(p, logits, (ROWS, COLUMNS))

    left_alone(build)


def test_a_buffer_read_in_another_dtype() -> None:
    def build(p: ProgramBuilder) -> Program:
        product(p)
        bits = View("logits", torch.int32, (ROWS, COLUMNS), (COLUMNS, 1))
        return p.program(p.extern("out", "aten.sum.dim_IntList", (bits, [0]), (COLUMNS,), dtype=torch.int64))

    left_alone(build)


def test_inputs_and_parameters_stay_as_the_caller_laid_them() -> None:
    def build(p: ProgramBuilder) -> Program:
        x, w = p.input("x", (ROWS, COLUMNS)), p.input("w", (COLUMNS, 16), kind=BufferKind.PARAMETER)
        return p.program(p.extern("out", "aten.mm.default", (x, w), (ROWS, 16)))

    left_alone(build)


def test_symbolic_sizes_stay() -> None:
    def build(p: ProgramBuilder) -> Program:
        n = p.symbol("n", 300)
        x, w = p.input("x", (n, 8)), p.input("w", (8, COLUMNS))
        logits = p.extern("logits", "aten.mm.default", (x, w), (n, COLUMNS))
        return p.program(p.extern("out", "aten.sum.dim_IntList", (logits, [0]), (COLUMNS,)))

    left_alone(build)


def test_the_cpu_is_left_alone() -> None:
    p = ProgramBuilder()
    program = ending(p, product(p), (ROWS, COLUMNS))
    assert pad_rows(program, POINTWISE.__contains__) is program


def test_products_read_as_their_transpose() -> None:
    """A column-major result: its columns are the rows in memory."""
    p = ProgramBuilder()
    x, w = p.input("x", (COLUMNS, 8)), p.input("w", (8, ROWS))
    p.buffer("logits", (ROWS, COLUMNS))
    turned = View("logits", F32, (COLUMNS, ROWS), (1, COLUMNS))
    p.extern("logits", "aten.mm.default", (x, w), result=turned)
    program = p.program(p.extern("out", "aten.sum.dim_IntList", (turned, [0]), (ROWS,)))
    moved = same_numbers(program)
    assert moved.buffers["logits"].nbytes == ROWS * PADDED * 4


def addresses(sizes: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
    total = torch.tensor(offset)
    for size, stride in zip(sizes, strides, strict=True):
        total = total.unsqueeze(-1) + torch.arange(size) * stride
    return total


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0, 1, 2, 3, 50, 128, 256, 257, 258, 514, 771])), max_size=3),
    st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_every_element_moves_to_its_place(dims: list[tuple[int, int]], offset: int) -> None:
    """Element ``i`` of the buffer lies at ``i // columns * padded + i % columns`` afterwards, seen through any view."""
    sizes, strides = tuple(n for n, _ in dims), tuple(s for _, s in dims)
    where = addresses(sizes, strides, offset)
    assume(int(where.max()) < ROWS * COLUMNS)
    p = ProgramBuilder()
    product(p)
    program = p.program(p.extern("seen", "aten.add.Tensor", (View("logits", F32, sizes, strides, offset), 1.0), sizes))
    moved = padded(program)
    if moved.buffers["logits"].nbytes == program.buffers["logits"].nbytes:
        # refused: then some row of the view must cross a row of the buffer, or end beyond one
        inside = sum((n - 1) * s for n, s in dims if s % COLUMNS and n > 1) + offset % COLUMNS
        assert inside >= COLUMNS
        return
    op = moved.by_name["seen"]
    assert isinstance(op, Extern)
    view = op.args[0]
    assert isinstance(view, View)
    found = addresses([int(n) for n in view.sizes], [int(s) for s in view.strides], int(view.offset))
    assert torch.equal(found, where // COLUMNS * PADDED + where % COLUMNS)
