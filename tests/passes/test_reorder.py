"""Orders of whole programs: what the planner is told of them is what the plan says, and nothing gets worse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings

from memplan.ir.program import BufferKind, Contract, Program, order_edges
from memplan.ir.verify_plan import verify_plan
from memplan.passes.inplace import decide_in_place
from memplan.passes.reorder import order_graph, reorder
from memplan.passes.schedule import make_plan
from memplan.planner import planner_libraries
from tests.generated import Choice, choices, program_from
from tests.programs import ProgramBuilder

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def names(program: Program) -> list[str]:
    return [op.name for op in program.operations]


def wide_program() -> Program:
    """Four large products, each reduced to a row: best one after the other, given all products first."""
    p = ProgramBuilder()
    x, w = p.input("x", (64, 64)), p.input("w", (64, 64))
    large = [p.extern(f"mm{k}", "aten.mm.default", (x, w), (64, 64), contract=Contract.OUT) for k in range(4)]
    small = [p.extern(f"sum{k}", "aten.sum.dim_IntList", (v, [0]), (64,)) for k, v in enumerate(large)]
    total = p.pointwise("total", "add", small[0], small[1])
    rest = p.pointwise("rest", "add", small[2], small[3])
    return p.program(p.pointwise("out", "add", total, rest))


def legal(program: Program, order: tuple[str, ...]) -> bool:
    position = {n: k for k, n in enumerate(order)}
    return all(position[a] < position[b] for a, b in order_edges(program.operations))


def least_peak(program: Program) -> int:
    """The lowest peak of any order, by trying all of them."""
    orders = [o for o in itertools.permutations(names(program)) if legal(program, o)]
    return min(make_plan(program, o, in_place={}).certificate.peak for o in orders)


def test_products_are_reduced_one_after_the_other() -> None:
    program = wide_program()
    found = reorder(program, {}, None)
    assert found.program_peak == 4 * 64 * 64 * 4 + 64 * 4
    # one product, what three others left, and the row that is made of it
    assert found.peak <= 64 * 64 * 4 + 4 * 64 * 4
    assert found.lower_bound <= found.peak
    plan = make_plan(program, found.order, in_place={}, order_bound=found.lower_bound)
    verify_plan(plan)
    assert plan.certificate.peak == found.peak


def test_program_order_stays_where_nothing_is_gained() -> None:
    p = ProgramBuilder()
    x = p.input("x", (64, 64))
    a, b = p.pointwise("a", "exp", x), p.pointwise("b", "sin", x)
    program = p.program(p.pointwise("out", "add", b, a))
    assert reorder(program, {}, None).order == ("a", "b", "out")


@given(choices)
@SETTINGS
def test_the_peak_is_the_plans(steps: list[Choice]) -> None:
    program = program_from(steps, donated=True)
    assume(any("d" in op.reads for op in program.operations))
    found = reorder(program, {}, None)
    assert legal(program, found.order)
    plan = make_plan(program, found.order, in_place={}, order_bound=found.lower_bound)
    verify_plan(plan)
    given_order = make_plan(program, names(program), in_place={})
    assert (found.peak, found.program_peak) == (plan.certificate.peak, given_order.certificate.peak)
    assert found.lower_bound <= found.peak <= found.program_peak


@given(choices.filter(lambda s: len(s) <= 5))
@settings(SETTINGS, max_examples=25)
def test_the_bound_holds_for_every_order(steps: list[Choice]) -> None:
    program = program_from(steps)
    if len(program.operations) <= 6:
        found = reorder(program, {}, None)
        assert found.lower_bound <= least_peak(program) <= found.peak


@given(choices)
@settings(SETTINGS, max_examples=30)
def test_in_place_pairs_keep_their_meaning_in_another_order(steps: list[Choice]) -> None:
    program = program_from(steps, donated=True)
    pairs = decide_in_place(program, names(program))
    found = reorder(program, pairs, None)
    again = decide_in_place(program, list(found.order))
    plan = make_plan(program, found.order, in_place=again)
    verify_plan(plan)
    assert found.peak <= found.program_peak


def test_a_donated_input_is_freed_early() -> None:
    """What the backward got from the forward dies with its last reader: that reader comes first."""
    p = ProgramBuilder()
    x = p.input("x", (64,))
    given_up = p.input("saved", (64, 64), donated=True)
    late = p.extern("mm", "aten.outer.default", (x, x), (64, 64))
    kept = p.extern("row", "aten.sum.dim_IntList", (late, [0]), (64,))
    row = p.extern("saved_row", "aten.sum.dim_IntList", (given_up, [0]), (64,))
    program = p.program(p.pointwise("out", "add", kept, row))
    assert program.buffers["saved"].kind is BufferKind.INPUT
    found = reorder(program, {}, None)
    assert found.order.index("saved_row") < found.order.index("mm")
    assert found.peak == 64 * 64 * 4 + 2 * 64 * 4


def test_a_donated_input_that_nothing_reads_is_not_kept_to_the_end() -> None:
    """A bound that counted it all along would be above what the plan needs."""
    p = ProgramBuilder()
    x = p.input("x", (64,))
    p.input("unread", (64,), donated=True)
    program = p.program(p.pointwise("out", "neg", p.pointwise("a", "exp", x)))
    found = reorder(program, {}, None)
    assert found.lower_bound <= make_plan(program, found.order, in_place={}).certificate.peak == 2 * 64 * 4


def test_a_mutation_comes_after_earlier_readers() -> None:
    p = ProgramBuilder()
    x = p.input("x", (64, 64))
    first = p.extern("first", "aten.sum.dim_IntList", (x, [0]), (64,))
    p.extern("change", "aten.mul_.Scalar", (x, 2.0), contract=Contract.MUTATE, mutates=("x",), result=x)
    second = p.extern("second", "aten.sum.dim_IntList", (x, [0]), (64,))
    program = p.program(p.pointwise("out", "sub", second, first))
    order = reorder(program, {}, None).order
    assert order.index("first") < order.index("change") < order.index("second")


def test_random_operators_keep_their_order() -> None:
    p = ProgramBuilder()
    big = p.extern("big", "aten.rand.default", ([64, 64],), (64, 64), effect=True)
    small = p.extern("small", "aten.rand.default", ([64],), (64,), effect=True)
    row = p.extern("row", "aten.sum.dim_IntList", (big, [0]), (64,))
    program = p.program(p.pointwise("out", "add", row, small))
    order = reorder(program, {}, None).order
    assert order.index("big") < order.index("small")


def test_sizes_are_rounded_as_the_device_does() -> None:
    p = ProgramBuilder()
    x = p.input("x", (3,), dtype=torch.int8)
    program = p.program(p.pointwise("out", "neg", x, dtype=torch.int8))
    assert [b.size for b in order_graph(program, {}).buffers] == [64]


def test_the_compiled_search_agrees_on_what_it_reports() -> None:
    library = planner_libraries().order
    if library is None:
        pytest.skip("no C++ compiler")
    program = wide_program()
    found = reorder(program, {}, library)
    assert (
        make_plan(program, found.order, in_place={}).certificate.peak == found.peak == reorder(program, {}, None).peak
    )
