"""The plan verifier accepts correct plans, and says each thing that it can say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.errors import VerificationError
from memplan.ir.index import FloorDiv
from memplan.ir.loops import Cast, Kernel, Load, Range, Store, outer_symbol
from memplan.ir.plan import External, InPlaceOf, InPool, Lifetime, Own, Plan, Pool
from memplan.ir.program import BufferKind, Contract, Extern, Program, Symbolic, View
from memplan.ir.verify_plan import overlapping_pairs, recomputed_timeline, trial_sizes, verify_plan
from tests.programs import F32, ProgramBuilder, fill_kernel, plan_of, with_claims


def rejects(plan: Plan, *words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_plan(plan)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def chain(length: int = 4) -> Program:
    """``x -> t0 -> t1 -> ... -> out``, 64 bytes each."""
    p = ProgramBuilder()
    value = p.input("x", (4, 4))
    for k in range(length):
        value = p.pointwise(f"t{k}", "neg", value)
    return p.program(value)


def placed(plan: Plan, **placements: object) -> Plan:
    return with_claims(replace(plan, placements={**plan.placements, **placements}))  # type: ignore[arg-type]


def living(plan: Plan, **lifetimes: tuple[int, int]) -> Plan:
    return with_claims(replace(plan, lifetimes={**plan.lifetimes, **{n: Lifetime(*v) for n, v in lifetimes.items()}}))


# -- what is right ------------------------------------------------------------------------------------------------


def test_accepts_a_plain_plan() -> None:
    verify_plan(plan_of(chain()))
    verify_plan(plan_of(chain(), pooled=False))


def test_accepts_an_empty_program() -> None:
    p = ProgramBuilder()
    verify_plan(plan_of(p.program(p.input("x", (4,)))))


def test_accepts_a_shared_slot_after_a_death() -> None:
    plan = plan_of(chain())
    shared = placed(plan, t2=plan.placements["t0"])
    verify_plan(shared)
    assert not list(overlapping_pairs(shared, {}))


def test_accepts_a_chain_in_place() -> None:
    program = chain()
    plan = plan_of(program, in_place={"t1": "t0", "t2": "t1"})
    verify_plan(plan)
    assert recomputed_timeline(plan) == (64, 64, 64, 128)
    assert plan.certificate.peak == 128


def test_accepts_an_output_over_a_donated_input() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4), donated=True)
    program = p.program(p.pointwise("y", "neg", x))
    plan = plan_of(program, in_place={"y": "x"})
    verify_plan(plan)
    assert recomputed_timeline(plan) == (64,)


def test_accepts_pointwise_extern_in_place() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    p.extern("r", "aten.relu.default", (t,), (4, 4), contract=Contract.OUT)
    y = p.pointwise("y", "neg", View("r", F32, (4, 4), (4, 1)))
    verify_plan(plan_of(p.program(y), in_place={"r": "t"}))


def test_accepts_symbolic_slots() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 5)
    x = p.input("x", (s, 4))
    y = p.pointwise("y", "neg", p.pointwise("b", "neg", p.pointwise("a", "neg", x)))
    verify_plan(plan_of(p.program(y)))


# -- order --------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation() -> None:
    plan = plan_of(chain(2))
    rejects(replace(plan, order=("t0", "t0")), "'t0' runs twice")
    rejects(replace(plan, order=("t0", "nope")), "'nope', which is no operation")
    rejects(replace(plan, order=("t0",)), "'t1' never runs", "model.py:2")


def test_order_follows_data() -> None:
    rejects(plan_of(chain(3), order=("t1", "t0", "t2")), "step 0 ('t1') reads 't0', which 't0' writes", "step 1")


def test_order_follows_mutation() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    y = p.pointwise("y", "neg", x)
    p.kernel("fill", fill_kernel(x, 0.0), mutates=("x",))
    z = p.pointwise("z", "neg", x)
    program = p.program(y, z)
    verify_plan(plan_of(program))
    rejects(plan_of(program, order=("fill", "y", "z")), "changes 'x', whose old value 'y' reads", "model.py:2")
    rejects(plan_of(program, order=("y", "z", "fill")), "'z') reads 'x', which 'fill' changes")


def test_order_waits_for_every_part() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4,))
    p.buffer("t", (8,))
    p.pointwise("left", "neg", x, into=View("t", F32, (4,), (1,)))
    p.pointwise("right", "neg", x, into=View("t", F32, (4,), (1,), 4))
    y = p.pointwise("y", "neg", View("t", F32, (8,), (1,)))
    program = p.program(y)
    verify_plan(plan_of(program, order=("right", "left", "y")))
    assert program.dependencies["y"] == {"left", "right"}
    rejects(plan_of(program, order=("left", "y", "right")), "reads 't', which 'right' writes")


def test_order_of_writes_and_changes() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4,))
    t = p.buffer("t", (8,), zero_fill=True)
    p.kernel("change", fill_kernel(View("t", F32, (4,), (1,)), 1.0), mutates=("t",))
    p.pointwise("change2", "neg", x, into=View("t", F32, (4,), (1,)), mutates=True)
    program = p.program(t)
    rejects(plan_of(program, order=("change2", "change")), "reads 't', which 'change' changes")


def test_order_keeps_side_effects() -> None:
    p = ProgramBuilder()
    a = p.extern("a", "aten.rand.default", ([4],), (4,), effect=True)
    b = p.extern("b", "aten.rand.default", ([4],), (4,), effect=True)
    program = p.program(a, b)
    rejects(plan_of(program, order=("b", "a")), "step 0 ('b') has a side effect, and so has 'a' before it")


def test_order_of_what_computes_with_a_size() -> None:
    """An argument, and a kernel's ranges: neither reads a buffer of the call that makes the size known."""
    p = ProgramBuilder()
    x, u = p.input("x", (4, 4)), sympy.Symbol("u0", integer=True, nonnegative=True)
    p.hints[u] = 3
    p.extern("nonzero", "aten.nonzero.default", (x,), (u, 2), contract=Contract.DYNAMIC, dtype=torch.int64)
    definer = p.operations[0]
    assert isinstance(definer, Extern)
    p.operations[0] = replace(definer, symbols=(("[0].size(0)", u),))
    p.extern("check", "aten.full.default", ([4], Symbolic(u)), (4,))
    p.kernel("fill", fill_kernel(p.buffer("f", (u,)), 0.0))
    program = p.program()
    assert program.dependencies == {"nonzero": set(), "check": {"nonzero"}, "fill": {"nonzero"}}
    for order in (("check", "nonzero", "fill"), ("fill", "nonzero", "check")):
        plan = plan_of(program, order=order)
        rejects(plan, f"step 0 ({order[0]!r}) uses the size u0, which 'nonzero' makes known")


def test_sizes_that_no_call_has_are_not_tried() -> None:
    """A window's step of a quarter of a size: for 2 it would be 0."""
    p = ProgramBuilder()
    n = p.symbol("n", 16)
    p.input("x", (n,))
    windows = FloorDiv(n, FloorDiv(n, 4))
    out = p.buffer("f", (windows,))
    p.kernel("fill", fill_kernel(out, 0.0))
    plan = plan_of(p.program(out))
    assert [values[n] for values in trial_sizes(plan)] == [16, 49, 65]
    verify_plan(plan)


# -- lifetimes ----------------------------------------------------------------------------------------------------


def test_lifetimes() -> None:
    plan = plan_of(chain())
    rejects(replace(plan, lifetimes={k: v for k, v in plan.lifetimes.items() if k != "t1"}), "'t1' has no lifetime")
    rejects(living(plan, t1=(1, 9)), "'t1' lives until step 9 of 4")
    rejects(living(plan, x=(1, 4)), "'x' is external, yet starts at step 1 ('t1')")
    rejects(living(plan, x=(0, 1)), "'x' is the caller's, yet it ends at step 1")
    rejects(living(plan, t3=(3, 4)), "'t3' outlives the program, yet it ends at step 4 (the end)")
    rejects(living(plan, t1=(1, 2)), "step 2 ('t2') uses 't1', which lives over [1, 2) only", "model.py:3")
    rejects(living(plan, t1=(2, 3)), "step 1 ('t1') uses 't1', which lives over [2, 3) only")


# -- places -------------------------------------------------------------------------------------------------------


def test_places() -> None:
    plan = plan_of(chain())
    rejects(replace(plan, placements={k: v for k, v in plan.placements.items() if k != "t1"}), "'t1' has no place")
    rejects(placed(plan, x=Own()), "'x' is input, yet it is placed as Own")
    rejects(placed(plan, t1=External()), "'t1' is temporary, yet it is placed as External")
    rejects(placed(plan, t1=InPool("lake", 0)), "'t1' is in the pool 'lake', which does not exist")
    ghost = replace(plan, placements={**plan.placements, "t1": InPlaceOf("ghost")})
    rejects(ghost, "'t1' is in place of 'ghost'")
    cycle = {**plan.placements, "t1": InPlaceOf("t2"), "t2": InPlaceOf("t1")}
    rejects(replace(plan, placements=cycle), "'t1', 't2' are each in place of one another")


def test_pools() -> None:
    plan = plan_of(chain())
    pool = plan.pools[0]
    rejects(replace(plan, pools=(pool, pool)), "two pools are called 'pool'")
    rejects(replace(plan, pools=(replace(pool, lifetime=Lifetime(0, 8)),)), "'pool' lives until step 8 of 4")
    rejects(replace(plan, pools=(replace(pool, device="cuda:0"),)), "'t0' on cpu is in pool 'pool' on cuda:0")
    short = with_claims(replace(plan, pools=(replace(pool, lifetime=Lifetime(0, 2)),)))
    rejects(short, "'t1' lives over [1, 3), its pool 'pool' over [0, 2) only")
    small = with_claims(replace(plan, pools=(replace(pool, nbytes=100),)))
    rejects(small, "'t1' is at bytes [64, 128) of pool 'pool', which has 100", "model.py:2")


def test_alignment_and_bounds() -> None:
    plan = plan_of(chain())
    rejects(placed(plan, t1=InPool("pool", 68)), "'t1' is at byte 68 of pool 'pool', no multiple of 64", "model.py:2")
    rejects(placed(plan, t1=InPool("pool", -64)), "'t1' is at bytes [-64, 0)")


def test_outputs_are_never_in_a_pool() -> None:
    plan = plan_of(chain())
    rejects(placed(plan, t3=InPool("pool", 128)), "'t3' (output) leaves the program", "dies before it")
    kept = with_claims(replace(plan, pools=(replace(plan.pools[0], lifetime=Lifetime(0, 5)),)))
    rejects(placed(kept, t3=InPool("pool", 128)), "'t3' (output)", "keep alive")
    rejects(placed(plan, t3=InPlaceOf("t2")), "'t3' (output)", "in pool 'pool' (in place of 't2')")


def test_saved_tensors_only_in_a_pool_that_stays() -> None:
    program = chain()
    saved = replace(program, buffers={**program.buffers, "t3": replace(program.buffers["t3"], kind=BufferKind.SAVED)})
    plan = plan_of(saved)
    dying = placed(plan, t3=InPool("pool", 0))
    rejects(dying, "'t3' (saved) leaves the program", "dies before it")
    slab = Pool("slab", 64, "cpu", Lifetime(3, 5))
    verify_plan(
        with_claims(replace(dying, pools=(*plan.pools, slab), placements={**plan.placements, "t3": InPool("slab", 0)}))
    )


def test_results_that_the_call_allocates() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.extern("t", "aten.neg.default", (x,), (4, 4))
    program = p.program(p.pointwise("y", "neg", t))
    plan = plan_of(program)
    pool = Pool("pool", 64, "cpu", Lifetime(0, 2))
    pooled = replace(plan, pools=(pool,), placements={**plan.placements, "t": InPool("pool", 0)})
    rejects(with_claims(pooled), "aten.neg.default allocates 't' itself, yet it is placed as InPool", "model.py:1")


# -- overlap ------------------------------------------------------------------------------------------------------


def test_two_live_buffers_overlap() -> None:
    plan = plan_of(chain())
    clash = placed(plan, t1=InPool("pool", 0))
    rejects(
        clash,
        "'t0' at bytes [0, 64) over steps [0, 2) and 't1' at bytes [0, 64) over steps [1, 3) overlap by 64 bytes",
        "pool 'pool' at step 1 ('t1')",
        "model.py:2",
    )
    assert list(overlapping_pairs(clash, {})) == [("t0", "t1")]


def test_overlap_at_other_sizes_than_the_hinted() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 16)
    x = p.input("x", (s,))
    y = p.pointwise("y", "neg", p.pointwise("b", "neg", p.pointwise("a", "neg", x)))
    plan = plan_of(p.program(y))
    fixed = with_claims(replace(plan, placements={**plan.placements, "a": InPool("pool", 0), "b": InPool("pool", 64)}))
    rejects(fixed, "overlap", "(at s0=")
    small = replace(plan, pools=(replace(plan.pools[0], nbytes=64 * 128),))
    rejects(with_claims(small), "which has 8192 (at s0=")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=8),
)
def test_sweep_agrees_with_all_pairs(boxes: list[tuple[int, int, int]]) -> None:
    """Random offsets and lifetimes: the sweep rejects exactly where comparing every two finds a clash."""
    p = ProgramBuilder()
    x = p.input("x", (16,))
    for k, (_, _, size) in enumerate(boxes):
        p.buffer(f"t{k}", (16 * size,))
        p.kernel(f"t{k}", fill_kernel(View(f"t{k}", F32, (16 * size,), (1,)), 0.0))
    plan = plan_of(p.program(p.pointwise("y", "neg", x)))
    steps = len(plan.order)
    lifetimes = dict(plan.lifetimes)
    placements = dict(plan.placements)
    for k, (offset, longer, _) in enumerate(boxes):
        placements[f"t{k}"] = InPool("pool", 64 * offset)
        lifetimes[f"t{k}"] = Lifetime(k, min(k + 1 + longer, steps))
    pool = Pool("pool", 64 * 10, "cpu", Lifetime(0, steps))
    random = with_claims(replace(plan, pools=(pool,), placements=placements, lifetimes=lifetimes))
    clashes = list(overlapping_pairs(random, {}))
    if clashes:
        with pytest.raises(VerificationError, match="overlap by"):
            verify_plan(random)
    else:
        verify_plan(random)


# -- in place -----------------------------------------------------------------------------------------------------


def test_old_value_still_read() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.pointwise("u", "exp", t)
    y = p.pointwise("y", "add", t, u)
    plan = plan_of(p.program(y), in_place={"u": "t"})
    rejects(plan, "'u' (from step 1 ('u')) takes the storage of 't'", "'y' still read", "64 bytes", "model.py:2")


def test_old_value_is_returned_as_a_view() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    y = p.pointwise("y", "exp", t)
    program = p.program(y, View("t", F32, (4,), (1,), 4))
    rejects(plan_of(program, in_place={"y": "t"}), "'y'", "takes the storage of 't'", "lives until step 3")


def test_two_heirs_of_one_storage() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.pointwise("u", "exp", t)
    v = p.pointwise("v", "sin", u)
    y = p.pointwise("y", "add", u, v)
    plan = plan_of(p.program(y), in_place={"u": "t", "v": "t"})
    rejects(plan, "'v' (from step 2 ('v')) takes the storage of 'u'", "'y' still read")


def test_the_callers_bytes_are_not_taken() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    program = p.program(p.pointwise("y", "neg", x))
    rejects(plan_of(program, in_place={"y": "x"}), "'y' overwrites 'x', which is the caller's")


def test_storage_too_small_or_elsewhere() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    p.buffer("u", (4, 8))
    p.pointwise("u", "neg", t, into=View("u", F32, (4, 4), (4, 1)))
    y = p.pointwise("y", "neg", View("u", F32, (4, 4), (4, 1)))
    program = p.program(y)
    rejects(plan_of(program, in_place={"u": "t"}), "'u' has 128 bytes, the storage of 't' that it takes 64")
    aligned = {**program.buffers, "u": replace(program.buffers["u"], nbytes=64, alignment=256)}
    plan = plan_of(replace(program, buffers=aligned), in_place={"u": "t"}, pooled=False)
    rejects(plan, "'u' needs alignment 256, the storage of 't' that it takes has 64")


def test_storage_on_another_device() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4), donated=True)
    p.buffer("y", (4, 4))
    p.copy("y", x, View("y", F32, (4, 4), (4, 1)), fresh=True)
    p.buffers["y"] = replace(p.buffers["y"], device="cuda:0")
    rejects(
        plan_of(p.program(View("y", F32, (4, 4), (4, 1))), in_place={"y": "x"}),
        "'y' on cuda:0 is in place of 'x' on cpu",
    )


def racing_kernel(old: str, new: str, dtype: torch.dtype) -> Kernel:
    """float32 into a smaller type at the same index: one point writes over what another still reads."""
    x0 = outer_symbol(0)
    return Kernel((Range(x0, 16),), (), (Load(old, x0, F32), Cast(0, dtype)), (Store(new, x0, 1, dtype),))


def test_racing_kernel() -> None:
    p = ProgramBuilder()
    x = p.input("x", (16,))
    p.pointwise("t", "neg", x)
    p.buffer("u", (16,), dtype=torch.int16)
    p.kernel("u", racing_kernel("t", "u", torch.int16))
    y = p.pointwise("y", "neg", View("u", torch.int16, (16,), (1,)), dtype=torch.int16)
    plan = plan_of(p.program(y), in_place={"u": "t"})
    rejects(plan, "'u' (from step 1 ('u')) takes the storage of 't' (64 bytes) while reading it", "have 4 bytes", "2:")


def test_transposing_kernel() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    p.pointwise("t", "neg", x)
    u = p.pointwise("u", "neg", View("t", F32, (4, 4), (1, 4)))
    rejects(plan_of(p.program(p.pointwise("y", "neg", u)), in_place={"u": "t"}), "while reading it", "v0 reads 't' at")


def test_another_load_of_the_old_value() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.pointwise("u", "add", t, View("t", F32, (4, 4), (1, 4)))
    rejects(plan_of(p.program(p.pointwise("y", "neg", u)), in_place={"u": "t"}), "v1 reads 't' at")


def test_extern_that_is_not_pointwise() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.extern("u", "aten.mm.default", (t, x), (4, 4), contract=Contract.OUT)
    plan = plan_of(p.program(p.pointwise("y", "neg", u)), in_place={"u": "t"})
    rejects(plan, "while reading it: aten.mm.default is not known to work element by element", "model.py:2")
    p.operations[1] = replace(p.operations[1], target="aten.relu.default", args=(replace(t, strides=(1, 4)),))
    program = p.program(View("y", F32, (4, 4), (4, 1)))
    rejects(plan_of(program, in_place={"u": "t"}), "reads 't' and writes 'u' with another layout")


def test_copy_to_another_layout() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.buffer("u", (4, 4))
    p.copy("u", replace(t, strides=(1, 4)), u, fresh=True)
    rejects(plan_of(p.program(p.pointwise("y", "neg", u)), in_place={"u": "t"}), "it copies to another layout")


def test_filled_changed_or_unrelated() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.pointwise("u", "neg", t)
    program = p.program(p.pointwise("y", "neg", u))
    zeroed = {**program.buffers, "u": replace(program.buffers["u"], zero_fill=True)}
    rejects(
        plan_of(replace(program, buffers=zeroed), in_place={"u": "t"}), "'u' is filled with zeros before 'u' reads 't'"
    )
    late = living(plan_of(program, in_place={"y": "t"}, pooled=False), t=(0, 3))
    rejects(late, "'y' does not turn the one into the other")
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    u = p.buffer("u", (4, 4))
    p.extern("both", "aten.add_.Tensor", (t, t), contract=Contract.OUT, mutates=("t",), result=u)
    program = p.program(p.pointwise("y", "neg", u))
    rejects(plan_of(program, in_place={"u": "t"}), "'both' changes 't' as well")


# -- claims -------------------------------------------------------------------------------------------------------


def test_claims() -> None:
    plan = plan_of(chain())
    certificate = plan.certificate
    rejects(replace(plan, timeline=plan.timeline[:-1]), "timeline has 3 steps, not 4")
    wrong = (plan.timeline[0], plan.timeline[1] + 1, *plan.timeline[2:])
    rejects(replace(plan, timeline=wrong), "claims 193 bytes held at step 1 ('t1'); there are 192", "model.py:2")
    rejects(replace(plan, certificate=replace(certificate, peak=1)), "peak of live bytes of 1", "give 128")
    rejects(replace(plan, certificate=replace(certificate, placed_peak=1)), "placed peak of 1 bytes", "give 256")
    rejects(replace(plan, certificate=replace(certificate, order_bound=999)), "bound over all orders of 999")
    rejects(replace(plan, predicted_peak={"cpu": 5}), "a peak on cpu of 5 bytes", "give 256")


def test_unused_buffers_need_no_place() -> None:
    program = chain()
    unused = replace(program.buffers["t1"], name="unused")
    plan = plan_of(program)
    verify_plan(replace(plan, program=replace(program, buffers={**program.buffers, "unused": unused})))


def test_scratch_counts() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    y = p.extern("y", "aten.mm.default", (x, x), (4, 4), scratch=1000)
    assert recomputed_timeline(plan_of(p.program(y))) == (1064,)  # 64 and 1000


def test_the_program_is_checked_first() -> None:
    p = ProgramBuilder()
    y = p.pointwise("y", "neg", p.buffer("never", (4,)))
    rejects(plan_of(p.program(y)), "reads 'never'")
