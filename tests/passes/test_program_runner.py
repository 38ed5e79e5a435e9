"""The program runner itself: storages, views, symbols, externs and poison."""

from __future__ import annotations

import sympy
import torch

from memplan.ir.loops import Call, Index, Kernel, Load, Range, Store, outer_symbol
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Phase,
    Program,
    Symbolic,
    SymbolInput,
    TensorInput,
    View,
)
from tests.program_runner import copy_inputs, make_inputs, run_program

F32 = torch.float32
N = sympy.Symbol("s0", integer=True, positive=True)


def test_kernel_extern_copy_and_symbols() -> None:
    x = outer_symbol(0)
    double = Kernel(
        (Range(x, 4 * N),),
        (),
        (Load("a", x, F32), Call("add", (0, 0), F32), Index(x)),
        (Store("t", x, 1, F32), Store("i", x, 2, torch.int64)),
    )
    t = View("t", F32, (N, 4), (4, 1))
    program = Program(
        "p",
        Phase.INFERENCE,
        {
            "a": Buffer("a", 16 * N, F32, "cpu", BufferKind.INPUT),
            "t": Buffer("t", 16 * N, F32, "cpu", BufferKind.TEMPORARY),
            "i": Buffer("i", 32 * N, torch.int64, "cpu", BufferKind.OUTPUT),
            "m": Buffer("m", 4 * N * N, F32, "cpu", BufferKind.OUTPUT),
        },
        (
            KernelOp("double", double, "cpu"),
            Extern(
                "mm",
                "aten.mm.default",
                (t, View("t", F32, (4, N), (1, 4))),
                (),
                (View("m", F32, (N, N), (N, 1)),),
                Contract.OUT,
                "cpu",
            ),
            Copy("back", t, View("a", F32, (N, 4), (4, 1)), "cpu", mutates=("a",)),
        ),
        (SymbolInput(0, N), TensorInput(1, View("a", F32, (N, 4), (4, 1)))),
        (View("m", F32, (N, N), (N, 1)), View("i", torch.int64, (N, 4), (4, 1)), Symbolic(N + 1)),
        hints={N: 3},
    )
    inputs = make_inputs(program, symbols={N: 5})
    a = inputs[1]
    assert isinstance(a, torch.Tensor)
    before = a.clone()
    untouched = copy_inputs(inputs)
    product, iota, size = run_program(program, inputs)
    torch.testing.assert_close(product, (2 * before) @ (2 * before).T)
    assert torch.equal(iota, torch.arange(20).reshape(5, 4))
    assert size == 6
    assert torch.equal(a, 2 * before), "the mutated input changed"
    assert torch.equal(untouched[1], before), "its copy did not"


def test_unwritten_elements_are_poison() -> None:
    x = outer_symbol(0)
    half = Kernel((Range(x, 2),), (), (Load("a", x, F32),), (Store("o", x, 0, F32),))
    program = Program(
        "p",
        Phase.INFERENCE,
        {
            "a": Buffer("a", 16, F32, "cpu", BufferKind.INPUT),
            "o": Buffer("o", 16, F32, "cpu", BufferKind.OUTPUT),
        },
        (KernelOp("half", half, "cpu"),),
        (TensorInput(0, View("a", F32, (4,), (1,))),),
        (View("o", F32, (4,), (1,)),),
    )
    (out,) = run_program(program, [torch.ones(4)])
    assert isinstance(out, torch.Tensor)
    assert out[:2].tolist() == [1, 1]
    assert out[2:].isnan().all()
