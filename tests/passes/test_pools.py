"""Pools: verified, aligned, and never dearer than own allocations by more than is said."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.plan import InPool, Own, Plan
from memplan.ir.program import Contract, Program
from memplan.ir.verify_plan import verify_plan
from memplan.passes.inplace import decide_in_place
from memplan.passes.pools import ALIGNMENT, TOLERANCE, choose_pools
from memplan.passes.schedule import lifetimes, make_plan, must_own, storages
from tests.generated import Choice, choices, program_from
from tests.programs import ProgramBuilder

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def planned(program: Program, *, always: bool = False, in_place: bool = False) -> Plan:
    """Program order, pools chosen, the plan verified."""
    order = [op.name for op in program.operations]
    pairs = decide_in_place(program, order) if in_place else {}
    stores = storages(program, lifetimes(program, order), pairs)
    pooled = choose_pools(program, order, stores, native=None, always=always)
    plan = make_plan(program, order, in_place=pairs, pools=pooled.pools, offsets=pooled.offsets)
    verify_plan(plan)
    return plan


def chain(sizes: Sequence[int]) -> Program:
    """Each value is made of the one before: two are alive at a time; the last leaves."""
    p = ProgramBuilder()
    value = p.input("x", (sizes[0],))
    for k, n in enumerate(sizes):
        source = value
        value = p.buffer(f"t{k}", (n,))
        p.extern(f"t{k}", "aten.repeat.default", (source, [1]), result=value, contract=Contract.OUT)
    return p.program(value)


def test_a_chain_shares_one_pool() -> None:
    plan = planned(chain([1024] * 6), always=True)
    assert len(plan.pools) == 1
    # two of the five temporaries are alive at a time, each a multiple of the alignment
    assert plan.pools[0].nbytes == 2 * 4096
    assert {type(plan.placements[f"t{k}"]) for k in range(5)} == {InPool}
    assert isinstance(plan.placements["t5"], Own)


def test_a_pool_that_would_cost_more_is_not_made() -> None:
    """Two values whose lives touch nowhere, around a huge one that its call allocates: a pool holds both places."""
    p = ProgramBuilder()
    x = p.input("x", (4096,))
    a = p.extern("a", "aten.neg.default", (x,), (4096,), contract=Contract.OUT)
    row = p.extern("row", "aten.sum.dim_IntList", (a, [0], True), (1,))
    huge = p.extern("huge", "aten.expand_copy.default", (row, [65536]), (65536,))
    small = p.extern("small", "aten.sum.dim_IntList", (huge, [0], True), (1,))
    b = p.extern("b", "aten.expand_copy.default", (small, [4096]), (4096,), contract=Contract.OUT)
    program = p.program(p.extern("out", "aten.sum.dim_IntList", (b, [0], True), (1,)))
    plan = planned(program)
    assert plan.certificate.placed_peak <= plan.certificate.peak * (1 + TOLERANCE)
    held = planned(program, always=True)
    assert held.pools
    assert held.certificate.placed_peak >= plan.certificate.placed_peak


def test_nothing_to_place() -> None:
    p = ProgramBuilder()
    x = p.input("x", (8,))
    plan = planned(p.program(p.pointwise("out", "neg", x)), always=True)
    assert plan.pools == ()


def test_symbolic_sizes_stay_own_allocations() -> None:
    p = ProgramBuilder()
    n = p.symbol("n", 100)
    x = p.input("x", (n,))
    a = p.pointwise("a", "exp", x)
    b = p.pointwise("b", "sin", a)
    plan = planned(p.program(p.pointwise("out", "neg", b)), always=True)
    assert plan.pools == ()


def test_what_leaves_or_is_returned_by_a_call_is_in_no_pool() -> None:
    program = program_from([("cast", 0, 0), ("pointwise", 0, 0), ("cast", 0, 0), ("binary", 0, 1), ("mm", 0, 0)])
    plan = planned(program, always=True)
    for name in must_own(program) & plan.placements.keys():
        assert not isinstance(plan.placements[plan.storage_of(name)], InPool), name


@given(choices, st.booleans())
@SETTINGS
def test_never_above_own_allocations_by_more_than_the_tolerance(steps: list[Choice], in_place: bool) -> None:
    plan = planned(program_from(steps, donated=True), in_place=in_place)
    assert plan.certificate.placed_peak <= plan.certificate.peak * (1 + TOLERANCE)
    assert max(plan.timeline) == plan.certificate.placed_peak == plan.predicted_peak["cpu"]


@given(choices, st.booleans())
@SETTINGS
def test_pools_asked_for_are_made(steps: list[Choice], in_place: bool) -> None:
    program = program_from(steps)
    plan = planned(program, always=True, in_place=in_place)
    own = must_own(program)
    chains: dict[str, list[str]] = {}
    for name in plan.placements:
        chains.setdefault(plan.storage_of(name), []).append(name)
    movable = [r for r, c in chains.items() if not own & set(c) and r not in {i.view.buffer for i in program.inputs}]  # type: ignore[union-attr]
    assert bool(plan.pools) == (len(movable) >= 2)
    placed = [p for p in plan.placements.values() if isinstance(p, InPool)]
    assert all(int(p.offset) % ALIGNMENT == 0 for p in placed)


@given(st.lists(st.integers(1, 5000), min_size=3, max_size=12))
@settings(SETTINGS, max_examples=40)
def test_odd_sizes_stay_inside_and_aligned(sizes: list[int]) -> None:
    plan = planned(chain(sizes), always=True)
    by_name = {p.name: p for p in plan.pools}
    for name, place in plan.placements.items():
        if isinstance(place, InPool):
            pool = by_name[place.pool]
            assert int(place.offset) % ALIGNMENT == 0
            assert int(place.offset) + plan.program.nbytes(name) <= int(pool.nbytes)
            life = plan.lifetimes[name]
            assert pool.lifetime.start <= life.start
            assert life.stop <= pool.lifetime.stop
