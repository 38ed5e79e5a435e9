"""Lifetimes, storages and the timeline: by hand, and against the count buffer by buffer and step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from memplan.ir.plan import External, InPlaceOf, InPool, Lifetime, Own, Pool
from memplan.ir.program import BufferKind, Contract, Program
from memplan.ir.verify_plan import verify_plan
from memplan.passes.inplace import decide_in_place
from memplan.passes.schedule import (
    Storage,
    by_device,
    lifetimes,
    make_plan,
    must_own,
    own_peak,
    rounded,
    storages,
    timeline,
)
from tests.generated import Choice, choices, program_from
from tests.programs import ProgramBuilder, with_claims


def names(program: Program) -> list[str]:
    return [op.name for op in program.operations]


def small() -> Program:
    """x -> a (exp) -> b (a product, with scratch) -> out; ``d`` is donated and read by b alone."""
    p = ProgramBuilder()
    x = p.input("x", (16, 16), kind=BufferKind.PARAMETER)
    d = p.input("d", (16, 16), donated=True)
    a = p.pointwise("a", "exp", x)
    b = p.extern("b", "aten.mm.default", (a, d), (16, 16), contract=Contract.OUT, scratch=100)
    return p.program(p.pointwise("out", "neg", b))


@pytest.mark.parametrize(
    ("nbytes", "device", "expected"),
    [(0, "cpu", 0), (1, "cpu", 64), (64, "cpu", 64), (1, "cuda:1", 512), (513, "cuda", 1024), (3, "xpu", 64)],
)
def test_rounding(nbytes: int, device: str, expected: int) -> None:
    assert rounded(nbytes, device) == expected


def test_lifetimes_by_hand() -> None:
    program = small()
    assert lifetimes(program, names(program)) == {
        "x": Lifetime(0, 3),  # the caller's: all along
        "d": Lifetime(0, 2),  # donated: to its last reader
        "a": Lifetime(0, 2),
        "b": Lifetime(1, 3),
        "out": Lifetime(2, 4),  # outlives the program
    }


def test_a_donated_input_that_nothing_reads_dies_at_once_and_one_that_leaves_does_not() -> None:
    p = ProgramBuilder()
    x, unread, passed = p.input("x", (4,)), p.input("u", (4,), donated=True), p.input("p", (4,), donated=True)
    program = p.program(p.pointwise("b", "neg", p.pointwise("a", "exp", x)), passed)
    found = lifetimes(program, ["a", "b"])
    assert (found[unread.buffer], found[passed.buffer]) == (Lifetime(0, 1), Lifetime(0, 2))


def test_a_program_without_operations_has_one_idle_step() -> None:
    p = ProgramBuilder()
    program = p.program(p.input("x", (4,)))
    plan = make_plan(program, [], in_place={})
    verify_plan(plan)
    assert plan.timeline == (0,)


def test_timeline_by_hand() -> None:
    program = small()
    square = 16 * 16 * 4
    plan = make_plan(program, names(program), in_place={})
    # a and d; a, d, b and the product's scratch; b and out
    assert plan.timeline == (2 * square, 3 * square + 100, 2 * square)
    assert plan.certificate.peak == plan.certificate.placed_peak == 3 * square + 100
    assert plan.predicted_peak == {"cpu": 3 * square + 100}


def test_in_place_chains_are_one_storage() -> None:
    program = small()
    lives = lifetimes(program, names(program))
    found = {s.root: s for s in storages(program, lives, {"b": "d", "out": "b"})}
    assert found["d"] == Storage("d", ("d", "b", "out"), Lifetime(0, 4), 16 * 16 * 4)
    assert set(found) == {"x", "d", "a"}


def test_placements() -> None:
    program = small()
    pool = Pool("pool", 2048, "cpu", Lifetime(0, 3))
    plan = make_plan(program, names(program), in_place={"out": "b"}, pools=(pool,), offsets={"a": ("pool", 0)})
    assert plan.placements == {
        "x": External(), "d": External(), "a": InPool("pool", 0), "b": Own(), "out": InPlaceOf("b"),
    }  # fmt: skip
    assert plan.timeline[0] == 2048 + 1024


def test_must_own() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    fresh = p.extern("fresh", "aten.neg.default", (x,), (4, 4))
    given_out = p.extern("out_form", "aten.mm.default", (fresh, x), (4, 4), contract=Contract.OUT)
    program = p.program(p.pointwise("result", "neg", given_out))
    assert must_own(program) == {"fresh", "result"}


def test_devices_are_counted_by_themselves() -> None:
    program = small()
    moved = {n: replace(b, device="cuda:0") if n in ("a", "b") else b for n, b in program.buffers.items()}
    program = replace(program, buffers=moved)
    order = names(program)
    found = by_device(program, order, storages(program, lifetimes(program, order), {}), (), frozenset())
    square = 16 * 16 * 4
    # the scratch of a step is counted on its own device
    assert found == {"cpu": square + 100, "cuda:0": 2 * square}


@given(choices)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_against_the_count_step_by_step(steps: list[Choice]) -> None:
    program = program_from(steps, donated=True)
    order = names(program)
    plan = make_plan(program, order, in_place=decide_in_place(program, order))
    verify_plan(plan)
    counted = with_claims(plan)
    assert plan.timeline == counted.timeline
    assert plan.certificate.placed_peak == max(counted.timeline)
    stores = storages(
        program, plan.lifetimes, {b: p.buffer for b, p in plan.placements.items() if isinstance(p, InPlaceOf)}
    )
    assert timeline(program, order, stores, (), frozenset()) == list(plan.timeline)
    alone = timeline(program, order, storages(program, plan.lifetimes, {}), (), frozenset())
    assert own_peak(program, order) == max(alone)


def test_peak_of_a_program_without_operations() -> None:
    p = ProgramBuilder()
    kept = p.input("kept", (16, 16), donated=True)
    program = p.program(kept)
    alone = timeline(program, [], storages(program, lifetimes(program, []), {}), (), frozenset())
    assert own_peak(program, []) == max(alone) == 16 * 16 * 4
