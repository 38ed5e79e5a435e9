"""The minimum cut against every choice there is, on small graphs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.joint import JointGraph, JointNode, NodeKind, Side
from memplan.passes.remat_menu import _Run, run_nodes
from memplan.passes.remat_segments import OUTSIDE, Segments
from memplan.passes.rematerialize import Kept, Value, choose_kept


def recomputed(values: Sequence[Value], kept: frozenset[int]) -> frozenset[int] | None:
    """What the backward computes again if ``kept`` is kept; None if it would need what cannot be computed again."""
    done: set[int] = set()
    stack = [k for k, v in enumerate(values) if v.needed and k not in kept]
    while stack:
        k = stack.pop()
        if k in done:
            continue
        if values[k].again is None:
            return None
        done.add(k)
        stack.extend(i for i in values[k].inputs if i not in kept)
    return frozenset(done)


def cost(values: Sequence[Value], kept: frozenset[int]) -> float | None:
    again = recomputed(values, kept)
    if again is None or any(values[k].keep is None for k in kept):
        return None
    return sum(values[k].keep or 0.0 for k in kept) + sum(values[k].again or 0.0 for k in again)


def cheapest(values: Sequence[Value]) -> float | None:
    """The lowest cost of any choice, by trying all of them."""
    positions = range(len(values))
    subsets = itertools.chain.from_iterable(itertools.combinations(positions, n) for n in range(len(values) + 1))
    costs = [c for s in subsets if (c := cost(values, frozenset(s))) is not None]
    return min(costs, default=None)


@st.composite
def graphs(draw: st.DrawFn) -> list[Value]:
    """Up to eight values; the first cannot be computed again and has no bytes, as an input has."""
    count = draw(st.integers(1, 8))
    values = [Value("input", 0.0, None, (), draw(st.booleans()))]
    numbers = st.one_of(st.none(), st.integers(0, 40).map(float))
    for k in range(1, count):
        inputs = tuple(sorted(draw(st.sets(st.integers(0, k - 1), min_size=1, max_size=min(3, k)))))
        values.append(Value(f"v{k}", draw(numbers), draw(numbers), inputs, draw(st.booleans())))
    return values


@given(graphs())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_no_choice_is_cheaper(values: list[Value]) -> None:
    best = cheapest(values)
    if best is None:
        with pytest.raises(ValueError, match="can neither be kept nor recomputed"):
            choose_kept(values)
        return
    found = choose_kept(values)
    kept = frozenset(found.kept)
    assert cost(values, kept) == best
    assert frozenset(found.recomputed) >= (recomputed(values, kept) or frozenset())
    assert found.nbytes == sum(values[k].keep or 0.0 for k in found.kept)
    assert not kept & set(found.recomputed)


@given(graphs())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_among_equals_the_least_is_recomputed(values: list[Value]) -> None:
    best = cheapest(values)
    if best is None:
        return
    found = choose_kept(values)
    positions = range(len(values))
    for n in range(len(values) + 1):
        for subset in map(frozenset, itertools.combinations(positions, n)):
            if cost(values, subset) == best:
                again = recomputed(values, subset)
                assert again is not None
                assert len(recomputed(values, frozenset(found.kept)) or ()) <= len(again)


def test_nothing_is_needed() -> None:
    assert choose_kept([Value("x", 0.0, None, ()), Value("y", 4.0, 1.0, (0,))]) == Kept((), (), 0.0)


def test_a_statistic_is_kept_and_the_row_recomputed() -> None:
    """A normalised row is pointwise in its input and two statistics: they are kept, it is not."""
    values = [
        Value("x", 4096.0, None, (), True),
        Value("mean", 4.0, 80.0, (0,)),
        Value("centred", 4096.0, 80.0, (0, 1)),
        Value("rsqrt", 4.0, 80.0, (2,)),
        Value("normalised", 4096.0, 20.0, (2, 3), True),
    ]
    found = choose_kept(values)
    assert [values[k].name for k in found.kept] == ["x", "mean", "rsqrt"]
    assert [values[k].name for k in found.recomputed] == ["centred", "normalised"]
    assert found.nbytes == 4096 + 8


def test_the_sum_is_kept_rather_than_its_terms() -> None:
    values = [Value("a", 100.0, None, ()), Value("b", 100.0, None, ()), Value("sum", 100.0, 2.0, (0, 1), True)]
    assert choose_kept(values).kept == (2,)


def test_a_view_is_recomputed_from_what_it_shows() -> None:
    values = [Value("product", 64.0, None, ()), Value("view", None, 0.0, (0,), True)]
    assert choose_kept(values) == Kept((0,), (1,), 64.0)


def test_sizes_of_terabytes_do_not_lose_order() -> None:
    """Capacities are scaled into 32 bits; what differs by a tenth still differs."""
    large = 2.0**42
    values = [Value("a", 1.1 * large, None, ()), Value("b", large, large * 0.001, (0,), True)]
    assert choose_kept(values).kept == (1,)


def test_what_only_goes_into_sums_that_are_kept_is_not_kept_itself() -> None:
    """Two slices of a loss: each adds to a gradient, which must be saved; its parts pass from slice to slice."""
    rows: list[tuple[str, Side, tuple[int, ...], float | None, bool]] = [
        ("x", Side.FORWARD, (), None, False),
        ("hidden", Side.FORWARD, (0,), 3.0, False),
        ("first", Side.FORWARD, (1,), 5.0, False),
        ("sum_1", Side.FORWARD, (2,), 5.0, False),
        ("second", Side.FORWARD, (1,), 5.0, False),
        ("sum_2", Side.FORWARD, (3, 4), 5.0, False),
        ("saved", Side.FORWARD, (5,), None, False),
        ("used", Side.FORWARD, (1,), 1.0, False),
        ("backward", Side.BACKWARD, (6, 7), None, True),
    ]
    nodes = tuple(
        JointNode(
            name, NodeKind.INPUT if not inputs else NodeKind.CALL, side, inputs, k, 8, None if result else 8, again,
            False, 1.0, 8, result, name,
        )
        for k, (name, side, inputs, again, result) in enumerate(rows)
    )  # fmt: skip
    segments = Segments(JointGraph(nodes), (OUTSIDE, 0, 1, 1, 2, 2, 2, 3, 0), 4)
    again = dict(zip((row[0] for row in rows), segments.again_for_backward, strict=True))
    assert [name for name, found in again.items() if found] == ["hidden", "used", "backward"]
    run = _Run(segments, 1, 1, run_nodes(segments, 1, 1))
    assert run.forced == [False, False]  # `first` and `sum_1`, which the next slice reads
