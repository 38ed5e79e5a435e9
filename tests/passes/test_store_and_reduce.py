"""Reductions of parts in the kernels that store what they read: when, where in the order, and with the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memplan.codegen.triton_kernel import emit_triton, safe_in_place
from memplan.ir.canonical import canonicalize
from memplan.ir.loops import Kernel, Level
from memplan.ir.program import Buffer, BufferKind, KernelOp, Operation, Phase, Program, TensorInput, View
from memplan.ir.verify import verify_program
from memplan.passes.kernel_access import kernel_safe
from memplan.passes.split_reductions import split
from memplan.passes.store_and_reduce import StoreAndReduce
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.sample_kernels import F32, Builder, R, X, column_sum

ROWS, COLUMNS = 1536, 1024
SIZE = ROWS * COLUMNS
MADE = "made_and_sums"
DEVICE = "cuda:0"
GIVEN = ("a", "b", "c")


def pointwise(source: str, target: str, *, stores: int = 1) -> Kernel:
    """target = source * 2 + 1 over flat points; more stores go to target1, target2, ..."""
    k = Builder((SIZE,))
    value = k.call("add", k.call("mul", k.load(source, X[0], F32), k.const(2.0)), k.const(1.0))
    for n in range(stores):
        k.store(f"{target}{n or ''}", X[0], value, F32)
    return k.done()


def summed(source: str, target: str) -> Kernel:
    names = {"a": source, "out": target}
    kernel = column_sum(ROWS, COLUMNS, F32)
    return canonicalize(kernel).kernel.numbered_over(tuple(names[b] for b in kernel.buffers))


def weighted(source: str, weights: str, target: str) -> Kernel:
    """target[j] = sum over i of source[i, j] * weights[i, j]"""
    k = Builder((COLUMNS,), (ROWS,))
    at = R[0] * COLUMNS + X[0]
    k.store(target, X[0], k.reduce("sum", k.call("mul", k.load(source, at, F32), k.load(weights, at, F32))), F32)
    return k.done()


def program(*kernels: tuple[str, Kernel]) -> Program:
    """The kernels in order, reductions split. `GIVEN` are given; what starts with ``out`` is returned."""
    buffers: dict[str, Buffer] = {}
    operations: list[Operation] = []
    for name, kernel in kernels:
        for b in kernel.buffers:
            small = b.startswith("out_sum")
            kind = BufferKind.INPUT if b in GIVEN else BufferKind.OUTPUT if b.startswith("out") else None
            size = 4 * (COLUMNS if small else SIZE)
            buffers.setdefault(b, Buffer(b, size, F32, DEVICE, kind or BufferKind.TEMPORARY))
        mutates = tuple(b for b in kernel.written_buffers if b in kernel.read_buffers)
        op = KernelOp(name, kernel, DEVICE, mutates=mutates)
        found = split(op, buffers)
        if found is None:
            operations.append(op)
            continue
        first, second, made = found
        operations += [first, second]
        buffers.update((b.name, b) for b in made)
    inputs = tuple(TensorInput(k, View(b, F32, (SIZE,), (1,))) for k, b in enumerate(GIVEN) if b in buffers)
    outputs = tuple(View(b, F32, (int(buffers[b].nbytes) // 4,), (1,)) for b in buffers if b.startswith("out"))
    made_program = Program("p", Phase.INFERENCE, buffers, tuple(operations), inputs, outputs)
    verify_program(made_program)
    return made_program


def names(p: Program) -> list[str]:
    return [op.name for op in p.operations]


def same_answers(before: Program, after: Program) -> None:
    verify_program(after)
    inputs = make_inputs(before)
    expected = run_program(before, copy_inputs(inputs))
    found = run_program(after, inputs)
    for e, f in zip(expected, found, strict=True):
        assert isinstance(e, torch.Tensor)
        assert torch.equal(e, f)


def test_parts_are_reduced_where_their_rows_are_stored() -> None:
    before = program(("made", pointwise("a", "t")), ("read", pointwise("t", "out")), ("sum", summed("t", "out_sum")))
    after = StoreAndReduce().run(before)
    assert names(after) == [MADE, "read", "sum"]
    kernel = after.by_name[MADE].kernel  # type: ignore[union-attr]
    assert sorted(kernel.store_level(s) is Level.POINT for s in kernel.stores) == [False, True]
    same_answers(before, after)


def test_two_reductions_of_one_tensor_are_one_kernel() -> None:
    before = program(
        ("made", pointwise("a", "t")),
        ("sum", summed("t", "out_sum")),
        ("weigh", weighted("t", "b", "out_sum1")),
    )
    after = StoreAndReduce().run(before)
    assert names(after) == [MADE, "sum", "weigh"]
    same_answers(before, after)


def test_what_is_made_between_is_waited_for_if_nobody_waits_for_the_first() -> None:
    kernels = [
        ("made", pointwise("a", "t")),
        ("other", pointwise("b", "w")),
        ("weigh", weighted("t", "w", "out_sum")),
        ("read", pointwise("t", "out")),
    ]
    before = program(*kernels)
    after = StoreAndReduce().run(before)
    assert names(after) == ["other", MADE, "weigh", "read"]
    same_answers(before, after)
    before = program(kernels[0], kernels[3], *kernels[1:3])
    after = StoreAndReduce().run(before)
    assert names(after) == ["made", "read", "other_and_sums", "weigh"]
    same_answers(before, after)


def test_a_reduction_that_changes_something_stays_in_its_place() -> None:
    """Few enough columns that it is not split: running statistics may be read between."""
    k = Builder((COLUMNS,), (ROWS,))
    total = k.reduce("sum", k.load("t", R[0] * COLUMNS + X[0], F32))
    k.store("out_sum", X[0], k.call("add", k.load("out_sum", X[0], F32), total), F32)
    op = KernelOp("update", k.done(), DEVICE, mutates=("out_sum",))
    before = program(("made", pointwise("a", "t")), ("first", summed("b", "out_sum")), ("read", pointwise("t", "out")))
    before = replace(before, operations=(*before.operations, op))
    verify_program(before)
    assert "update" in names(StoreAndReduce().run(before))
    assert MADE not in names(StoreAndReduce().run(before))


def test_what_is_read_for_the_last_time_does_not_wait() -> None:
    # both of a and b would be alive beside w, where t is alone
    k = Builder((SIZE,))
    k.store("t", X[0], k.call("mul", k.load("a", X[0], F32), k.load("b", X[0], F32)), F32)
    before = program(("made", k.done()), ("other", pointwise("c", "w")), ("weigh", weighted("t", "w", "out_sum")))
    assert names(StoreAndReduce().run(before)) == ["other", MADE, "weigh"]
    donated = {b: replace(before.buffers[b], donated=True) for b in ("a", "b")}
    before = replace(before, buffers={**before.buffers, **donated})
    assert names(StoreAndReduce().run(before)) == ["made", "other_and_sums", "weigh"]


def test_neither_can_move_past_the_other() -> None:
    # t is read before w is there, and w is changed after it was made
    kernels = [
        ("made", pointwise("a", "t")),
        ("read", pointwise("t", "w")),
        ("change", pointwise("w", "w")),
        ("weigh", weighted("t", "w", "out_sum")),
    ]
    before = program(*kernels)
    assert StoreAndReduce().run(before) is before


@pytest.mark.parametrize(
    "reason", ["many stores", "small", "it changes a buffer", "made by two", "along contiguous rows"]
)
def test_left_alone(reason: str) -> None:
    kernels: list[tuple[str, Kernel]] = [("made", pointwise("a", "t")), ("sum", summed("t", "out_sum"))]
    if reason == "many stores":
        kernels[0] = ("made", pointwise("a", "t", stores=3))
    elif reason == "it changes a buffer":
        kernels[0] = ("made", pointwise("a", "a"))
        kernels[1] = ("sum", summed("a", "out_sum"))
    elif reason == "made by two":
        kernels.insert(1, ("again", pointwise("t", "t")))
    elif reason == "along contiguous rows":
        k = Builder((), (SIZE,))
        k.store("out_sum", 0, k.reduce("sum", k.load("t", R[0], F32)), F32)
        kernels[1] = ("sum", k.done())
    before = program(*kernels)
    if reason == "small":
        before = replace(before, buffers={**before.buffers, "t": replace(before.buffers["t"], nbytes=4 << 18)})
    assert any(op.name == "sum_parts" for op in before.operations)
    assert StoreAndReduce().run(before) is before


def test_the_stored_tensor_may_take_the_storage_of_the_one_it_is_made_of() -> None:
    before = program(("made", pointwise("a", "t")), ("sum", summed("t", "out_sum")))
    op = StoreAndReduce().run(before).by_name[MADE]
    assert isinstance(op, KernelOp)
    assert kernel_safe(op, "a", "t")
    canonical = canonicalize(op.kernel)
    number = {b: f"b{k}" for k, b in enumerate(canonical.buffers)}
    assert safe_in_place(canonical.kernel, number["a"], number["t"])


def test_columns_are_blocked_by_how_many_lie_beside_each_other() -> None:
    before = program(("made", pointwise("a", "t")), ("sum", summed("t", "out_sum")))
    op = StoreAndReduce().run(before).by_name[MADE]
    assert isinstance(op, KernelOp)
    first = emit_triton(canonicalize(op.kernel), name="k", hints={}).configs[0]
    assert (first.block("XBLOCK"), first.num_warps) == (64, 4)
