"""In-place reuse: what it must find, what it must refuse, and that what it finds is safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from memplan.ir.errors import VerificationError
from memplan.ir.loops import Call, Cast, Constant, Kernel, Load, Range, Reduce, Store, outer_symbol, row_symbol
from memplan.ir.plan import InPlaceOf
from memplan.ir.program import BufferKind, Contract, KernelOp, Program, View
from memplan.ir.verify import verify_program
from memplan.ir.verify_plan import verify_plan
from memplan.passes.inplace import Reuse, decide_in_place, plan_in_place
from memplan.passes.kernel_access import kernel_reason
from memplan.passes.schedule import make_plan
from tests.generated import Choice, choices, program_from
from tests.program_runner import make_inputs
from tests.programs import F32, ProgramBuilder, plan_of
from tests.racing import sharing_is_harmless

X0, R0 = outer_symbol(0), row_symbol(0)


def decide(program: Program, order: list[str] | None = None) -> dict[str, str]:
    order = order or [op.name for op in program.operations]
    found = decide_in_place(program, order)
    plan = make_plan(program, order, in_place=found)
    verify_plan(plan)
    return found


def layer_norm_kernel(x: View, out: View) -> Kernel:
    """Mean, then variance about it, then the normalised row."""
    rows, columns = x.sizes
    index = columns * X0 + R0
    nodes = (
        Load(x.buffer, index, F32),
        Reduce("sum", (0,), F32),
        Constant(1.0 / int(columns), F32),
        Call("mul", (1, 2), F32),
        Call("sub", (0, 3), F32),
        Call("mul", (4, 4), F32),
        Reduce("sum", (5,), F32),
        Call("mul", (6, 2), F32),
        Constant(1e-5, F32),
        Call("add", (7, 8), F32),
        Call("rsqrt", (9,), F32),
        Call("mul", (4, 10), F32),
    )
    return Kernel((Range(X0, rows),), (Range(R0, columns),), nodes, (Store(out.buffer, index, 11, F32),))


def test_layer_norm_writes_over_the_matmul() -> None:
    p = ProgramBuilder()
    x, w = p.input("x", (8, 16)), p.input("w", (16, 32), kind=BufferKind.PARAMETER)
    mm = p.extern("mm", "aten.mm.default", (x, w), (8, 32), contract=Contract.OUT)
    y = p.buffer("norm", (8, 32))
    p.kernel("norm", layer_norm_kernel(mm, y))
    program = p.program(y)
    found = decide(program)
    assert found == {"norm": "mm"}
    order = ["mm", "norm"]
    plan = make_plan(program, order, in_place=found)
    assert plan.placements["norm"] == InPlaceOf("mm")
    apart = make_plan(program, order, in_place={})
    assert (plan.certificate.peak, apart.certificate.peak) == (8 * 32 * 4, 2 * 8 * 32 * 4)


def test_softmax_of_a_matmul_and_what_follows_is_one_storage() -> None:
    p = ProgramBuilder()
    x, w = p.input("x", (8, 8)), p.input("w", (8, 8))
    mm = p.extern("mm", "aten.mm.default", (x, w), (8, 8), contract=Contract.OUT)
    t = p.pointwise("scaled", "neg", mm)
    t = p.softmax("softmax", t)
    t = p.extern("relu", "aten.relu.default", (t,), (8, 8), contract=Contract.OUT)
    program = p.program(p.extern("out", "aten.mm.default", (t, w), (8, 8), contract=Contract.OUT))
    assert decide(program) == {"scaled": "mm", "softmax": "scaled", "relu": "softmax"}
    plan = make_plan(program, [o.name for o in program.operations], in_place=decide(program))
    assert plan.storage_of("relu") == "mm"
    assert plan.certificate.peak == 2 * 256


def test_a_fresh_allocation_may_be_overwritten_but_overwrites_nothing() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    a = p.extern("a", "aten.relu.default", (p.pointwise("t", "neg", x),), (4, 4), contract=Contract.FRESH)
    assert decide(p.program(p.pointwise("y", "neg", a))) == {"y": "a"}


def test_a_later_reader_forbids_it() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    u = p.pointwise("u", "exp", t)
    assert decide(p.program(p.pointwise("y", "add", u, t))) == {"y": "t"}


def test_a_user_that_was_removed_no_longer_counts() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    u = p.pointwise("u", "exp", t)
    p.pointwise("dead", "sin", t)
    program = p.program(u)
    assert decide(program) == {"dead": "t"}  # the dead one, which runs last, could take it
    removed = program.with_operations(tuple(o for o in program.operations if o.name != "dead"))
    assert decide(removed) == {"u": "t"}


def test_the_order_decides_who_is_last() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    u, v = p.pointwise("u", "exp", t), p.pointwise("v", "sin", t)
    program = p.program(u, v)
    assert decide(program, ["t", "u", "v"]) == {"v": "t"}
    assert decide(program, ["t", "v", "u"]) == {"u": "t"}


def test_inputs_only_where_they_are_donated() -> None:
    for donated in (False, True):
        p = ProgramBuilder()
        x = p.input("x", (4, 4), donated=donated)
        assert decide(p.program(p.pointwise("y", "neg", x))) == ({"y": "x"} if donated else {})
    p = ProgramBuilder()
    w = p.input("w", (4, 4), kind=BufferKind.PARAMETER)
    assert decide(p.program(p.pointwise("y", "neg", w))) == {}


def test_a_donated_input_that_is_returned_stays() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4), donated=True)
    assert decide(p.program(p.pointwise("y", "neg", x), x)) == {}


def test_outputs_are_never_overwritten() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    assert decide(p.program(p.pointwise("y", "neg", t), View("t", F32, (2,), (1,)))) == {}


def test_largest_storage_first_and_each_once() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    a, b = p.pointwise("a", "neg", x), p.pointwise("b", "exp", x)
    index = 4 * X0 + outer_symbol(1)
    ranges = (Range(X0, 4), Range(outer_symbol(1), 4))
    p.buffer("c", (4, 4)), p.buffer("d", (4, 4))
    nodes = (Load("a", index, F32), Load("b", index, F32), Call("add", (0, 1), F32), Call("sub", (0, 1), F32))
    p.kernel("both", Kernel(ranges, (), nodes, (Store("c", index, 2, F32), Store("d", index, 3, F32))))
    c, d = View("c", F32, (4, 4), (4, 1)), View("d", F32, (4, 4), (4, 1))
    del a, b
    found = decide(p.program(c, d))
    assert set(found) == {"c", "d"}
    assert set(found.values()) == {"a", "b"}


def test_a_matching_is_better_than_the_first_pair() -> None:
    """``c`` could take ``a`` or ``b``, ``d`` only ``a`` (it reads nothing of ``b`` at its own point)."""
    p = ProgramBuilder()
    x = p.input("x", (16,))
    p.pointwise("a", "neg", x), p.pointwise("b", "exp", x)
    p.buffer("c", (16,)), p.buffer("d", (16,))
    nodes = (Load("a", X0, F32), Load("b", X0, F32), Call("add", (0, 1), F32))
    stores = (Store("c", X0, 2, F32), Store("d", X0, 0, F32))
    p.kernel("both", Kernel((Range(X0, 16),), (), nodes, stores))
    c, d = View("c", F32, (16,), (1,)), View("d", F32, (16,), (1,))
    program = p.program(c, d)
    order = [o.name for o in program.operations]
    only = decide_in_place(program, order, kernel_safe=lambda op, old, new: (old, new) != ("b", "d"))
    assert only == {"d": "a", "c": "b"}


def test_the_emitter_has_the_last_word() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    program = p.program(p.pointwise("y", "neg", t))
    asked: list[tuple[str, str, str]] = []

    def never(op: KernelOp, old: str, new: str) -> bool:
        asked.append((op.name, old, new))
        return False

    found = plan_in_place(program, ["t", "y"], kernel_safe=never)
    assert found.taken == {}
    assert asked == [("y", "t", "y")]
    assert found.notes == (("y", "not in place of 't' at 'y': the emitted kernel would race"),)


def test_a_smaller_heir_only_where_the_peak_allows() -> None:
    """``y`` needs 3 rows of the 1024 that ``t`` has; it lives on while something large is made."""

    def build(large: int) -> Program:
        p = ProgramBuilder()
        p.pointwise("t", "neg", p.input("x", (1024, 16)))
        y = p.pointwise("y", "exp", View("t", F32, (3, 16), (16, 1)))
        p.kernel("large", Kernel((Range(X0, large),), (), (Constant(1.0, F32),), (Store("large", X0, 0, F32),)))
        p.buffer("large", (large,))
        return p.program(y, View("large", F32, (large,), (1,)))

    assert decide(build(20_000)) == {}
    found = plan_in_place(build(20_000), ["t", "y", "large"])
    assert "would raise the peak" not in dict(found.notes).get("y", "")  # unequal sizes are no note
    assert decide(build(16)) == {"y": "t"}


def test_larger_or_symbolic_sizes() -> None:
    p = ProgramBuilder()
    s, z = p.symbol("s0", 8), p.symbol("s1", 8)
    x = p.input("x", (s,))
    w = p.input("w", (z,))
    t = p.pointwise("t", "neg", x)
    y = p.pointwise("y", "neg", t)
    assert decide(p.program(y)) == {"y": "t"}
    del w
    p.buffers["y"] = replace(p.buffers["y"], nbytes=4 * z)  # equal at the hints only
    assert decide_in_place(p.program(y), ["t", "y"]) == {}


def test_alignment_and_device() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    program = p.program(p.pointwise("y", "neg", t))

    def with_y(**fields: object) -> Program:
        return replace(program, buffers={**program.buffers, "y": replace(program.buffers["y"], **fields)})  # type: ignore[arg-type]

    assert decide_in_place(with_y(alignment=256), ["t", "y"]) == {}
    assert decide_in_place(with_y(device="cuda:0"), ["t", "y"]) == {}
    assert decide_in_place(with_y(zero_fill=True), ["t", "y"]) == {}


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64])
def test_racing_kernel_is_refused(dtype: torch.dtype) -> None:
    """float32 to another size at the same index: a point overwrites what its neighbours still read."""
    p = ProgramBuilder()
    p.pointwise("t", "neg", p.input("x", (64,)))
    p.buffer("u", (64,), dtype=dtype)
    nodes = (Load("t", X0, F32), Cast(0, dtype))
    p.kernel("u", Kernel((Range(X0, 64),), (), nodes, (Store("u", X0, 1, dtype),)))
    y = p.pointwise("y", "neg", View("u", dtype, (64,), (1,)), dtype=dtype)
    program = p.program(y)
    assert "u" not in decide(program)
    if dtype is torch.int16:
        with pytest.raises(VerificationError, match="element"):
            verify_plan(plan_of(program, in_place={"u": "t"}))
        assert not sharing_is_harmless(program, {"u": "t"}, lambda: make_inputs(program))


def row_kernel(load: int, store_pass: int) -> Kernel:
    """Rows of 4: pass 0 sums the row read at ``load`` (0: straight, 1: reversed, 2: the next row's)."""
    index = 4 * X0 + R0
    read = {0: index, 1: 4 * X0 + 3 - R0, 2: 4 * X0 + R0 + 4}[load]
    nodes = (
        Load("t", read, F32),
        Reduce("sum", (0,), F32),
        Call("exp", (0,), F32),
        Constant(2.0, F32),
        Call("mul", (1, 3), F32),
    )
    value = {0: 2, 1: 4}[store_pass]
    stores = [Store("u", index, value, F32)]
    rows = 3 if load == 2 else 4
    if store_pass == 1:
        nodes = (*nodes, Load("z", R0, F32), Call("add", (4, 5), F32))
        stores = [Store("u", index, 6, F32)]
    return Kernel((Range(X0, rows),), (Range(R0, 4),), nodes, tuple(stores))


@pytest.mark.parametrize(
    ("load", "store_pass", "safe"),
    [(0, 0, True), (0, 1, True), (1, 0, False), (1, 1, True), (2, 0, False), (2, 1, False)],
)
def test_rows(load: int, store_pass: int, safe: bool) -> None:
    """A row may be read anyhow in passes before the one that writes it, and rows must not meet."""
    kernel = row_kernel(load, store_pass)
    assert (kernel_reason(kernel, "t", "u") == "") is safe
    p = ProgramBuilder()
    x, _ = p.input("x", (4, 4)), p.input("z", (4,))
    p.pointwise("t", "neg", x)
    rows = int(kernel.outer[0].size)
    u = p.buffer("u", (4, 4))
    p.kernel("u", kernel)
    program = p.program(p.pointwise("y", "neg", View("u", F32, (rows, 4), (4, 1))))
    verify_program(program)
    del u
    assert sharing_is_harmless(program, {"u": "t"}, lambda: make_inputs(program)) is safe
    if not safe:
        with pytest.raises(VerificationError, match="while reading it"):
            verify_plan(plan_of(program, in_place={"u": "t"}))
    assert ("u" in decide(program)) is safe


def test_read_again_in_a_later_pass() -> None:
    """``u`` is stored in pass 0, but pass 1 reads ``t`` again for ``v``."""
    index = 4 * X0 + R0
    nodes = (Load("t", index, F32), Call("exp", (0,), F32), Reduce("sum", (1,), F32), Call("div", (0, 2), F32))
    kernel = Kernel((Range(X0, 4),), (Range(R0, 4),), nodes, (Store("u", index, 1, F32), Store("v", index, 3, F32)))
    assert kernel_reason(kernel, "t", "u") == "it is read again after it is written"
    assert kernel_reason(kernel, "t", "v") == ""


def residual_norm(old: View, added: View, total: View, out: View) -> Kernel:
    """A residual sum, stored, and its normalised row (mean only): two passes over the row."""
    rows, columns = old.sizes
    index = columns * X0 + R0
    nodes = (
        Load(added.buffer, index, F32),
        Load(old.buffer, index, F32),
        Call("add", (0, 1), F32),
        Reduce("sum", (2,), F32),
        Constant(1.0 / int(columns), F32),
        Call("mul", (3, 4), F32),
        Call("sub", (2, 5), F32),
    )
    stores = (Store(total.buffer, index, 2, F32), Store(out.buffer, index, 6, F32))
    return Kernel((Range(X0, rows),), (Range(R0, columns),), nodes, stores)


def residual_program(kernel: Callable[[View, View, View, View], Kernel]) -> Program:
    p = ProgramBuilder()
    old = p.pointwise("old", "neg", p.input("x", (4, 8)))
    added = p.pointwise("added", "exp", p.input("y", (4, 8)))
    total, out = p.buffer("total", (4, 8)), p.buffer("out", (4, 8))
    p.kernel("norm", kernel(old, added, total, out))
    return p.program(p.pointwise("z", "add", total, out))


def test_a_residual_sum_takes_the_place_of_the_one_before() -> None:
    """The sum is known in the first pass, and stored in the second, the last that reads the terms."""
    program = residual_program(residual_norm)
    found = decide(program)
    assert found == {"total": "old", "out": "added", "z": "total"}
    assert sharing_is_harmless(program, found, lambda: make_inputs(program))
    order = [o.name for o in program.operations]
    peaks = [make_plan(program, order, in_place=taken).certificate.peak for taken in (found, {})]
    assert peaks == [2 * 4 * 8 * 4, 4 * 4 * 8 * 4]


def test_a_sum_that_later_passes_do_not_need_races() -> None:
    """The second pass reads one of the terms alone: the sum is stored in the first pass."""

    def racing(old: View, added: View, total: View, out: View) -> Kernel:
        kernel = residual_norm(old, added, total, out)
        return replace(kernel, nodes=(*kernel.nodes[:-1], Call("sub", (1, 5), F32)))

    program = residual_program(racing)
    assert decide(program)["total"] == "added"
    wrong = {"total": "old"}
    assert not sharing_is_harmless(program, wrong, lambda: make_inputs(program))
    with pytest.raises(VerificationError, match="reads 'old' in pass 1 over the row, when pass 0 has written 'total'"):
        verify_plan(plan_of(program, in_place=wrong))


def test_the_older_storage_goes_on() -> None:
    """Both inputs die; what was made last is freed first, as on a stack, which leaves no gap."""
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    a = p.pointwise("a", "neg", x)
    b = p.pointwise("b", "exp", x)
    y = p.pointwise("y", "add", b, a)
    assert decide(p.program(p.pointwise("z", "neg", y))) == {"y": "a", "z": "y"}


def test_masked_atomic_and_computed_stores() -> None:
    nodes = (Load("t", X0, F32), Call("isnan", (0,), torch.bool))
    plain = Kernel((Range(X0, 16),), (), nodes, (Store("u", X0, 0, F32),))
    masked = replace(plain, stores=(replace(plain.stores[0], mask=1),))
    twice = replace(plain, stores=(plain.stores[0], replace(plain.stores[0], index=X0 + 16)))
    assert kernel_reason(plain, "t", "u") == ""
    assert "masked" in kernel_reason(masked, "t", "u")
    assert "stores 2 times" in kernel_reason(twice, "t", "u")


def test_broadcast_reads_race() -> None:
    x1 = outer_symbol(1)
    ranges = (Range(X0, 4), Range(x1, 4))
    kernel = Kernel(ranges, (), (Load("t", x1, F32),), (Store("u", 4 * X0 + x1, 0, F32),))
    assert kernel_reason(kernel, "t", "u") == "a point reads what another writes"


def test_unlisted_externs_are_refused() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4, 4)))
    u = p.extern("u", "aten.mm.default", (t, t), (4, 4), contract=Contract.OUT)
    program = p.program(u)
    found = plan_in_place(program, ["t", "u"])
    assert found.taken == {}
    assert "aten.mm.default is not known to work element by element" in found.notes[0][1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choices)
def test_what_is_found_is_safe(steps: list[Choice]) -> None:
    """The independent verifier agrees, and shared storages give the same answers under adverse interleavings."""
    program = program_from(steps, donated=True)
    verify_program(program)
    found = decide(program)
    verify_plan(plan_of(program, in_place=found, pooled=False))
    assert sharing_is_harmless(program, found, lambda: make_inputs(program))


@settings(max_examples=40, deadline=None)
@given(choices)
def test_the_peak_never_rises(steps: list[Choice]) -> None:
    program = program_from(steps, donated=True)
    order = [op.name for op in program.operations]
    before = make_plan(program, order, in_place={})
    after = make_plan(program, order, in_place=decide_in_place(program, order))
    assert after.certificate.peak <= before.certificate.peak
    assert all(a <= b for a, b in zip(after.timeline, before.timeline, strict=True))


def test_reuse_is_decided_once_for_an_order() -> None:
    asked: list[tuple[str, str]] = []

    def safe(op: KernelOp, old: str, new: str) -> bool:
        asked.append((old, new))
        return True

    p = ProgramBuilder()
    x = p.input("x", (16, 16))
    program = p.program(p.pointwise("y", "neg", p.pointwise("t", "exp", x)))
    reuse = Reuse(program, safe)
    assert reuse.taken(("t", "y")) == {"y": "t"}
    assert reuse(("t", "y")) is reuse(("t", "y"))
    assert asked == [("t", "y")]
    assert Reuse(program, safe, enabled=False)(("t", "y")) is None
    assert Reuse(program, safe, enabled=False).taken(("t", "y")) == {}
