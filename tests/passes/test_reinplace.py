"""Clone elimination: what functionalisation made of mutation is mutation again, and only where that is safe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from memplan.capture.fx import HigherOrderCall
from memplan.ir.program import BufferKind, Contract, Copy, Extern, View
from memplan.ir.verify import verify_program
from memplan.passes.reinplace import Reinplace
from tests.passes.reinplaced import names, notes, reinplaced
from tests.programs import F32, ProgramBuilder, fill_kernel

I64 = torch.int64


@dataclass
class Cache:
    """``t = index_put(x, [i], v)`` and what a test adds."""

    p: ProgramBuilder
    x: View
    i: View
    v: View

    @classmethod
    def new(cls, kind: BufferKind = BufferKind.INPUT, *, donated: bool = False) -> Cache:
        p = ProgramBuilder()
        x = p.input("x", (8, 4), kind=kind, donated=donated)
        return cls(p, x, p.input("i", (2,), dtype=I64), p.input("v", (2, 4)))

    def put(self, name: str, base: View, values: View | None = None) -> View:
        arguments = (base, [self.i], values or self.v)
        return self.p.extern(name, "aten.index_put.default", arguments, base.sizes)


def test_chain_of_updates_of_an_input() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", a)
    b = c.put("b", a)
    c.p.copy("back", b, c.x)
    after = reinplaced(c.p.program(y))
    assert names(after) == ["a", "y", "b"]
    assert all(op.mutates == ("x",) for op in after.operations if op.name != "y")
    assert after.operations[1].reads == ("x",)


def test_a_reader_of_the_old_value_keeps_the_clone() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", c.x)
    c.p.copy("back", a, c.x)
    program = c.p.program(y)
    after = reinplaced(program)
    assert names(after) == names(program)
    assert "a: the clone of 'x' stays: 'y' (model.py:2) uses 'x' as it was" in notes(after)


def test_an_earlier_reader_does_not() -> None:
    c = Cache.new()
    y = c.p.pointwise("y", "neg", c.x)
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    assert names(reinplaced(c.p.program(y))) == ["y", "a"]


def test_values_from_an_overlapping_view_keep_the_clone() -> None:
    c = Cache.new()
    a = c.put("a", c.x, View("x", F32, (2, 4), (4, 1), 4))
    c.p.copy("back", a, c.x)
    after = reinplaced(c.p.program())
    assert "'a' (model.py:1) uses 'x' as it was" in notes(after)


def test_an_input_that_is_not_changed_is_not_changed() -> None:
    c = Cache.new()
    after = reinplaced(c.p.program(c.put("a", c.x)))
    assert "is returned, and may not be the caller's" in notes(after)
    c = Cache.new()
    after = reinplaced(c.p.program(c.p.pointwise("y", "neg", c.put("a", c.x))))
    assert "the caller keeps 'x', which is not changed" in notes(after)


def test_constants_are_not_changed() -> None:
    p = ProgramBuilder()
    k = p.buffer("k", (8, 4), BufferKind.CONSTANT)
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (k, [i], v), (8, 4))
    program = replace(p.program(p.pointwise("y", "neg", a)), constants={"k": torch.randn(8, 4)})
    assert "'k' is a constant" in notes(reinplaced(program))


def test_donated_inputs_and_temporaries_are_changed() -> None:
    c = Cache.new(donated=True)
    after = reinplaced(c.p.program(c.p.pointwise("y", "neg", c.put("a", c.x))))
    assert names(after) == ["a", "y"]
    c = Cache.new()
    t = c.p.pointwise("t", "neg", c.x)
    after = reinplaced(c.p.program(c.put("a", t)))
    assert names(after) == ["t", "a"]
    assert [o.buffer for o in after.outputs if isinstance(o, View)] == ["t"]
    assert after.buffers["t"].kind is BufferKind.OUTPUT


def test_a_temporary_that_is_returned_keeps_its_value() -> None:
    c = Cache.new()
    t = c.p.pointwise("t", "neg", c.x)
    after = reinplaced(c.p.program(c.put("a", t), t))
    assert "'t' is returned as it was" in notes(after)


def test_the_new_value_used_when_the_input_changes_again() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    c.p.kernel("fill", fill_kernel(c.x, 0.0), mutates=("x",))
    y = c.p.pointwise("y", "neg", a)
    assert "'a' is still used when 'fill' (model.py:3) changes 'x'" in notes(reinplaced(c.p.program(y)))


def test_the_clone_changed_after_it_was_copied_back() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    c.p.kernel("fill", fill_kernel(a, 0.0), mutates=("a",))
    y = c.p.pointwise("y", "neg", a)
    assert "'fill' (model.py:3) changes 'a' after it was copied back" in notes(reinplaced(c.p.program(y)))


def test_overwritten_by_something_else() -> None:
    """The input's bytes are free until it is overwritten in full; not if the clone is still used then."""
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", a)
    c.p.copy("back", y, c.x)
    assert names(reinplaced(c.p.program())) == ["a", "y", "back"]
    z = c.p.pointwise("z", "neg", a)
    assert "'a' is still used when 'back'" in notes(reinplaced(c.p.program(z)))
    c = Cache.new()
    a = c.put("a", c.x)
    half = View("a", F32, (4, 4), (4, 1))
    c.p.copy("back", half, View("x", F32, (4, 4), (4, 1), 16))
    assert "copies it back to another place" in notes(reinplaced(c.p.program(c.p.pointwise("y", "neg", a))))


def test_every_other_row_overwritten_is_not_all_of_it() -> None:
    """The rows in between keep what the caller had there: the clone, which changes them, stays."""
    p = ProgramBuilder()
    x, i, v = p.input("x", (5, 4)), p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (x, [i], v), (5, 4))
    y = p.pointwise("y", "neg", a)
    every_other = View("x", F32, (3, 4), (8, 1))
    p.copy("back", View("y", F32, (3, 4), (4, 1)), every_other)
    assert "'back' (model.py:3) writes a part of 'x'" in notes(reinplaced(p.program(y)))


def test_a_row_of_an_input() -> None:
    """``x[3].index_put_(...)``: the clone of the row, changed, copied back to the row."""
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    row = View("x", F32, (4,), (1,), 12)
    a = p.extern("a", "aten.index_put.default", (row, [i], v), (4,))
    p.copy("back", a, row)
    y = p.pointwise("y", "neg", a)
    after = reinplaced(p.program(y))
    assert names(after) == ["a", "y"]
    changed = after.operations[0]
    assert isinstance(changed, Extern)
    assert changed.args[0] == row


def test_a_column_of_an_input() -> None:
    """The clone is dense, the column is not: every access gets the column's stride."""
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    column = View("x", F32, (8,), (4,), 1)
    a = p.extern("a", "aten.index_put.default", (column, [i], v), (8,))
    y = p.pointwise("y", "neg", View("a", F32, (2, 2), (4, 2), 1))
    p.copy("back", a, column)
    after = reinplaced(p.program(y))
    assert names(after) == ["a", "y"]
    assert after.operations[0].args[0] == column  # type: ignore[union-attr]


def test_a_part_of_a_temporary_is_cloned() -> None:
    """A row that outlives a large temporary would keep all of it."""
    p = ProgramBuilder()
    x = p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    p.pointwise("t", "neg", x)
    a = p.extern("a", "aten.index_put.default", (View("t", F32, (4,), (1,), 12), [i], v), (4,))
    assert "it is a part of 't', which would be kept for it" in notes(reinplaced(p.program(a)))


def test_a_clone_that_is_only_read_is_left_to_fusion() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    c = p.extern("c", "aten.clone.default", (t,), (4, 4))
    program = p.program(p.pointwise("y", "neg", c))
    after = reinplaced(program)
    assert after is program


def test_clone_in_another_layout() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    p.pointwise("t", "neg", x)
    p.buffer("c", (4, 4))
    c = View("c", F32, (4, 4), (1, 4))
    p.extern("c", "aten.clone.default", (View("t", F32, (4, 4), (4, 1)),), result=c)
    p.kernel("fill", fill_kernel(View("c", F32, (4,), (1,)), 0.0), mutates=("c",))
    after = reinplaced(p.program(p.pointwise("y", "neg", c)))
    assert names(after) == ["t", "fill", "y"]


def test_reshaped_use_that_the_old_place_cannot_show() -> None:
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 2))
    half = View("x", F32, (8, 2), (4, 1))
    a = p.extern("a", "aten.index_put.default", (half, [i], v), (8, 2))
    flat = p.extern("flat", "aten.neg.default", (View("a", F32, (16,), (1,)),), (16,))
    p.copy("back", a, half)
    assert "uses it in a layout that 'x' does not have" in notes(reinplaced(p.program(flat)))


def test_symbolic_sizes() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 6)
    x = p.input("x", (s, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (x, [i], v), (s, 4))
    p.copy("back", a, x)
    assert names(reinplaced(p.program())) == ["a"]


def test_in_place_collective() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4,)))
    r = p.extern("r", "_c10d_functional.all_reduce.default", (t, "sum", "0"), (4,), effect=True)
    after = Reinplace().run(p.program(r))
    verify_program(after)
    op = after.operations[-1]
    assert isinstance(op, Extern)
    assert (op.target, op.mutates) == ("_c10d_functional.all_reduce_.default", ("t",))


def test_a_users_triton_kernel_changes_its_tensors() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import (
        triton_kernel_wrapper_functional,
        triton_kernel_wrapper_mutation,
    )

    p = ProgramBuilder()
    x, y = p.input("x", (4,)), p.input("y", (4,))
    t = p.pointwise("t", "neg", x)
    keywords = {
        "kernel_idx": 0, "constant_args_idx": 0, "grid": [(1,)], "tma_descriptor_metadata": {},
        "kwargs": {"a": "x", "out": "t"}, "tensors_to_clone": ["out"],
    }  # fmt: skip
    leaves, spec = pytree.tree_flatten(((), keywords))
    slots = (leaves.index("x"), leaves.index("t"))
    template = tuple(None if k in slots else v for k, v in enumerate(leaves))
    call = HigherOrderCall(triton_kernel_wrapper_functional, template, spec, slots, (0, 0))
    r = p.extern("r", "callable:r", (y, t), (4,))
    program = replace(p.program(r), callables={"r": call})
    after = Reinplace().run(program)
    verify_program(after)
    op = after.operations[-1]
    assert isinstance(op, Extern)
    assert (op.contract, op.mutates, op.args) == (Contract.MUTATE, ("t",), (y, t))
    made = after.callables[op.target.removeprefix("callable:")]
    assert isinstance(made, HigherOrderCall)
    assert made.operator is triton_kernel_wrapper_mutation
    restored = list(made.template)
    for slot, value in zip(made.slots, ("y", "t"), strict=True):
        restored[slot] = value
    _, given = pytree.tree_unflatten(restored, made.spec)
    assert given["kwargs"] == {"a": "y", "out": "t"}
    assert "tensors_to_clone" not in given


Step = tuple[str, int, int]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "clone_fill", "neg", "row", "back", "backrow", "add"]),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=9,
    ),
    st.booleans(),
)
def test_random_programs_mean_the_same(steps: list[Step], donated: bool) -> None:
    p = ProgramBuilder()
    x, d = p.input("x", (4, 4)), p.input("d", (4, 4), donated=donated)
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    values = [x, d]
    for k, (kind, first, second) in enumerate(steps):
        a, b = values[first % len(values)], values[second % len(values)]
        name = f"t{k}"
        match kind:
            case "put":
                values.append(p.extern(name, "aten.index_put.default", (a, [i], v), (4, 4)))
            case "clone_fill":
                values.append(p.extern(name, "aten.clone.default", (a,), (4, 4)))
                part = View(name, F32, (2, 4), (4, 1), 4)
                p.pointwise(f"{name}_part", "neg", View(b.buffer, F32, (2, 4), (4, 1)), into=part, mutates=True)
            case "row":
                row = View(a.buffer, F32, (4,), (1,), 4)
                part = p.extern(name, "aten.index_put.default", (row, [i], View("v", F32, (2,), (1,))), (4,))
                p.copy(f"{name}_back", part, row)
            case "back":
                p.copy(name, b, x)
            case "backrow":
                p.copy(name, View(b.buffer, F32, (4,), (1,), 4 * (first % 4)), View("x", F32, (4,), (1,), 8))
            case "neg":
                values.append(p.pointwise(name, "neg", a))
            case _:
                values.append(p.pointwise(name, "add", a, b))
    if any(isinstance(op, Copy) and op.source.buffer == op.target.buffer for op in p.operations):
        return
    leaving = [u for u in (values[-1], values[len(values) // 2]) if u.buffer not in ("x", "d")]
    reinplaced(p.program(*leaving))
