"""The program verifier accepts what is right, and says each thing that it can say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import sympy
import torch

from memplan.ir.errors import VerificationError
from memplan.ir.index import Mod
from memplan.ir.loops import (
    Call,
    Constant,
    Index,
    Item,
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
from memplan.ir.program import Buffer, BufferKind, Contract, Extern, Origin, Program, TensorInput, View
from memplan.ir.verify import ProgramVerifier, verify_kernel, verify_program
from tests.programs import F32, ProgramBuilder, contiguous, fill_kernel, pointwise_kernel

X0, X1, R0 = outer_symbol(0), outer_symbol(1), row_symbol(0)


def rejects(program: Program, *words: str) -> None:
    """The verifier refuses, and its message has all of the words."""
    with pytest.raises(VerificationError) as caught:
        verify_program(program)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def rejects_kernel(kernel: Kernel, *words: str, hints: dict[sympy.Symbol, int] | None = None) -> None:
    buffers = {n: Buffer(n, 64, F32, "cpu", BufferKind.TEMPORARY) for n in ("a", "b", "c")}
    buffers["i"] = Buffer("i", 128, torch.int64, "cpu", BufferKind.INPUT)
    with pytest.raises(VerificationError) as caught:
        verify_kernel(kernel, buffers, hints, name="k7", where="model.py:3")
    for word in ("k7", "model.py:3", *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def sixteen(*nodes: object, store: Store | None = None, row: bool = False) -> Kernel:
    """A kernel over 16 points (of 4 rows of 4, if asked) that stores its last value to ``b``."""
    outer = (Range(X0, 4 if row else 16),)
    inner = (Range(R0, 4),) if row else ()
    index = 4 * X0 + R0 if row else X0
    return Kernel(outer, inner, nodes, (store or Store("b", index, len(nodes) - 1, F32),))  # type: ignore[arg-type]


# -- what is right ------------------------------------------------------------------------------------------------


def test_accepts_an_ordinary_program() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 8))
    w = p.input("w", (8, 8), kind=BufferKind.PARAMETER)
    y = p.extern("mm", "aten.mm.default", (x, w), (4, 8), contract=Contract.OUT)
    z = p.softmax("softmax", y)
    p.copy("back", z, x)
    verify_program(p.program(z))


def test_accepts_symbolic_sizes_and_views() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 6)
    x = p.input("x", (s, 4))
    t = View("x", F32, (4, s), (1, 4))
    y = p.buffer("y", (4, s))
    p.kernel("transpose", pointwise_kernel("neg", [t], y))
    verify_program(p.program(y, x))


def test_accepts_parts_of_one_result_apart_in_an_inner_dimension() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 3))
    out = p.buffer("out", (4, 8))
    left = View("out", F32, (4, 3), (8, 1))
    right = View("out", F32, (4, 5), (8, 1), 3)
    p.pointwise("a", "neg", x, into=left)
    p.kernel("b", fill_kernel(right, 1.0))
    verify_program(p.program(out))


def test_accepts_an_index_whose_terms_depend_on_one_another() -> None:
    # interval arithmetic alone would allow 15 here; the largest value is 11
    index = X0 - Mod(X0, 4) + Mod(X0, 4)
    load = Load("a", 4 * sympy.floor(0) + index, F32)
    verify_kernel(
        Kernel((Range(X0, 12),), (), (load,), (Store("b", X0, 0, F32),)),
        {n: Buffer(n, 48, F32, "cpu", BufferKind.TEMPORARY) for n in "ab"},
    )


def test_accepts_a_kernel_over_nothing() -> None:
    p = ProgramBuilder()
    p.kernel("fill", fill_kernel(out := p.buffer("out", (0, 4)), 0.0))
    verify_program(p.program(out))


# -- kernels ------------------------------------------------------------------------------------------------------


def test_operand_after_its_user() -> None:
    rejects_kernel(sixteen(Call("neg", (1,), F32), Load("a", X0, F32)), "v0 uses v1", "not before")


def test_operand_that_does_not_exist() -> None:
    rejects_kernel(sixteen(Load("a", X0, F32), store=Store("b", X0, 3, F32)), "'b'", "v3")


def test_unknown_function_and_arity() -> None:
    rejects_kernel(sixteen(Load("a", X0, F32), Call("frobnicate", (0,), F32)), "unknown function 'frobnicate'")
    rejects_kernel(sixteen(Load("a", X0, F32), Call("add", (0,), F32)), "add takes 2 operands, not 1")


def test_comparison_that_is_not_bool() -> None:
    rejects_kernel(sixteen(Load("a", X0, F32), Call("lt", (0, 0), F32)), "lt gives bool")


def test_condition_and_mask_that_are_not_bool() -> None:
    a = Load("a", X0, F32)
    rejects_kernel(sixteen(a, Call("where", (0, 0, 0), F32)), "condition v0")
    rejects_kernel(sixteen(a, Load("a", X0, F32, mask=0)), "mask v0")
    rejects_kernel(sixteen(a, store=Store("b", X0, 0, F32, mask=0)), "mask v0")


def test_a_checked_index_takes_positions() -> None:
    a = Load("a", X0, F32)
    rejects_kernel(sixteen(a, Call("checked_index", (0, 0), torch.int64)), "takes a position and a size of int64")


def test_reduction_without_a_row() -> None:
    rejects_kernel(sixteen(Load("a", X0, F32), Reduce("sum", (0,), F32)), "no row range")


def test_reduction_with_too_few_operands() -> None:
    load = Load("a", 4 * X0 + R0, F32)
    rejects_kernel(sixteen(load, Reduce("argmax", (0,), F32), row=True), "argmax takes 2 operands, not 1")


def test_items() -> None:
    load = Load("a", 4 * X0 + R0, F32)
    welford = Reduce("welford", (0,), F32)
    once = Store("b", X0, 2, F32)
    rejects_kernel(sixteen(load, Item(0, 0, F32), row=True), "item 0 of v0, which has one result")
    rejects_kernel(sixteen(load, welford, Item(1, 3, F32), store=once, row=True), "item 3 of v1, which has 3")
    rejects_kernel(sixteen(load, welford, Call("neg", (1,), F32), store=once, row=True), "without an Item")
    rejects_kernel(sixteen(load, welford, store=Store("b", X0, 1, F32), row=True), "without an Item")


def test_ranges() -> None:
    load = Load("a", X0, F32)
    store = Store("b", X0, 0, F32)
    rejects_kernel(Kernel((Range(X0, 16), Range(X0, 1)), (), (load,), (store,)), "two ranges", "x0")
    rejects_kernel(Kernel((Range(X0, -1),), (), (load,), (store,)), "size -1")
    s = sympy.Symbol("s9", integer=True, positive=True)
    rejects_kernel(Kernel((Range(X0, s),), (), (load,), (store,)), "s9", "no size symbol")


def test_symbols_of_an_index() -> None:
    rejects_kernel(sixteen(Load("a", X1, F32)), "range symbol x1")
    rejects_kernel(sixteen(Load("a", sympy.Symbol("s3"), F32)), "symbol s3", "no size symbol")
    floating = Load("a", value_symbol(0), F32)
    rejects_kernel(sixteen(Load("a", X0, F32), floating), "indexed by v0", "float32")
    rejects_kernel(sixteen(Index(X0, F32)), "index of dtype")


def test_stores_nothing() -> None:
    rejects_kernel(Kernel((Range(X0, 16),), (), (Load("a", X0, F32),), ()), "stores nothing")


def test_unknown_buffer_and_dtype() -> None:
    rejects_kernel(sixteen(Load("q", X0, F32)), "'q', which does not exist")
    rejects_kernel(sixteen(Load("a", X0, torch.float64)), "'a' as torch.float64")


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (X0 + 1, "element 16 of 'a'"),
        (X0 - 1, "element -1 of 'a'"),
        (2 * X0, "element 30"),
        (7 * Mod(X0, 8), "element 49"),
    ],
)
def test_out_of_bounds(index: sympy.Expr, found: str) -> None:
    rejects_kernel(sixteen(Load("a", index, F32)), found, "16", "64 bytes", "x0=")


def test_store_out_of_bounds() -> None:
    load = Load("a", X0, F32)
    rejects_kernel(sixteen(load, store=Store("b", X0 + 4, 0, F32)), "it writes element 19 of 'b'")


def test_masked_access_may_have_any_index() -> None:
    nodes = (Index(X0), Constant(4, torch.int64), Call("lt", (0, 1), torch.bool), Load("a", 8 * X0, F32, mask=2))
    buffers = {n: Buffer(n, 64, F32, "cpu", BufferKind.TEMPORARY) for n in "ab"}
    verify_kernel(sixteen(*nodes), buffers)


def test_several_points_set_one_element() -> None:
    load = Load("a", X0, F32)
    rejects_kernel(sixteen(load, store=Store("b", sympy.Integer(3), 0, F32)), "all 16 points along x0", "'b'")
    two = Kernel((Range(X0, 4), Range(X1, 4)), (), (Load("a", X0, F32),), (Store("b", X0 + X1, 0, F32),))
    rejects_kernel(two, "two points set element 1 of 'b'")
    atomic = replace(two, stores=(Store("b", X0 + X1, 0, F32, StoreMode.ADD),))
    verify_kernel(atomic, {n: Buffer(n, 64, F32, "cpu", BufferKind.TEMPORARY) for n in "ab"})


def test_row_value_set_at_one_element() -> None:
    load = Load("a", 4 * X0 + R0, F32)
    rejects_kernel(sixteen(load, store=Store("b", X0, 0, F32), row=True), "all 4 points along r0")


# -- programs -----------------------------------------------------------------------------------------------------


def small() -> tuple[ProgramBuilder, View]:
    p = ProgramBuilder()
    return p, p.input("x", (4, 4))


def test_buffer_facts() -> None:
    p, x = small()
    program = p.program(x)
    good = program.buffers["x"]

    def with_buffer(key: str, b: Buffer) -> Program:
        return replace(program, buffers={**program.buffers, key: b})

    rejects(with_buffer("y", good), "buffer 'x' is held under the name 'y'")
    rejects(with_buffer("x", replace(good, nbytes=-4)), "'x' has -4 bytes")
    rejects(with_buffer("x", replace(good, alignment=48)), "alignment 48")
    rejects(with_buffer("y", replace(good, name="y", kind=BufferKind.TEMPORARY, donated=True)), "donated", "temporary")
    rejects(with_buffer("x", replace(good, zero_fill=True)), "'x' is external", "zeros")
    rejects(with_buffer("x", replace(good, nbytes=4 * sympy.Symbol("s1"))), "s1", "no hint")
    rejects(with_buffer("y", replace(good, name="y")), "'y' is external", "neither an input nor a constant")


def test_inputs() -> None:
    p, x = small()
    program = p.program(x)
    again = TensorInput(0, x)
    rejects(replace(program, inputs=(*program.inputs, again)), "two inputs have position 0")
    ghost = TensorInput(1, replace(x, buffer="ghost"))
    rejects(replace(program, inputs=(*program.inputs, ghost)), "'ghost', which does not exist")
    rejects(replace(program, outputs=(View("ghost", F32, (4,), (1,)),)), "output 0 names the buffer 'ghost'")
    p.symbol("s0", 3)
    rejects(replace(p.program(x), hints={}), "symbol s0", "no hint")
    q, x = small()
    t = q.buffer("t", (4, 4))
    q.inputs.append(TensorInput(1, t))
    rejects(q.program(x), "input 1 is the buffer 't'", "temporary")


def test_views() -> None:
    p, x = small()
    rejects(p.program(replace(x, offset=1)), "output 0 reaches byte 68 of 'x', which has 64")
    rejects(p.program(replace(x, strides=(4,))), "2 sizes, 1 strides")
    rejects(p.program(replace(x, offset=-1)), "negative")
    rejects(p.program(replace(x, sizes=(4, sympy.Symbol("s8")))), "s8", "no hint")
    p.extern("neg", "aten.neg.default", (replace(x, offset=2),), (4, 4))
    rejects(p.program(), "'neg'", "reaches byte 72 of 'x'", "model.py:1")


def test_names() -> None:
    p, x = small()
    p.pointwise("a", "neg", x)
    p.pointwise("b", "neg", x)
    twice = replace(p.operations[1], name="a")
    rejects(replace(p.program(), operations=(p.operations[0], twice)), "operation 'a'", "same name")
    del p.buffers["b"]
    rejects(p.program(), "operation 'b'", "'b', which does not exist")


def test_read_before_it_is_written() -> None:
    p, _ = small()
    t = p.buffer("t", (4, 4))
    p.pointwise("early", "neg", t)
    rejects(p.program(), "'early'", "reads 't' (64 bytes), which nothing before it writes", "model.py:1")


def test_what_is_filled_with_zeros_may_be_read() -> None:
    p, _ = small()
    t = p.buffer("t", (4, 4), zero_fill=True)
    verify_program(replace(p.program(p.pointwise("y", "neg", t))))


def test_a_workspace_is_its_templates_alone() -> None:
    p, _ = small()
    t = p.buffer("t", (4, 4), BufferKind.WORKSPACE, zero_fill=True)
    rejects(p.program(p.pointwise("y", "neg", t)), "'t', which is not its own, and nobody promises to leave it zero")


def test_what_the_user_left_empty_may_be_read() -> None:
    p, x = small()
    t = p.buffer("t", (4, 4), origin=Origin(node="empty_like"))
    p.extern("put", "aten.add_.Tensor", (t, x), contract=Contract.MUTATE, mutates=("t",))
    verify_program(p.program(t))


def test_size_used_before_the_call_that_makes_it_known() -> None:
    p, x = small()
    u = sympy.Symbol("u0", integer=True, nonnegative=True)
    p.hints[u] = 3
    early = p.extern("early", "aten.zeros.default", ([u],), (u,))
    p.extern("nonzero", "aten.nonzero.default", (x,), (u, 2), contract=Contract.DYNAMIC, dtype=torch.int64)
    definer = p.operations[1]
    assert isinstance(definer, Extern)
    p.operations[1] = replace(definer, symbols=(("[0].size(0)", u),))
    rejects(p.program(early), "'early'", "size u0, which 'nonzero' defines later")
    p.operations.reverse()
    verify_program(p.program(early))


def test_kernel_over_a_size_that_is_not_known_yet() -> None:
    p, x = small()
    u = sympy.Symbol("u0", integer=True, nonnegative=True)
    p.hints[u] = 3
    p.kernel("early", fill_kernel(p.buffer("f", (u,)), 0.0))
    p.extern("nonzero", "aten.nonzero.default", (x,), (u, 2), contract=Contract.DYNAMIC, dtype=torch.int64)
    definer = p.operations[1]
    assert isinstance(definer, Extern)
    p.operations[1] = replace(definer, symbols=(("[0].size(0)", u),))
    rejects(p.program(), "'early'", "size u0, which 'nonzero' defines later")


def test_undeclared_write_of_an_input() -> None:
    p, x = small()
    p.kernel("fill", fill_kernel(x, 0.0))
    rejects(p.program(), "'fill'", "writes 'x', which is external (input), without declaring it")
    p.operations.clear()
    p.kernel("fill", fill_kernel(x, 0.0), mutates=("x",))
    verify_program(p.program())


def test_constant_changed() -> None:
    p = ProgramBuilder()
    c = p.buffer("c", (4,), BufferKind.CONSTANT)
    p.kernel("fill", fill_kernel(c, 0.0), mutates=("c",))
    rejects(replace(p.program(), constants={"c": torch.zeros(4)}), "'fill'", "changes the constant 'c'")


def test_written_afresh_after_a_mutation() -> None:
    p, x = small()
    y = p.pointwise("y", "neg", x)
    p.copy("change", x, y)
    p.pointwise("again", "neg", x, into=y)
    rejects(p.program(y), "'again'", "writes 'y' afresh, after 'change' changed it")


def test_parts_that_meet() -> None:
    p, x = small()
    out = p.buffer("out", (4, 6))
    p.pointwise("left", "neg", x, into=View("out", F32, (4, 4), (6, 1)))
    p.pointwise("right", "neg", x, into=View("out", F32, (4, 4), (6, 1), 2))
    rejects(p.program(out), "'right'", "writes 'out', and 'left' writes some of the same elements", "model.py:2")


def test_fresh_allocation_written_by_another() -> None:
    p, x = small()
    y = p.extern("y", "aten.neg.default", (x,), (4, 4))
    p.kernel("fill", fill_kernel(y, 0.0))
    rejects(p.program(y), "'fill'", "'y' allocates 'y' itself")


def test_kernel_declarations() -> None:
    p, x = small()
    p.pointwise("y", "neg", x)
    p.operations[0] = replace(p.operations[0], mutates=("x",))
    rejects(p.program(), "'y'", "declares that it changes 'x', but stores nothing there")
    p, x = small()
    flipped = View("x", F32, (4, 4), (1, 4))
    p.pointwise("t", "neg", flipped, into=x, mutates=True)
    rejects(p.program(), "'t'", "races with itself in 'x'", "is written at")
    p, x = small()
    out = p.buffer("out", (4, 4))
    kernel = pointwise_kernel("neg", [x], out)
    p.kernel("scatter", replace(kernel, stores=(replace(kernel.stores[0], mode=StoreMode.ADD),)))
    rejects(p.program(out), "atomic add goes to 'out', which holds no value yet")
    p.buffers["out"] = replace(p.buffers["out"], zero_fill=True)
    verify_program(p.program(out))


def test_kernel_on_another_device() -> None:
    p, x = small()
    p.pointwise("y", "neg", x)
    p.buffers["x"] = replace(p.buffers["x"], device="cuda:0")
    rejects(p.program(), "runs on cpu, and 'x' is on cuda:0")


def test_kernels_are_checked_within_a_program() -> None:
    p, x = small()
    p.kernel("bad", replace(pointwise_kernel("neg", [x], p.buffer("y", (4, 4))), stores=()))
    rejects(p.program(), "kernel 'bad'", "stores nothing", "model.py:1")


def test_extern_contracts() -> None:
    p, x = small()
    y = p.buffer("y", (4, 4))
    p.extern("alias", "aten.view.default", (x,), contract=Contract.ALIAS, result=y)
    rejects(p.program(), "'alias'", "alias of 'y', which it is not given")
    p.operations.clear()
    p.extern("zero_", "aten.zero_.default", (x,), contract=Contract.MUTATE, mutates=("x",), result=y)
    rejects(p.program(), "'zero_'", "only changes its arguments, yet returns 'y'")
    p.operations.clear()
    p.extern("hop", "callable:hop", (x,), (4, 4))
    rejects(p.program(), "'callable:hop' is not among the program's callables")
    p.operations.clear()
    p.extern("neg", "aten.neg.default", (x,), (4, 4), scratch=-1)
    rejects(p.program(), "'neg'", "-1 bytes of scratch")
    p.operations.clear()
    p.extern("change", "aten.zero_.default", (), contract=Contract.MUTATE, mutates=("x",))
    rejects(p.program(), "declares that it changes 'x', which it is not given")


def test_call_that_writes_over_what_it_reads() -> None:
    p, x = small()
    w = p.input("w", (4, 4))
    p.extern("mm", "aten.mm.out", (w, w), contract=Contract.OUT, mutates=("x",), result=x)
    verify_program(p.program())
    p.operations.clear()
    p.extern("mm", "aten.mm.out", (x, w), contract=Contract.OUT, mutates=("x",), result=x)
    rejects(p.program(), "'mm'", "changes 'x' and names it twice")


def test_changed_argument_named_twice() -> None:
    p, x = small()
    index = p.input("index", (4,), dtype=torch.int64)
    arguments = (x, [index], x)
    p.extern("put", "aten.index_put_.default", arguments, contract=Contract.MUTATE, mutates=("x",))
    rejects(p.program(), "'put'", "changes 'x' and names it twice")
    p.operations.clear()
    p.extern("add", "aten.add_.Tensor", (x, x), contract=Contract.MUTATE, mutates=("x",))
    verify_program(p.program())
    p.operations.clear()
    halves = [View("x", F32, (2, 4), contiguous((2, 4)), 8 * k) for k in range(2)]
    p.extern(
        "put", "aten.index_put_.default", (halves[0], [index], halves[1]), contract=Contract.MUTATE, mutates=("x",)
    )
    verify_program(p.program())


def test_copies() -> None:
    p, x = small()
    y = p.input("y", (4,))
    p.copy("copy", x, y)
    rejects(p.program(), "'copy'", "'x' of shape (4, 4) to 'y' of shape (4,)")
    p.operations.clear()
    p.copy("shift", View("x", F32, (3, 4), (4, 1)), View("x", F32, (3, 4), (4, 1), 4))
    rejects(p.program(), "copies 'x' onto itself, to elements that it still reads")
    p.operations.clear()
    p.copy("copy", x, p.input("z", (4, 4)))
    p.operations[0] = replace(p.operations[0], mutates=("x", "z"))
    rejects(p.program(), "declares that it changes 'x', but copies to 'z'")


def test_outputs() -> None:
    p, x = small()
    y = p.pointwise("y", "neg", x)
    program = p.program(y)
    temporary = {**program.buffers, "y": replace(program.buffers["y"], kind=BufferKind.TEMPORARY)}
    rejects(replace(program, buffers=temporary), "output 0 is 'y', which is temporary", "outlive")
    never = ProgramBuilder()
    rejects(never.program(never.buffer("n", (4,))), "output 0 is 'n', which nothing writes")


def test_messages_name_the_users_line() -> None:
    p, x = small()
    p.pointwise("a", "neg", x)
    p.pointwise("late", "neg", p.buffer("t", (4, 4)))
    with pytest.raises(VerificationError) as caught:
        verify_program(p.program())
    assert re.search(r"operation 'late'.*\n  at model\.py:2", str(caught.value))


def test_what_was_accepted_is_checked_again_where_it_changed() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    program = p.program(p.pointwise("op", "neg", x))
    verifier = ProgramVerifier()
    verifier(program)
    (made,) = program.operations[0].writes
    short = {**program.buffers, made: replace(program.buffers[made], nbytes=32)}
    with pytest.raises(VerificationError, match="it writes element 12"):
        verifier(replace(program, buffers=short))
    with pytest.raises(VerificationError, match="which nothing writes"):
        verifier(replace(program, operations=()))
