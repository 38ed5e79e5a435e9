"""The shape of a buffer that only kernels touch is that of the loops which write it, where they write it whole."""

from __future__ import annotations

import pytest
import sympy
import torch

from memplan.ir.loops import outer_symbol
from memplan.ir.program import Buffer, BufferKind, KernelOp, Phase, Program
from memplan.reports.shapes import shapes_of
from tests.sample_kernels import F32, Builder

A, B, C = (outer_symbol(k) for k in range(3))
N = sympy.Symbol("s0", positive=True, integer=True)


def program(index: sympy.Expr, *, bytes_of: int, outer: tuple[object, ...] = (2, 3, 4)) -> Program:
    k = Builder(outer)  # type: ignore[arg-type]
    k.store("out", index, k.const(1.0))
    buffer = Buffer("out", bytes_of, torch.float32, "cpu", BufferKind.TEMPORARY)
    return Program("p", Phase.INFERENCE, {"out": buffer}, (KernelOp("k", k.done(), "cpu"),), (), (), {N: 5})


@pytest.mark.parametrize(
    ("index", "shape"),
    [(12 * A + 4 * B + C, (2, 3, 4)), (A + 2 * B + 6 * C, (4, 3, 2)), (3 * A + B, (2, 3))],
    ids=["in order", "another order", "a loop that the store does not know"],
)
def test_it_is_that_of_the_loops(index: sympy.Expr, shape: tuple[int, ...]) -> None:
    elements = shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
    assert shapes_of(program(index, bytes_of=elements * F32.itemsize)) == {"out": shape}


def test_a_symbol_counts_as_its_hint() -> None:
    asked = program(4 * N * A + 4 * B + C, bytes_of=2 * 5 * 4 * F32.itemsize, outer=(2, N, 4))
    assert shapes_of(asked) == {"out": (2, 5, 4)}


@pytest.mark.parametrize(
    ("index", "bytes_of"),
    [(12 * A + 4 * B + C, 200), (24 * A + 8 * B + 2 * C, 192), (sympy.Mod(12 * A + 4 * B + C, 7), 96)],
    ids=["a part of the buffer", "gaps", "not linear"],
)
def test_another_store_says_nothing_of_the_shape(index: sympy.Expr, bytes_of: int) -> None:
    assert shapes_of(program(index, bytes_of=bytes_of)) == {}
