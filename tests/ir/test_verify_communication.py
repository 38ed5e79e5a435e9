"""The verifier names what touches a buffer in flight, what keeps too little, and memory of the wrong kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memplan.ir.communication import Memory
from memplan.ir.errors import VerificationError
from memplan.ir.in_flight import Collective, Wait
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    Literal,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)
from memplan.ir.verify import verify_program


def view(name: str, count: int = 8) -> View:
    return View(name, torch.float32, (count,), (1,))


def call(name: str, target: str, source: View, result: View) -> Extern:
    return Extern(name, target, (source,), (), (result,), Contract.FRESH, "cpu")


GATHER = Collective(
    "gather", "_c10d_functional.all_gather_into_tensor.default", (view("h"), Literal(2), Literal("0")), (),
    (view("g", 16),), Contract.FRESH, "cpu", effect=True, group="0",
)  # fmt: skip
WAIT = Wait(
    "wait", "_c10d_functional.wait_tensor.default", (view("g", 16), view("h")), (), (view("g", 16),), Contract.MUTATE,
    "cpu", mutates=("g",),
)  # fmt: skip
MAKE = call("make", "aten.sin.default", view("x"), view("h"))
USE = call("use", "aten.cos.default", view("g", 16), view("out", 16))
SCRIBBLE = Copy("scribble", view("x"), view("h"), "cpu", mutates=("h",))


def program(*operations: Operation) -> Program:
    sizes = {"x": (8, BufferKind.INPUT), "h": (8, BufferKind.TEMPORARY), "g": (16, BufferKind.TEMPORARY)}
    buffers = {n: Buffer(n, 4 * count, torch.float32, "cpu", kind) for n, (count, kind) in sizes.items()}
    buffers["out"] = Buffer("out", 64, torch.float32, "cpu", BufferKind.OUTPUT)
    return Program("p", Phase.INFERENCE, buffers, operations, (TensorInput(0, view("x")),), (view("out", 16),))


def test_a_wait_between_is_right() -> None:
    verify_program(program(MAKE, GATHER, WAIT, USE))
    verify_program(program(MAKE, GATHER, WAIT, SCRIBBLE, USE))


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((MAKE, GATHER, USE, WAIT), "uses 'g', which 'gather' .* still writes"),
        ((MAKE, GATHER, SCRIBBLE, WAIT, USE), "changes 'h', which 'gather' .* still reads"),
        ((MAKE, GATHER, replace(WAIT, args=(view("g", 16),)), USE), "does not keep 'h'"),
        ((MAKE, GATHER, WAIT, replace(GATHER, name="again", results=(view("out", 16),))),
         "nothing waits for its result 'out'"),
        ((MAKE, GATHER, replace(WAIT, mutates=("g", "h")), USE), "changes the buffer that it waits for, and no other"),
    ],
)  # fmt: skip
def test_what_is_in_flight_is_left_alone(operations: tuple[Operation, ...], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_program(program(*operations))


ONE_SHOT = Extern(
    "reduce", "symm_mem.one_shot_all_reduce_out.default", (view("h"), Literal("sum"), Literal("0")), (),
    (view("out", 8),), Contract.OUT, "cpu",
)  # fmt: skip


def test_a_symmetric_operation_without_its_tensor_is_refused() -> None:
    with pytest.raises(VerificationError, match="its argument 0 is no tensor"):
        verify_program(program(MAKE, replace(ONE_SHOT, args=(Literal("sum"), Literal("0")))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b, "takes symmetric memory, and 'h' is in plain memory"),
        (lambda b: replace(b, memory=Memory.SYMMETRIC, group="7"), "of group '7'"),
    ],
)
def test_symmetric_operations_take_symmetric_memory(change: Callable[[Buffer], Buffer], message: str) -> None:
    made = program(MAKE, ONE_SHOT)
    right = replace(made.buffers["h"], memory=Memory.SYMMETRIC, group="0")
    verify_program(replace(made, buffers={**made.buffers, "h": right}))
    with pytest.raises(VerificationError, match=message):
        verify_program(replace(made, buffers={**made.buffers, "h": change(made.buffers["h"])}))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"h": "0"}, "its 'h' is registered with its library, and its 'g' is not"),
        ({"g": "0"}, "its 'g' is registered with its library, and its 'h' is not"),
        ({"g": "0", "h": "7"}, "'h' is registered with group '7', not with the call's"),
    ],
)
def test_a_collective_works_in_registered_memory_of_its_group_or_in_none(groups: dict[str, str], message: str) -> None:
    made = program(MAKE, GATHER, WAIT, USE)

    def registered(names: dict[str, str]) -> Program:
        held = {n: replace(made.buffers[n], memory=Memory.REGISTERED, group=g) for n, g in names.items()}
        return replace(made, buffers={**made.buffers, **held})

    verify_program(registered({"g": "0", "h": "0"}))
    with pytest.raises(VerificationError, match=message):
        verify_program(registered(groups))


TO_ALL = Extern(
    "gather", "symm_mem.multimem_all_gather_out.default", (view("h"), Literal("0")), (), (view("g", 16),), Contract.OUT,
    "cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "held", "message"),
    [
        (TO_ALL, "h", "takes symmetric memory, and 'g' is in plain memory"),
        (replace(TO_ALL, results=(None,)), "h", "it has no result"),
    ],
)
def test_what_peers_write_is_in_symmetric_memory(operation: Extern, held: str, message: str) -> None:
    made = program(MAKE, TO_ALL, USE)

    def symmetric(name: str, *operations: Operation) -> Program:
        buffer = replace(made.buffers[name], memory=Memory.SYMMETRIC, group="0")
        return replace(made, buffers={**made.buffers, name: buffer}).with_operations(operations)

    verify_program(symmetric("g", MAKE, TO_ALL, USE))
    with pytest.raises(VerificationError, match=message):
        verify_program(symmetric(held, MAKE, operation, USE))
