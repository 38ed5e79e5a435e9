"""What keeps a program from being recorded as a CUDA graph is found before anything runs, and named."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import sympy
import torch

from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    Operation,
    Origin,
    Phase,
    Program,
    SymbolInput,
    TensorInput,
    View,
)
from memplan.runtime.cuda_graphs import changed_positions, obstacle, static_positions
from tests.models.against_eager import check
from tests.models.test_programs import Block

F32 = torch.float32
ORIGIN = Origin("node", "aten.relu.default", "", "model.py", 7, "y = relu(x)")
A, OUT = View("a", F32, (8,), (1,)), View("out", F32, (8,), (1,))


def relu(device: str = "cuda:0") -> Extern:
    return Extern("relu", "aten.relu.default", (A,), (), (OUT,), Contract.FRESH, device, (ORIGIN,))


def relu_in_place() -> Extern:
    return Extern("relu", "aten.relu_.default", (A,), (), (A,), Contract.MUTATE, "cuda:0", (ORIGIN,), mutates=("a",))


def program(*operations: Operation, kind: BufferKind = BufferKind.INPUT, device: str = "cuda:0") -> Program:
    buffers = {
        "a": Buffer("a", 32, F32, "cuda:0", kind),
        "out": Buffer("out", 32, F32, device, BufferKind.OUTPUT),
    }
    return Program("p", Phase.INFERENCE, buffers, operations, (TensorInput(0, A),), (OUT,))


def test_kernels_of_one_gpu_can_be_recorded() -> None:
    assert obstacle(program(relu())) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (program(relu("cpu"), device="cpu"), "aten.relu.default runs on cpu"),
        (program(relu("cuda:1"), device="cuda:1"), "runs on cuda:1, not on cuda:0"),
        (program(relu_in_place()), "changes its input a"),
        (program(replace(relu(), contract=Contract.DYNAMIC)), "known only after it has run"),
        (program(replace(relu(), target="callable:cond", origins=(replace(ORIGIN, op="cond"),))), "cond may do more"),
    ],
)
def test_obstacles_name_the_operation_and_the_line(wrong: Program, says: str) -> None:
    found = str(obstacle(wrong))
    assert says in found
    assert "model.py:7" in found


def test_dynamic_shapes_are_an_obstacle() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    dynamic = replace(program(relu()), inputs=(SymbolInput(0, size), TensorInput(1, A)))
    assert "shapes are dynamic" in str(obstacle(dynamic))


def test_parameters_may_change() -> None:
    """Running statistics of a batch norm: their address is the same in every call."""
    changing = program(relu_in_place(), kind=BufferKind.PARAMETER)
    assert obstacle(changing) is None
    assert changed_positions(changing) == (0,)
    assert static_positions(changing) == {0}


def test_what_the_forward_saved_is_static() -> None:
    saved = program(relu())
    buffers = {**saved.buffers, "a": replace(saved.buffers["a"], donated=True)}
    assert static_positions(saved) == set()
    assert static_positions(replace(saved, buffers=buffers)) == {0}


def test_on_a_cpu_the_option_does_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(Block(), [torch.randn(3, 12, requires_grad=True)], cuda_graphs=True)
