"""The verifier says each thing that it can say of copies to pinned memory of the host and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memplan.ir.communication import Memory
from memplan.ir.errors import VerificationError
from memplan.ir.in_flight import HostCopy, Wait
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    Literal,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)
from memplan.ir.verify import verify_program

GPU = "cuda:0"


def view(name: str, *sizes: int, strides: tuple[int, ...] | None = None, offset: int = 0) -> View:
    return View(name, torch.float32, sizes or (8,), strides or (1,), offset)


def call(name: str, source: View, result: View, device: str = GPU) -> Extern:
    return Extern(name, "aten.sin.default", (source,), (), (result,), Contract.FRESH, device)


MAKE = call("make", view("x"), view("a"))
OUT = HostCopy("out", "memplan.offload", (view("a"),), (), (view("h"),), Contract.FRESH, GPU)
SENT = Wait("sent", "memplan.wait", (view("h"), view("a")), (), (view("h"),), Contract.MUTATE, GPU, mutates=("h",))
BACK = HostCopy("back", "memplan.prefetch", (view("h"),), (), (view("b"),), Contract.OUT, GPU)
HERE = Wait("here", "memplan.wait", (view("b"), view("h")), (), (view("b"),), Contract.MUTATE, GPU, mutates=("b",))
USE = call("use", view("b"), view("y"))


def program(*operations: Operation, **changes: Callable[[Buffer], Buffer]) -> Program:
    kinds = {"x": BufferKind.INPUT, "a": BufferKind.TEMPORARY, "b": BufferKind.TEMPORARY, "y": BufferKind.OUTPUT}
    buffers = {n: Buffer(n, 32, torch.float32, GPU, kind) for n, kind in kinds.items()}
    buffers["h"] = Buffer("h", 32, torch.float32, "cpu", BufferKind.SAVED, memory=Memory.PINNED)
    for name, change in changes.items():
        buffers[name] = change(buffers[name])
    return Program("p", Phase.FORWARD, buffers, operations, (TensorInput(0, view("x")),), (view("y"), view("h")))


def test_out_and_back_is_right() -> None:
    verify_program(program(MAKE, OUT, SENT, BACK, HERE, USE))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (program(MAKE, replace(OUT, args=(view("a"), Literal(1))), SENT, BACK, HERE, USE), "one source and one target"),
        (program(MAKE, OUT, SENT, BACK, HERE, USE, h=lambda b: replace(b, memory=Memory.PLAIN)),
         "'h', is not in pinned memory"),
        (program(MAKE, OUT, SENT, BACK, HERE, USE, a=lambda b: replace(b, device="cuda:1")),
         "its end on cuda:0, 'a', is not there"),
        (program(MAKE, replace(OUT, results=(view("h", 2, 4, strides=(4, 1)),)), SENT, BACK, HERE, USE),
         "copies 'a' to another layout"),
        (program(MAKE, OUT, SENT, BACK, HERE, USE, h=lambda b: replace(b, nbytes=64)), "copies a part of 'h'"),
        (program(MAKE, OUT, SENT, BACK, HERE, call("use", view("h"), view("y"))), "uses .h., which is in pinned"),
        (program(MAKE, OUT, SENT, BACK, HERE, USE, h=lambda b: replace(b, kind=BufferKind.TEMPORARY)),
         "waits for a copy into 'h'"),
    ],
)  # fmt: skip
def test_each_rule_is_held(made: Program, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_program(made)
