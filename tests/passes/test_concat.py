"""Concatenation without copies: parts are written where they belong, and only where memory and layouts allow it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.program import BufferKind, Contract, Extern, Program, View
from memplan.ir.verify import verify_program
from memplan.passes.concat import Concat, SingleStore
from memplan.passes.schedule import make_plan
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.programs import F32, ProgramBuilder, fill_kernel, pointwise_kernel


def concatenated(program: Program, kind: Concat | SingleStore = Concat()) -> Program:  # noqa: B008
    """The pass's result: verified, equal in value, and with no higher peak."""
    verify_program(program)
    after = kind.run(program)
    verify_program(after)
    given = make_inputs(program)
    first, second = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, first), run_program(after, second)
    for a, b in zip([*expected, *first], [*found, *second], strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)
    assert peak(after) <= peak(program)
    return after


def peak(program: Program) -> int:
    return make_plan(program, [op.name for op in program.operations], in_place={}).certificate.peak


def names(program: Program) -> list[str]:
    return [op.name for op in program.operations]


def notes(program: Program) -> str:
    return "\n".join(f"{name}: {text}" for name, text in program.notes)


def cat(p: ProgramBuilder, name: str, parts: list[View], dim: int) -> View:
    """One copy per part, as kernels or as copies in turn, the way lowering makes them."""
    sizes = list(parts[0].sizes)
    sizes[dim] = sum(int(v.sizes[dim]) for v in parts)
    whole = p.buffer(name, sizes)
    start = 0
    for k, part in enumerate(parts):
        piece = replace(whole, sizes=part.sizes, offset=start * int(whole.strides[dim]))
        if k % 2:
            p.copy(f"{name}{k}", part, piece, fresh=True)
        else:
            kernel = pointwise_kernel("neg", [part], piece)
            plain = replace(kernel, nodes=kernel.nodes[:1], stores=(replace(kernel.stores[0], value=0),))
            p.kernel(f"{name}{k}", plain)
        start += int(part.sizes[dim])
    return whole


@pytest.mark.parametrize("dim", [0, 1])
def test_kernels_write_their_slices(dim: int) -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    a, b = p.pointwise("a", "neg", x), p.pointwise("b", "exp", x)
    y = p.pointwise("y", "sin", a)
    whole = cat(p, "cat", [a, b], dim)
    after = concatenated(p.program(whole, y))
    assert names(after) == ["a", "b", "y"]
    assert after.by_name["a"].writes == ("cat",)
    assert after.by_name["y"].reads == ("cat",)
    assert set(after.buffers) == {"x", "cat", "y"}


def test_rows_of_a_softmax_go_to_the_slice() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    after = concatenated(p.program(cat(p, "cat", [p.softmax("a", x), p.softmax("b", x)], 1)))
    assert names(after) == ["a", "b"]


def test_matmuls_write_strided_slices() -> None:
    p = ProgramBuilder()
    x, w = p.input("x", (4, 6)), p.input("w", (6, 5))
    a = p.extern("a", "aten.mm.out", (x, w), (4, 5), contract=Contract.OUT)
    b = p.extern("b", "aten.mm.out", (x, w), (4, 5), contract=Contract.OUT)
    z = p.extern("z", "aten.mm.out", (a, p.input("v", (5, 3))), (4, 3), contract=Contract.OUT)
    after = concatenated(p.program(cat(p, "cat", [a, b], 1), z))
    assert names(after) == ["a", "b", "z"]
    op = after.by_name["b"]
    assert isinstance(op, Extern)
    assert op.results == (View("cat", F32, (4, 5), (10, 1), 5),)
    reader = after.by_name["z"]
    assert isinstance(reader, Extern)
    assert reader.args[0] == View("cat", F32, (4, 5), (10, 1), 0)


def test_calls_that_allocate_their_result_stay() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    a = p.extern("a", "aten.neg.default", (x,), (4, 6), contract=Contract.FRESH)
    after = concatenated(p.program(cat(p, "cat", [a, p.pointwise("b", "neg", x)], 1)))
    assert names(after) == ["a", "b", "cat0"]
    assert "aten.neg.default ('a') allocates its own result" in notes(after)


def test_calls_that_may_not_take_strides_keep_the_part() -> None:
    for dim, stays in ((1, True), (0, False)):
        p = ProgramBuilder()
        a = p.pointwise("a", "neg", p.input("x", (4, 6)))
        y = p.extern("y", "aten.convolution.default", (a,), (4, 6))
        p.operations[-1] = replace(p.operations[-1], target="aten.relu.default")
        after = concatenated(p.program(cat(p, "cat", [a], dim) if dim == 0 else cat(p, "cat", [a, a], 1), y))
        assert ("is not known to take the strides that it would have" in notes(after)) is stays
        assert ("a" in after.buffers) is stays


def test_a_part_of_two_results_goes_to_one() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    a = p.pointwise("a", "neg", x)
    one, two = cat(p, "one", [a, a], 1), cat(p, "two", [a], 0)
    after = concatenated(p.program(one, two))
    assert "a" not in after.buffers
    assert sorted(names(after)) == ["a", "one1", "two0"]


def test_only_if_the_result_may_exist_from_then_on() -> None:
    """The first part is made early, the result is large, and something else is large in between."""

    def build(between: int) -> Program:
        p = ProgramBuilder()
        x = p.input("x", (4, 16))
        a = p.pointwise("a", "neg", x)
        p.kernel("large", fill_kernel(p.buffer("large", (between,)), 1.0))
        s = p.pointwise("s", "neg", View("large", F32, (4,), (1,)))
        b = p.buffer("b", (4, 240))
        p.kernel("b", fill_kernel(b, 2.0))
        return p.program(cat(p, "cat", [a, b], 1), s)

    assert names(concatenated(build(16))) == ["a", "large", "s", "b"]
    after = concatenated(build(2000))
    assert "a" in after.buffers
    assert "'cat' would exist from 'a' (model.py:1) on" in notes(after)
    assert "the peak is" in notes(after)
    assert "b" not in after.buffers  # made late: it goes to its slice


def test_what_stays_a_buffer() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    a = p.pointwise("a", "neg", x)
    assert "cat0" in names(concatenated(p.program(cat(p, "cat", [a], 0), a)))  # returned by itself
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    assert "cat0" in names(concatenated(p.program(cat(p, "cat", [x], 0))))  # the caller's
    p = ProgramBuilder()
    p.pointwise("a", "neg", p.input("x", (4, 6)))
    half = cat(p, "cat", [View("a", F32, (4, 3), (6, 1))], 0)
    assert "only a part of 'a' is copied" in notes(concatenated(p.program(half)))


def test_a_part_with_gaps() -> None:
    """Only what is written of it counts: rows of 3 in a buffer laid out for 8."""
    p = ProgramBuilder()
    x = p.input("x", (2, 3))
    p.buffers["a"] = replace(p.buffers["x"], name="a", nbytes=44, kind=BufferKind.TEMPORARY)
    a = View("a", F32, (2, 3), (8, 1))
    p.pointwise("a", "neg", x, into=a)
    assert names(concatenated(p.program(cat(p, "cat", [a], 0)))) == ["a"]
    p = ProgramBuilder()
    p.pointwise("a", "neg", p.input("x", (2, 6)))
    every_other = View("a", F32, (2, 3), (6, 2))
    y = p.pointwise("y", "neg", View("a", F32, (2, 3), (6, 2), 1))
    assert "only a part of 'a' is copied" in notes(concatenated(p.program(cat(p, "cat", [every_other], 0), y)))


def test_what_changes_later() -> None:
    p = ProgramBuilder()
    a = p.pointwise("a", "neg", p.input("x", (4, 6)))
    p.kernel("fill", fill_kernel(View("a", F32, (6,), (1,)), 0.0), mutates=("a",))
    whole = cat(p, "cat", [a], 0)
    assert "'fill' (model.py:2) changes it" in notes(concatenated(p.program(whole)))
    p = ProgramBuilder()
    a = p.pointwise("a", "neg", p.input("x", (4, 6)))
    whole = cat(p, "cat", [a], 0)
    p.kernel("fill", fill_kernel(whole, 0.0), mutates=("cat",))
    y = p.pointwise("y", "neg", a)
    assert "'fill' (model.py:3) changes 'cat' while it is still read" in notes(concatenated(p.program(whole, y)))


def test_an_input_that_its_producer_reads_is_left_to_fusion() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    a = p.pointwise("a", "neg", x)
    p.copy("back", a, x)
    program = p.program()
    assert Concat().run(program) is program


def test_bytes_seen_as_another_type_stay() -> None:
    p = ProgramBuilder()
    a = p.pointwise("a", "neg", p.input("x", (4, 6)))
    y = p.extern("y", "aten.clone.default", (View("a", torch.int16, (48,), (1,)),), (48,), dtype=torch.int16)
    after = concatenated(p.program(cat(p, "cat", [a, a], 1), y))
    assert "'y' (model.py:2) uses it in a layout that 'cat' does not have" in notes(after)


def test_symbolic_sizes() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 6)
    x = p.input("x", (s, 4))
    a, b = p.pointwise("a", "neg", x), p.pointwise("b", "exp", x)
    p.buffer("cat", (2 * s, 4))
    p.copy("c0", a, View("cat", F32, (s, 4), (4, 1)), fresh=True)
    p.copy("c1", b, View("cat", F32, (s, 4), (4, 1), 4 * s), fresh=True)
    after = concatenated(p.program(View("cat", F32, (2 * s, 4), (4, 1))))
    assert names(after) == ["a", "b"]


# -- results that are copied to an input ------------------------------------------------------------------------------


def test_a_matmul_is_written_to_the_input_that_it_is_copied_to() -> None:
    p = ProgramBuilder()
    x, w, m = p.input("x", (4, 6)), p.input("w", (6, 5)), p.input("m", (4, 5))
    early = p.pointwise("early", "exp", m)
    a = p.extern("a", "aten.mm.out", (x, w), (4, 5), contract=Contract.OUT)
    y = p.pointwise("y", "neg", a)
    p.copy("back", a, m)
    after = concatenated(p.program(y, early))
    assert names(after) == ["early", "a", "y"]
    assert after.by_name["a"].mutates == ("m",)
    assert after.by_name["a"].writes == ()
    assert after.by_name["y"].reads == ("m",)


def test_unless_the_old_value_is_needed() -> None:
    p = ProgramBuilder()
    x, w, m = p.input("x", (4, 4)), p.input("w", (4, 4)), p.input("m", (4, 4))
    a = p.extern("a", "aten.mm.out", (x, w), (4, 4), contract=Contract.OUT)
    late = p.pointwise("late", "exp", m)
    p.copy("back", a, m)
    assert "'late' (model.py:2) needs the old value of 'm'" in notes(concatenated(p.program(late)))
    p = ProgramBuilder()
    m, w = p.input("m", (4, 4)), p.input("w", (4, 4))
    p.copy("back", p.extern("a", "aten.mm.out", (m, w), (4, 4), contract=Contract.OUT), m)
    assert "'a' (model.py:1) needs the old value of 'm'" in notes(concatenated(p.program()))
    p = ProgramBuilder()
    x, w, m = p.input("x", (4, 4)), p.input("w", (4, 4)), p.input("m", (4, 4))
    a = p.extern("a", "aten.mm.out", (x, w), (4, 4), contract=Contract.OUT)
    p.copy("back", a, m)
    p.kernel("fill", fill_kernel(m, 0.0), mutates=("m",))
    y = p.pointwise("y", "neg", a)
    assert "'fill' (model.py:3) changes 'm' while it is still read" in notes(concatenated(p.program(y)))


# -- one value stored twice -------------------------------------------------------------------------------------------


def twice(p: ProgramBuilder, name: str, source: View, *targets: View, mutates: tuple[str, ...] = ()) -> None:
    kernel = pointwise_kernel("neg", [source], targets[0])
    stores = tuple(pointwise_kernel("neg", [source], t).stores[0] for t in targets)
    p.kernel(name, replace(kernel, stores=stores), mutates)


def single(program: Program) -> Program:
    return concatenated(program, SingleStore())


def test_one_store_stands_for_both() -> None:
    p = ProgramBuilder()
    x, m = p.input("x", (4, 6)), p.input("m", (4, 6))
    t = p.buffer("t", (4, 6))
    twice(p, "k", x, t, m, mutates=("m",))
    y = p.extern("y", "aten.relu.default", (t,), (4, 6))
    after = single(p.program(y))
    assert len(after.by_name["k"].kernel.stores) == 1  # type: ignore[union-attr]
    assert after.by_name["y"].reads == ("m",)
    assert "t" not in after.buffers


def test_a_slice_stands_for_the_part() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 6))
    t, whole = p.buffer("t", (4, 6)), p.buffer("whole", (4, 12))
    twice(p, "k", x, t, replace(whole, sizes=(4, 6)))
    p.pointwise("other", "exp", x, into=replace(whole, sizes=(4, 6), offset=6))
    after = single(p.program(whole, p.pointwise("y", "exp", t)))
    assert "t" not in after.buffers


def test_both_stores_stay_where_they_differ_later() -> None:
    p = ProgramBuilder()
    x, m = p.input("x", (4, 6)), p.input("m", (4, 6))
    t = p.buffer("t", (4, 6))
    twice(p, "k", x, t, m, mutates=("m",))
    p.kernel("fill", fill_kernel(m, 0.0), mutates=("m",))
    after = single(p.program(p.pointwise("y", "exp", t)))
    assert "'fill' (model.py:2) changes 'm' while it is still read" in notes(after)
    assert "t" in after.buffers


def test_different_values_stay() -> None:
    p = ProgramBuilder()
    x, m = p.input("x", (4, 6)), p.input("m", (4, 6))
    t = p.buffer("t", (4, 6))
    kernel = pointwise_kernel("neg", [x], t)
    unchanged = replace(pointwise_kernel("neg", [x], m).stores[0], value=0)
    p.kernel("k", replace(kernel, stores=(*kernel.stores, unchanged)), ("m",))
    program = p.program(p.pointwise("y", "exp", t))
    assert SingleStore().run(program) is program


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["neg", "softmax", "mm", "fresh", "cat", "row", "twice"]),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        min_size=2,
        max_size=10,
    )
)
def test_random_programs_mean_the_same(steps: list[tuple[str, int, int]]) -> None:
    p = ProgramBuilder()
    values = [p.input("x", (4, 4))]
    wholes: list[View] = []
    for k, (kind, first, second) in enumerate(steps):
        a, b = values[-1 - first % min(3, len(values))], values[-1 - second % min(3, len(values))]
        name = f"t{k}"
        match kind:
            case "neg":
                values.append(p.pointwise(name, "maximum", a, b))
            case "softmax":
                values.append(p.softmax(name, a))
            case "mm":
                values.append(p.extern(name, "aten.mm.out", (a, b), (4, 4), contract=Contract.OUT))
            case "fresh":
                values.append(p.extern(name, "aten.neg.default", (a,), (4, 4)))
            case "row":
                values.append(p.pointwise(name, "maximum", a, View(b.buffer, F32, (4, 4), (1, 4))))
            case "twice":
                t, wide = p.buffer(name, (4, 4)), p.buffer(f"{name}_wide", (4, 8))
                twice(p, name, a, t, replace(wide, sizes=(4, 4), offset=4 * (second % 2)))
                p.kernel(f"{name}_rest", fill_kernel(replace(wide, sizes=(4, 4), offset=4 - 4 * (second % 2)), 1.0))
                wholes.append(wide)
                values.append(t)
            case _:
                whole = cat(p, name, [a, b, values[-1]], first % 2)
                wholes.append(whole)
                start = 4 if first % 2 else 16
                values.append(p.pointwise(f"{name}_read", "neg", View(name, F32, (4, 4), (whole.strides[0], 1), start)))
    program = p.program(values[-1], *wholes[:2])
    concatenated(program)
    concatenated(program, SingleStore())
