"""Pools of a forward and its backward together: plans that verify, slabs that die as a whole, fewer reserved bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.plan import InPlaceOf, InPool, Plan
from memplan.ir.program import BufferKind, Contract, Phase, Program, View
from memplan.ir.verify_plan import verify_plan
from memplan.passes import core_pool as core_pool_module
from memplan.passes import step_pools
from memplan.passes.allocator import MIB, CachingAllocator
from memplan.passes.allocator_replay import FREE, RESERVE, Requests, replay_steps, top_up
from memplan.passes.core_pool import core_pool
from memplan.passes.inplace import decide_in_place
from memplan.passes.pools import Pooled
from memplan.passes.reserved import StepMemory, optimizer_step_memory, step_memory
from memplan.passes.schedule import make_plan
from memplan.passes.step_pools import LIVE_TOLERANCE, StepPools, choose_step_pools
from memplan.passes.whole_step import Laid, whole_step
from memplan.planner import planner_libraries
from tests.generated import Choice, _step, choices, program_from
from tests.programs import ProgramBuilder

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
Joins = list[tuple[str, str]]


def laid(program: Program, *, in_place: bool = True) -> Laid:
    order = tuple(op.name for op in program.operations)
    return Laid(program, order, decide_in_place(program, order) if in_place else {})


def planned(pair: Sequence[Laid], chosen: StepPools, device: str) -> list[Plan]:
    """Both plans, verified."""
    plans = []
    for k, one in enumerate(pair):
        pooled = chosen.pooled[k]
        plan = make_plan(
            one.program,
            one.order,
            in_place=one.in_place,
            pools=pooled.pools,
            offsets=pooled.offsets,
            slabs=chosen.slabs if k else (),
            reserve={device: chosen.reserve} if k == 0 and chosen.reserve else None,
        )
        verify_plan(plan)
        plans.append(plan)
    return plans


def pair_from(ahead: Sequence[Choice], behind: Sequence[Choice], kept: int) -> tuple[list[Laid], Joins]:
    """A forward that saves ``kept`` of its values, and a backward that reads them and returns some of what it makes."""
    forward = program_from(ahead)
    made = [b.name for b in forward.buffers.values() if b.kind is not BufferKind.INPUT]
    public = {o.buffer for o in forward.outputs}  # type: ignore[union-attr]
    saved = [n for n in made if n not in public and forward.buffers[n].dtype.itemsize == 4][:kept]
    views = {v.buffer: v for op in forward.operations for v in _written(op)}
    saved = [n for n in saved if n in views]
    buffers = {n: replace(b, kind=BufferKind.SAVED) if n in saved else b for n, b in forward.buffers.items()}
    forward = replace(
        forward,
        phase=Phase.FORWARD,
        buffers={n: replace(b, kind=BufferKind.OUTPUT) if n in public and n in made else b for n, b in buffers.items()},
        outputs=(*forward.outputs, *(views[n] for n in saved)),
    )
    p = ProgramBuilder()
    values = [p.input("tangent", (4, 4)), *(p.input(f"{n}_s", (4, 4), donated=True) for n in saved)]
    for k, (kind, first, second) in enumerate(behind):
        values.append(_step(p, f"b{k}", kind, values[-1 - first % len(values)], values[-1 - second % len(values)]))
    backward = replace(p.program(values[-1], values[len(values) // 2]), phase=Phase.BACKWARD)
    return [laid(forward), laid(backward)], [(n, f"{n}_s") for n in saved]


def _written(op: object) -> list[object]:
    results = [v for v in getattr(op, "results", ()) if v is not None]
    target = getattr(op, "target", None)
    return results + ([target] if hasattr(target, "buffer") else [])


@SETTINGS
@given(choices, choices, st.integers(0, 6), st.booleans())
def test_plans_of_a_step_verify(ahead: list[Choice], behind: list[Choice], kept: int, always: bool) -> None:
    pair, joins = pair_from(ahead, behind, kept)
    chosen = choose_step_pools(pair, joins, "cpu", pack=None, replay=None, always=always)
    forward, backward = planned(pair, chosen, "cpu")
    inside = {m for slab in chosen.slabs for m in slab.members}
    for name, placement in backward.placements.items():
        if name in backward.program.output_buffers:
            assert not isinstance(placement, InPool)
            assert backward.storage_of(name) not in inside
    for earlier, later in joins:
        place = forward.placements[forward.storage_of(earlier)]
        assert (isinstance(place, InPool) and place.pool.startswith("slab")) == (later in inside)


def layers(count: int, elements: int, device: str = "cuda:0") -> tuple[list[Laid], Joins]:
    """A chain whose layers each save two values of other sizes; the backward reads them last to first."""
    f = ProgramBuilder("forward")
    x = f.input("x", (elements,))
    saved = []
    for k in range(count):
        big = f.extern(f"big{k}", "aten.repeat.default", (x, [1]), (elements * (1 + k % 3),), contract=Contract.OUT)
        low = f.extern(f"low{k}", "aten.repeat.default", (big, [1]), (elements // 2,), contract=Contract.OUT)
        x = f.extern(f"x{k}", "aten.repeat.default", (low, [1]), (elements,), contract=Contract.OUT)
        saved += [big, low]
    forward = f.program(x, *saved)
    b = ProgramBuilder("backward")
    g = b.input("g", (elements,))
    received = {v.buffer: b.input(f"{v.buffer}_s", v.sizes, donated=True) for v in saved}
    out = []
    for k in reversed(range(count)):
        wide = b.extern(f"w{k}", "aten.add.Tensor", (g, received[f"low{k}"]), (elements * 2,), contract=Contract.OUT)
        g = b.extern(f"g{k}", "aten.add.Tensor", (wide, received[f"big{k}"]), (elements,), contract=Contract.OUT)
        out.append(b.extern(f"p{k}", "aten.add.Tensor", (g, g), (elements + 1000,), contract=Contract.OUT))
    backward = b.program(*out)
    names = {v.buffer for v in saved}

    def on(program: Program, phase: Phase) -> Program:
        buffers = {}
        for n, buffer in program.buffers.items():
            kind = BufferKind.SAVED if n in names else buffer.kind
            buffers[n] = replace(buffer, device=device, kind=kind)
        operations = tuple(replace(op, device=device) for op in program.operations)
        return replace(program, buffers=buffers, operations=operations, phase=phase)

    pair = [laid(on(forward, Phase.FORWARD), in_place=False), laid(on(backward, Phase.BACKWARD), in_place=False)]
    return pair, [(n, f"{n}_s") for n in sorted(names)]


@pytest.mark.parametrize("native", [True, False])
def test_less_is_reserved(native: bool) -> None:
    """Against own allocations; live bytes grow by no more than is said; the plans' own figures agree."""
    pair, joins = layers(12, 3 * MIB)
    libraries = planner_libraries()
    replay = libraries.replay if native else None
    chosen = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=replay)
    plans = planned(pair, chosen, "cuda:0")
    received = {later: earlier for earlier, later in joins}
    own = step_memory([make_plan(p.program, p.order, in_place={}) for p in pair], received)
    found = step_memory(plans, received)
    assert found.reserved < own.reserved
    assert found.live <= own.live * (1 + LIVE_TOLERANCE)
    assert found.reserved <= 1.03 * own.live
    again = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=replay)
    assert again == chosen


def test_under_a_budget_reserved_bytes_of_the_step_itself_come_first() -> None:
    """What is alive for a moment costs nothing then, and steps with an optimiser count for less."""
    libraries = planner_libraries()
    gained = []
    for count, elements in ((3, 5 * MIB), (5, 7 * MIB), (9, 9 * MIB)):
        pair, joins = layers(count, elements)
        received = {later: earlier for earlier, later in joins}

        def reserved(budget: bool, pair: list[Laid] = pair, joins: Joins = joins, received: object = received) -> int:
            chosen = choose_step_pools(
                pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay, budget=budget
            )
            return step_memory(planned(pair, chosen, "cuda:0"), received).reserved  # type: ignore[arg-type]

        gained.append(reserved(False) - reserved(True))
    assert sorted(gained)[1] > 20 * MIB
    assert sum(gained) > 50 * MIB


def test_gradients_held_and_an_optimizers_tensors_are_counted() -> None:
    """Of a step with two passes: gradients are held while the second runs, the update has a third tensor for each."""
    pair, joins = layers(4, 2 * MIB)
    plans = [make_plan(p.program, p.order, in_place={}) for p in pair]
    received = {later: earlier for earlier, later in joins}
    one, gradients = step_memory(plans, received), sum(plans[1].program.nbytes(f"p{k}") for k in range(4))
    found = optimizer_step_memory(plans, received, states=0)
    assert found.resident == one.resident
    assert found.live - one.live == pytest.approx(gradients, abs=4 * 512)
    assert found.reserved >= found.live
    adam = optimizer_step_memory(plans, received, states=2)
    assert adam.live - found.live == pytest.approx(2 * gradients, abs=8 * 512)
    alone = optimizer_step_memory(plans, received, states=0, passes=1)
    assert alone.live == max(one.live, one.resident + 2 * (found.live - one.live))


def test_held_gradients_and_states_are_reserved_for_as_the_plans_say() -> None:
    """The requests that a choice is judged by, and the plans made of it, in steps that accumulate and update."""
    pair, joins = layers(12, 3 * MIB)
    libraries = planner_libraries()
    chosen = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay)
    received = {later: earlier for earlier, later in joins}
    own = optimizer_step_memory([make_plan(p.program, p.order, in_place={}) for p in pair], received)
    found = optimizer_step_memory(planned(pair, chosen, "cuda:0"), received)
    assert found.reserved < own.reserved
    requests = whole_step(pair, joins, "cuda:0").requests((), frozenset())
    replayed = replay_steps(requests.accumulated(), steps=1, native=None)
    assert (replayed.live, replayed.reserved) == (own.live, own.reserved)
    alone = replay_steps(requests.accumulated(passes=1, states=0), steps=1, native=None)
    plans = [make_plan(p.program, p.order, in_place={}) for p in pair]
    assert alone.live == optimizer_step_memory(plans, received, passes=1, states=0).live


def test_small_pools_are_chosen_where_one_would_not_fit_between_held_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice for a step by itself takes what is nearly all bytes whole; the next pass cannot."""
    pair, joins = layers(12, 3 * MIB)
    libraries = planner_libraries()
    received = {later: earlier for earlier, later in joins}

    def reserved() -> int:
        chosen = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay)
        return optimizer_step_memory(planned(pair, chosen, "cuda:0"), received).reserved

    both = reserved()
    monkeypatch.setattr(step_pools, "PASSES", ())
    assert both < reserved()


@pytest.mark.parametrize(("count", "elements"), [(12, 3 * MIB), (9, 700_000)])
def test_more_room_in_a_reserve_saves_or_is_not_taken(
    count: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries, (pair, joins) = planner_libraries(), layers(count, elements)
    received = {later: earlier for earlier, later in joins}

    def found() -> StepMemory:
        chosen = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay)
        return step_memory(planned(pair, chosen, "cuda:0"), received)

    own = step_memory([make_plan(p.program, p.order, in_place={}) for p in pair], received)
    monkeypatch.setattr(step_pools, "ENOUGH", 1.0)  # it is always tried
    more = found()
    monkeypatch.setattr(step_pools, "LARGER_RESERVES", ())
    assert more.reserved <= found().reserved + step_pools.ALLOCATION * 200
    assert more.live <= own.live * (1 + LIVE_TOLERANCE)


def attending(count: int, elements: int, *, in_place: bool = False, early: bool = False) -> Laid:
    """Blocks of a call that allocates its own result between temporaries of several sizes, without gradients.

    ``in_place``: the sum over all blocks stays in one place, and what each block adds lives across the next one's call.
    ``early``: it is added before that call, and only the sum lives across.
    """
    p = ProgramBuilder("blocks")
    x = p.input("x", (2 * elements,))
    pairs: dict[str, str] = {}

    def call(name: str, size: int, *args: View, contract: Contract = Contract.OUT, over: View | None = None) -> View:
        if over is None:
            return p.extern(name, "aten.repeat.default", (*args, [1]), (size,), contract=contract)
        made = p.extern(name, "aten.add.out", args, (size,), contract=contract)
        pairs[made.buffer] = over.buffer
        return made

    y = call("y", elements, x)
    for k in range(count):
        if early:
            x = call(f"first{k}", 2 * elements, x, y, over=x)
        normed = call(f"normed{k}", elements, x, y, over=y if early else None)
        parts = [call(f"part{k}_{n}", elements, normed) for n in range(3)]
        mixed = call(f"mixed{k}", elements, *parts, contract=Contract.FRESH)
        out = call(f"out{k}", elements, mixed)
        if in_place or early:
            total = call(f"x{k}", 2 * elements, x, *(() if early else (y,)), out, over=x)
            out = call(f"low{k}", elements, y if not early else out, out, total, over=out if early else y)
            x = total
        else:
            x = call(f"x{k}", 2 * elements, x, y, out)
        hidden = call(f"hidden{k}", 4 * elements, out)
        y = call(f"y{k}", elements, hidden)
    pairs = {later: earlier for later, earlier in pairs.items() if earlier != "x"}  # the input is the caller's
    program = p.program(call("last", 1, x, y))
    buffers = {n: replace(b, device="cuda:0") for n, b in program.buffers.items()}
    operations = tuple(replace(op, device="cuda:0") for op in program.operations)
    one = laid(replace(program, buffers=buffers, operations=operations, phase=Phase.INFERENCE), in_place=False)
    return replace(one, in_place=pairs)


def alone(one: Laid) -> tuple[StepMemory, Plan]:
    """What a program needs with the pools that are chosen for it, and its plan."""
    libraries = planner_libraries()
    chosen = choose_step_pools([one], (), "cuda:0", pack=libraries.pack, replay=libraries.replay)
    plans = planned([one], chosen, "cuda:0")
    return step_memory(plans), plans[0]


def test_what_lives_across_calls_that_allocate_lies_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    one = attending(8, 9 * MIB, in_place=True)

    own = step_memory([make_plan(one.program, one.order, in_place=one.in_place)])
    memory, plan = alone(one)
    assert memory.reserved <= 1.01 * own.live < own.reserved
    assert memory.live <= own.live
    assert len(plan.pools) == 1
    inside = {n for n, place in plan.placements.items() if isinstance(place, InPool)}
    assert {"x0", "y0", "y3"} <= inside
    assert not {"hidden3", "part3_0", "normed3"} & inside
    monkeypatch.setattr(step_pools, "CUTS", tuple(c for c in step_pools.CUTS if c != step_pools.CORE))
    assert alone(one)[0].reserved > 1.04 * own.live


def test_what_comes_beside_something_large_in_every_layer_has_its_place_in_a_wide_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = attending(8, 9 * MIB, early=True)

    own = step_memory([make_plan(one.program, one.order, in_place=one.in_place)])
    memory, plan = alone(one)
    assert memory.reserved <= 1.01 * own.live < own.reserved
    assert memory.live <= own.live
    inside = {plan.storage_of(n) for n, place in plan.placements.items() if isinstance(place, InPool)}
    assert {plan.storage_of(n) for n in ("x3", "low3", "y3")} <= inside
    assert not {"hidden3", "part3_0", "mixed3"} & inside
    monkeypatch.setattr(step_pools, "CUTS", tuple(c for c in step_pools.CUTS if c != step_pools.WIDE))
    assert alone(one)[0].reserved > 1.04 * own.live


def test_no_core_where_no_call_allocates_or_nothing_lives_across_one() -> None:
    pair, joins = layers(6, 4 * MIB)
    step = whole_step(pair, joins, "cuda:0")
    for owner, one in enumerate(pair):
        assert step.allocating_calls(owner, MIB) == []
        assert core_pool(one.movable, [], step.alive(owner), "cuda:0", native=None, name="pool") == Pooled()
    one = attending(1, 4 * MIB)
    step = whole_step([one], (), "cuda:0")
    (call,) = step.allocating_calls(0, MIB)
    assert one.order[call] == "mixed0"
    assert step.allocating_calls(0, 64 * MIB) == []
    assert core_pool(one.movable, [call], step.alive(0), "cuda:0", native=None, name="pool") == Pooled()  # y alone


@SETTINGS
@given(choices, st.lists(st.integers(0, 12), max_size=4))
def test_core_pools_verify(steps: list[Choice], calls: list[int]) -> None:
    """Whatever steps are said to allocate: members do not meet, and moves into the pool never raise the peak."""
    one = laid(program_from(steps))
    alive = whole_step([one], (), "cpu").alive(0)
    calls = [c for c in calls if c < len(alive)]
    peaks = []
    for wide, most in ((False, "MOST_MOVES"), (True, "MOST_MOVES_WIDE")):
        for moves in (0, getattr(core_pool_module, most)):
            with mock.patch.object(core_pool_module, most, moves):
                pooled = core_pool(one.movable, calls, alive, "cpu", native=None, name="pool", wide=wide)
            plan = make_plan(
                one.program, one.order, in_place=one.in_place, pools=pooled.pools, offsets=pooled.offsets or {}
            )
            verify_plan(plan)
            peaks.append(max(plan.timeline))
    assert peaks[1] <= peaks[0]
    assert peaks[3] <= peaks[2]


def test_more_is_alive_where_that_saves_several_times_as_many_reserved_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries, one = planner_libraries(), attending(8, 3 * MIB)

    def found() -> StepMemory:
        chosen = choose_step_pools([one], (), "cuda:0", pack=libraries.pack, replay=libraries.replay)
        return step_memory(planned([one], chosen, "cuda:0"))

    priced = found()
    monkeypatch.setattr(step_pools, "LIVE_PRICE", 10**6)
    never = found()
    assert never.live < priced.live
    assert priced.reserved + 2 * (priced.live - never.live) < never.reserved


def test_a_small_step_has_nothing_more_alive_for_fewer_allocations() -> None:
    """All of it fits the segment that the allocator has for small tensors: pools with holes would save no byte."""
    libraries, (pair, joins) = planner_libraries(), layers(30, 256)
    chosen = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay)
    received = {later: earlier for earlier, later in joins}
    own = step_memory([make_plan(one.program, one.order, in_place={}) for one in pair], received)
    found = step_memory(planned(pair, chosen, "cuda:0"), received)
    assert (found.reserved, found.live) <= (own.reserved, own.live)
    pooled = choose_step_pools(pair, joins, "cuda:0", pack=libraries.pack, replay=libraries.replay, always=True)
    assert step_memory(planned(pair, pooled, "cuda:0"), received).live > own.live


def test_a_reserve_is_made_of_what_is_alive_at_the_peak() -> None:
    pair, joins = layers(8, 4 * MIB)
    step = whole_step(pair, joins, "cuda:0")
    requests = step.requests((), frozenset())
    assert step.large_peak(requests, MIB) + sum(step.resident) == replay_steps(requests, steps=1, native=None).live
    assert step.peak_expression(frozenset()) is None


def test_gradients_in_place_of_saved_values_keep_them_out_of_slabs() -> None:
    pair, joins = layers(4, MIB)
    behind = replace(pair[1], in_place={"p2": "big2_s"})
    assert isinstance(make_plan(behind.program, behind.order, in_place=behind.in_place).placements["p2"], InPlaceOf)
    chosen = choose_step_pools((pair[0], behind), joins, "cuda:0", pack=None, replay=None, always=True)
    members = {m for slab in chosen.slabs for m in slab.members}
    assert members
    assert "big2_s" not in members
    planned((pair[0], behind), chosen, "cuda:0")


def test_a_choice_for_the_forward_can_be_kept() -> None:
    pair, joins = layers(6, MIB)
    first = choose_step_pools(pair, joins, "cuda:0", pack=None, replay=None, always=True)
    other = laid(pair[1].program)  # planned again, for another reason
    other = replace(other, in_place={n: o for n, o in other.in_place.items() if not n.startswith("p")})
    second = choose_step_pools((pair[0], other), joins, "cuda:0", pack=None, replay=None, always=True, fixed=first)
    assert second.slabs == first.slabs
    assert second.pooled[0].offsets == first.pooled[0].offsets
    planned((pair[0], other), second, "cuda:0")


def test_a_reserve_has_the_bytes_of_segments_that_nothing_is_in() -> None:
    allocator = CachingAllocator()
    held, *free = [allocator.alloc(32 * MIB) for _ in range(5)]
    for handle in free:
        allocator.free(handle)
    top_up(allocator, 128 * MIB)
    assert allocator.stats.reserved == 5 * 32 * MIB  # four blocks are room enough
    top_up(allocator, 256 * MIB)
    assert allocator.stats.reserved == 32 * MIB + 256 * MIB == allocator.stats.peak_reserved
    assert allocator.free_in_blocks(256 * MIB) == 256 * MIB
    allocator.free(held)


sizes = st.sampled_from([0, 1, 511, 512, 1000, 2**20 - 1, 2**20, 2**20 + 1, 3 * MIB, 9 * MIB, 10 * MIB, 25 * MIB + 7])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(sizes, st.integers(0, 9)), max_size=40), st.lists(sizes, max_size=4), sizes, st.integers(1, 3)
)
def test_the_compiled_replay_is_the_simulator(
    given_sizes: list[tuple[int, int]], resident: list[int], reserve: int, steps: int
) -> None:
    replay = planner_libraries().replay
    assert replay is not None
    events: list[tuple[object, int]] = [("reserve", RESERVE)]
    live: list[int] = []
    for k, (size, frees) in enumerate(given_sizes):
        events.append((k, size))
        live.append(k)
        if frees < 5:
            events.append((live.pop(frees % len(live)), FREE))
        elif frees == 9:
            events.append(("reserve", RESERVE))
    events += [(k, FREE) for k in live]
    requests = Requests.of(resident, events)  # type: ignore[arg-type]
    python = replay_steps(requests, reserve=reserve, steps=steps, native=None)
    assert replay_steps(requests, reserve=reserve, steps=steps, native=replay) == python
