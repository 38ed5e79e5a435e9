"""The program verifier on kernels that change what they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memplan.ir.errors import VerificationError
from memplan.ir.index import Mod
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    Index,
    Kernel,
    Load,
    Range,
    Reduce,
    Store,
    StoreMode,
    outer_symbol,
    row_symbol,
    value_symbol,
)
from memplan.ir.program import Program, View
from memplan.ir.verify import verify_program
from tests.programs import F32, ProgramBuilder, softmax_kernel

X0, X1, R0 = outer_symbol(0), outer_symbol(1), row_symbol(0)


def rejects(program: Program, message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_program(program)
    assert message in str(caught.value)


def in_place(kernel: Kernel, *, dtype: torch.dtype = F32) -> Program:
    """A program whose one kernel changes ``x`` and reads it."""
    p = ProgramBuilder()
    p.input("x", (4, 4), dtype=dtype)
    p.kernel("k", kernel, mutates=("x",))
    return p.program()


def test_a_row_may_be_written_over_by_its_last_pass() -> None:
    x = View("x", F32, (4, 4), (4, 1))
    verify_program(in_place(softmax_kernel(x, x)))


def test_a_row_read_elsewhere_in_earlier_passes_only() -> None:
    row = 4 * X0
    nodes = (Load("x", row + 3 - R0, F32), Reduce("sum", (0,), F32), Index(R0), Cast(2, F32), Call("mul", (1, 3), F32))
    kernel = Kernel((Range(X0, 4),), (Range(R0, 4),), nodes, (Store("x", row + R0, 4, F32),))
    verify_program(in_place(kernel))
    near = replace(kernel, nodes=(Load("x", Mod(row + 5 - R0, 16), F32), *nodes[1:]))
    rejects(in_place(near), "races with itself in 'x'")


def test_a_row_written_before_its_last_pass_reads_it() -> None:
    index = 4 * X0 + R0
    nodes = (Load("x", index, F32), Call("exp", (0,), F32), Reduce("sum", (1,), F32), Call("div", (0, 2), F32))
    stores = (Store("x", index, 1, F32), Store("y", index, 3, F32))
    p = ProgramBuilder()
    p.input("x", (4, 4))
    y = p.buffer("y", (4, 4))
    p.kernel("k", Kernel((Range(X0, 4),), (Range(R0, 4),), nodes, stores), mutates=("x",))
    rejects(p.program(y), "v0 reads 'x' in pass 1 over the row, when pass 0 has written 'x'")


def test_computed_indices_race() -> None:
    p = ProgramBuilder()
    p.input("x", (16,))
    p.input("i", (16,), dtype=torch.int64)
    gather = (Load("i", X0, torch.int64), Load("x", value_symbol(0), F32))
    p.kernel("k", Kernel((Range(X0, 16),), (), gather, (Store("x", X0, 1, F32),)), mutates=("x",))
    rejects(p.program(), "v1 reads 'x' at a computed index")
    p.operations.clear()
    scatter = (Load("i", X0, torch.int64), Load("x", X0, F32))
    p.kernel("k", Kernel((Range(X0, 16),), (), scatter, (Store("x", value_symbol(0), 1, F32),)), mutates=("x",))
    rejects(p.program(), "the store to 'x' goes to a computed index")
    p.operations.clear()
    nodes = (Load("x", X0, F32),)
    p.kernel("k", Kernel((Range(X0, 16),), (), nodes, (Store("x", X0, 0, F32, StoreMode.ADD),)), mutates=("x",))
    rejects(p.program(), "the store to 'x' is atomic (add)")


def test_masked_store_that_several_points_reach() -> None:
    nodes = (Load("x", X0, F32), Index(X1), Constant(0, torch.int64), Call("eq", (1, 2), torch.bool))
    kernel = Kernel((Range(X0, 16), Range(X1, 4)), (), nodes, (Store("x", X0, 0, F32, mask=3),))
    rejects(in_place(kernel), "points along x1 read and write one element of 'x'")


def test_a_sum_over_one_of_its_terms_while_it_is_normalised() -> None:
    """It is stored in the last pass over the row, if that computes the sum once more; if it reads one term, before."""
    index = 4 * X0 + R0
    nodes = (Load("x", index, F32), Load("a", index, F32), Call("add", (0, 1), F32), Reduce("sum", (2,), F32))
    stores = (Store("x", index, 2, F32), Store("y", index, 4, F32))
    for read, right in ((2, True), (0, False)):
        p = ProgramBuilder()
        p.input("x", (4, 4)), p.input("a", (4, 4))
        y = p.buffer("y", (4, 4))
        kernel = Kernel((Range(X0, 4),), (Range(R0, 4),), (*nodes, Call("sub", (read, 3), F32)), stores)
        p.kernel("k", kernel, mutates=("x",))
        if right:
            verify_program(p.program(y))
        else:
            rejects(p.program(y), "v0 reads 'x' in pass 1 over the row, when pass 0 has written 'x'")
