"""Starts rise and waits sink as far as the bound on memory lets them."""

from __future__ import annotations

from dataclasses import replace

import torch

from memplan.ir.in_flight import Collective, Wait
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
from memplan.ir.verify_plan import verify_plan
from memplan.passes.overlap import overlap
from memplan.passes.schedule import lifetimes, make_plan, storages, timeline


def view(name: str, count: int) -> View:
    return View(name, torch.float32, (count,), (1,))


def sin(name: str, source: View, result: View) -> Extern:
    return Extern(name, "aten.sin.default", (source,), (), (result,), Contract.FRESH, "cpu")


def program(count: int = 1024) -> Program:
    """Two values from the input; one is gathered, beside work on the other."""
    sizes = {"x": count, "h": count, "g": 2 * count, "a": count, "b": count, "c": count, "s": 2 * count}
    kinds = {"x": BufferKind.INPUT, "s": BufferKind.OUTPUT, "c": BufferKind.OUTPUT}
    buffers = {n: Buffer(n, 4 * k, torch.float32, "cpu", kinds.get(n, BufferKind.TEMPORARY)) for n, k in sizes.items()}
    x, h, g, a, b, c, s = (view(n, k) for n, k in sizes.items())
    gather = Collective(
        "gather", "_c10d_functional.all_gather_into_tensor.default", (h, Literal(2), Literal("0")), (), (g,),
        Contract.FRESH, "cpu", effect=True, group="0",
    )  # fmt: skip
    wait = Wait(
        "wait", "_c10d_functional.wait_tensor.default", (g, h), (), (g,), Contract.MUTATE, "cpu", mutates=("g",)
    )
    operations: tuple[Operation, ...] = (
        sin("make_h", x, h), sin("make_a", x, a), sin("make_b", a, b), gather, wait, sin("make_c", b, c),
        sin("use", g, s),
    )  # fmt: skip
    return Program("p", Phase.INFERENCE, buffers, operations, (TensorInput(0, x),), (s, c))


def peak(made: Program, order: tuple[str, ...]) -> int:
    return max(timeline(made, order, storages(made, lifetimes(made, order), {}), (), frozenset()))


def test_everything_moves_where_memory_is_free() -> None:
    made = program()
    order = tuple(op.name for op in made.operations)
    moved = overlap(made, order, extra=1 << 20)
    assert moved == ("make_h", "gather", "make_a", "make_b", "make_c", "wait", "use")
    verify_plan(make_plan(made, moved, in_place={}))


def test_the_peak_does_not_rise() -> None:
    made = program()
    order = tuple(op.name for op in made.operations)
    moved = overlap(made, order)
    assert moved != order
    assert peak(made, moved) <= peak(made, order)
    verify_plan(make_plan(made, moved, in_place={}))


def test_a_program_without_collectives_is_left_alone() -> None:
    made = program()
    made = replace(made, operations=made.operations[:3], outputs=(view("b", 1024),))
    made = replace(made, buffers={**made.buffers, "b": replace(made.buffers["b"], kind=BufferKind.OUTPUT)})
    order = tuple(op.name for op in made.operations)
    assert overlap(made, order, extra=1 << 20) == order
