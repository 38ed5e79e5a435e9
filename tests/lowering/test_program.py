"""Lowering of programs: what stays, what is added, how kernels are named, symbols as sizes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv

from memplan.ir.config import Config
from memplan.ir.errors import LoweringError
from memplan.ir.loops import Constant, Load, Random, Size
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Literal,
    Operation,
    Origin,
    Phase,
    Program,
    Symbolic,
    Tuple,
    View,
)
from memplan.ir.verify_kernel import verify_kernel
from memplan.lowering.builder import KernelBuilder
from memplan.lowering.call_site import LOWERINGS
from memplan.lowering.decompositions import decomposition_table
from memplan.lowering.lower import lower_program
from tests.reference_kernel import run_reference

S = sympy.Symbol("s0", integer=True, positive=True)
ORIGIN = Origin("add_3", "aten.add.Tensor", "layer", "model.py", 7)


def view(name: str, *sizes: Size, dtype: torch.dtype = torch.float32) -> View:
    strides: list[Size] = []
    numel: Size = 1
    for size in reversed(sizes):
        strides.insert(0, numel)
        numel = numel * size
    return View(name, dtype, tuple(sizes), tuple(strides))


def extern(target: str, args: Sequence[object], *results: View, name: str = "op") -> Extern:
    return Extern(name, target, tuple(args), (), results, Contract.FRESH, "cpu", (ORIGIN,))  # type: ignore[arg-type]


def program(operations: Sequence[Operation], views: Sequence[View], outputs: Sequence[View], **more: object) -> Program:
    buffers = {
        v.buffer: Buffer(v.buffer, v.numel * v.dtype.itemsize, v.dtype, "cpu", BufferKind.TEMPORARY) for v in views
    }
    return Program("p", Phase.INFERENCE, buffers, tuple(operations), (), tuple(outputs), **more)  # type: ignore[arg-type]


def kernel_of(p: Program) -> KernelOp:
    (op,) = lower_program(p, Config()).operations
    assert isinstance(op, KernelOp)
    return op


def test_kernels_carry_name_and_origin() -> None:
    x, y = view("x", 3), view("y", 3)
    op = kernel_of(program([extern("aten.relu.default", [x], y)], [x, y], [y]))
    assert (op.name, op.origins, op.device, op.reads, op.writes) == ("op", (ORIGIN,), "cpu", ("x",), ("y",))


def test_what_has_no_lowering_stays_as_it_is() -> None:
    x, y = view("x", 3, 3), view("y", 3, 3)
    for call in (
        extern("aten.mm.default", [x, x], y),
        extern("callable:cond", [x], y),
        extern("own.op.default", [x], y),
    ):
        assert lower_program(program([call], [x, y], [y]), Config()).operations == (call,)


def test_a_view_of_another_dtype_stays() -> None:
    x, y = view("x", 4), view("y", 4, dtype=torch.int32)
    seen = View("x", torch.int32, (4,), (1,))
    call = extern("aten.neg.default", [seen], y)
    assert lower_program(program([call], [x, y], [y]), Config()).operations == (call,)


def test_copies_become_kernels() -> None:
    x, y = view("x", 3, 4), view("y", 3, 4, dtype=torch.bfloat16)
    op = kernel_of(program([Copy("c", x, y, "cpu", (ORIGIN,), ("y",))], [x, y], [y]))
    assert op.mutates == ("y",)
    assert op.writes == ()


def test_a_copy_within_one_buffer_stays() -> None:
    x = view("x", 4, 4)
    turned = View("x", torch.float32, (4, 4), (1, 4))
    copy = Copy("c", turned, x, "cpu", (), ("x",))
    assert lower_program(program([copy], [x], [x]), Config()).operations == (copy,)


def test_scatter_is_a_copy_and_a_change_of_it() -> None:
    x, i, y = view("x", 4, 5), view("i", 2, dtype=torch.int64), view("y", 4, 5)
    values = view("v", 2, 5)
    call = extern("aten.index_put.default", [x, Tuple((i,)), values, Literal(True)], y)
    copy, change = lower_program(program([call], [x, i, values, y], [y]), Config()).operations
    assert (copy.name, copy.writes, copy.mutates) == ("op_copy", ("y",), ())
    assert (change.name, change.writes, change.mutates) == ("op", (), ("y",))


@pytest.mark.parametrize("reader", ["aten.relu.default", "aten.mm.default"])
def test_a_concatenation_is_selected_where_kernels_read_it(reader: str) -> None:
    x, y, out = view("x", 4, 2), view("y", 4, 4), view("z", 4, 4)
    cat = extern("aten.cat.default", [Tuple((x, x)), Literal(1)], y, name="cat")
    args = [y] if reader == "aten.relu.default" else [y, y]
    call = extern(reader, args, out, name="reader")
    operations = lower_program(program([cat, call], [x, y, out], [out]), Config()).operations
    parts = [op.name for op in operations if "y" in op.writes]
    assert parts == (["cat"] if reader == "aten.relu.default" else ["cat_part0", "cat_part1"])


def test_what_is_stacked_is_read_without_the_number_of_its_part() -> None:
    """An address that has it in it is no longer provably a multiple of 16 bytes: the GPU reads two bytes at a time."""
    x, y, z, out = view("x", 4, 8), view("y", 4, 8), view("z", 4, 2, 8), view("o", 4, 2, 8)
    stack = extern("aten.stack.default", [Tuple((x, y)), Literal(1)], z, name="stack")
    p = program([stack, extern("aten.relu.default", [z], out, name="reader")], [x, y, z, out], [out])
    op = lower_program(p, Config()).operations[0]
    assert isinstance(op, KernelOp)
    number = op.kernel.outer[1].symbol
    loads = op.kernel.loads
    assert len(loads) == 2
    assert all(number not in load.index.free_symbols and load.mask is not None for load in loads)
    contents = {n: torch.rand(32 if n in "xy" else 64) for n in "xyzo"}
    run_reference(op.kernel, contents)
    want = torch.stack([contents["x"].view(4, 8), contents["y"].view(4, 8)], 1)
    torch.testing.assert_close(contents["z"].view(4, 2, 8), want)


@pytest.mark.parametrize("length", [1, 5])
def test_symbols_as_sizes(length: int) -> None:
    x, y, z = view("x", S, 4), view("y", 4), view("z", S, 4)
    mean = view("m", 4)
    calls = [
        extern("aten.add.Tensor", [x, y], z, name="add"),
        extern("aten.mean.dim", [z, Tuple((Literal(0),))], mean, name="mean"),
        extern("aten.mul.Tensor", [mean, Symbolic(S)], y, name="mul"),
    ]
    p = lower_program(program(calls, [x, y, z, mean], [y], hints={S: length}), Config())
    contents = {n: torch.rand(length * 4 if n in "xz" else 4) for n in "xyzm"}
    want = (contents["x"].view(length, 4) + contents["y"]).mean(0) * length
    for op in p.operations:
        assert isinstance(op, KernelOp)
        verify_kernel(op.kernel, p.buffers, {S: length})
        run_reference(op.kernel, contents, {S: length})
    torch.testing.assert_close(contents["y"], want)


def test_random_numbers_are_those_of_the_operator() -> None:
    seeds, out = view("seeds", 3, dtype=torch.int64), view("out", 4, 5)
    from memplan.capture import operators  # noqa: F401

    args = [seeds, Literal(2), Tuple((Literal(4), Literal(5)))]
    op = kernel_of(program([extern("memplan.rand.default", args, out)], [seeds, out], [out]))
    assert any(isinstance(n, Random) for n in op.kernel.nodes)
    contents = {"seeds": torch.tensor([1, 2, 12345678901234]), "out": torch.zeros(20)}
    run_reference(op.kernel, contents)
    want = torch.ops.memplan.rand(contents["seeds"], 2, [4, 5])
    torch.testing.assert_close(contents["out"].view(4, 5), want)


def test_our_own_mistakes_name_the_users_line() -> None:
    x, y = view("x", 3), view("y", 3)
    with pytest.raises(LoweringError, match=r"aten.relu.default \(op\)(.|\n)*model.py:7"):
        lower_program(program([extern("aten.relu.default", [Literal("three")], y)], [x, y], [y]), Config())


def test_nothing_that_is_lowered_whole_is_taken_apart() -> None:
    table = {str(op) for op in decomposition_table(Config())}
    taken = {"aten._softmax.default", "aten._log_softmax.default", "aten.max_pool2d_with_indices.default"}
    assert table & set(LOWERINGS) == taken
    for whole in ("aten.native_dropout.default", "aten.mm.default", "aten.addmm.default", "aten.baddbmm.default"):
        assert whole not in table
    assert "aten.native_layer_norm.default" in table
    assert "aten.bernoulli.default" not in {str(op) for op in decomposition_table(Config(random="eager"))}


# -- the builder --------------------------------------------------------------------------------------------------


def test_equal_nodes_are_made_once_and_signed_zeros_are_not_equal() -> None:
    builder = KernelBuilder([4])
    x = builder.load(view("x", 4), builder.outer_coordinates)
    assert (x + 1.0).position == (x + 1.0).position
    assert builder.constant(0.0, torch.float32).position != builder.constant(-0.0, torch.float32).position
    assert (
        builder.constant(float("nan"), torch.float32).position == builder.constant(float("nan"), torch.float32).position
    )


def test_exact_identities_fold_and_inexact_ones_do_not() -> None:
    builder = KernelBuilder([4])
    x = builder.load(view("x", 4), builder.outer_coordinates)
    assert (x * 1).position == x.position
    assert (x + 0).position != x.position  # -0.0 + 0 is 0.0
    assert builder.constant(2.5, torch.float32).cast(torch.int64).dtype is torch.int64
    assert (
        builder.constant(0.1, torch.float64).cast(torch.bfloat16).position
        == builder.constant(0.1, torch.float64).position + 1
    )


def test_nodes_that_no_store_needs_are_dropped() -> None:
    builder = KernelBuilder([4])
    unused = builder.load(view("unused", 4), builder.outer_coordinates)
    assert unused.dtype is torch.float32
    at = builder.load(view("i", 4, dtype=torch.int64), builder.outer_coordinates)
    value = builder.load(view("x", 9), (at.symbol(),))
    builder.store(view("y", 4), builder.outer_coordinates, value * builder.constant(3, torch.float32))
    kernel = builder.build()
    assert kernel.read_buffers == ("i", "x")
    assert [type(n) for n in kernel.nodes[:2]] == [Load, Load]
    assert str(kernel.nodes[1].index) == "v0"  # type: ignore[union-attr]
    assert isinstance(kernel.nodes[2], Constant)


@pytest.mark.parametrize("length", [1, 5])
def test_numbers_computed_from_sizes(length: int) -> None:
    x, y = view("x", S, 4), view("y", S, 4)
    bessel = FloatTrueDiv(IntTrueDiv(4 * S, 4), IntTrueDiv(4 * S, 4) + 1.0)
    call = extern("aten.mul.Tensor", [x, Symbolic(bessel)], y)
    op = kernel_of(program([call], [x, y], [y], hints={S: length}))
    contents = {"x": torch.rand(length * 4), "y": torch.zeros(length * 4)}
    run_reference(op.kernel, contents, {S: length})
    torch.testing.assert_close(contents["y"], contents["x"] * (length / (length + 1.0)))


def test_all_failed_lowerings_are_found_at_once() -> None:
    x, y, z = view("x", 3), view("y", 3), view("z", 3)
    calls = [
        extern("aten.relu.default", [Literal("three")], y, name="first"),
        extern("aten.relu.default", [Literal("four")], z, name="second"),
    ]
    with pytest.raises(LoweringError) as caught:
        lower_program(program(calls, [x, y, z], [y, z]), Config())
    assert (caught.value.operation, *(e.operation for e in caught.value.others)) == ("first", "second")
