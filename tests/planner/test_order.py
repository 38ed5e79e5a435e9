"""Orders: brute force on small graphs, properties on random ones, certificates on training graphs."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.planner import differentiated, randomly_wired
from memplan import planner
from memplan.ir.errors import PlanningError
from memplan.passes.order import NO_COMPILER, order_ops
from memplan.passes.order_bound import cut_bound, forced_bound
from memplan.passes.order_model import (
    InPlacePair,
    OrderBuffer,
    OrderGraph,
    adjacency,
    is_order,
    peak_bytes,
    topological_order,
)

from .exhaustive import least_peak, peak_of

DATA = Path(__file__).parents[1] / "data" / "planner"


@pytest.fixture(scope="module")
def native():
    search = planner.planner_libraries().order
    if search is None:
        pytest.skip(f"no C++ compiler: {planner.planner_libraries().note}")
    return search


@st.composite
def graphs(draw, most):
    ops = draw(st.integers(1, most))
    size = st.integers(0, 12)
    buffers = []
    for _ in range(draw(st.integers(0, 2))):
        consumers = draw(st.sets(st.integers(0, ops - 1), max_size=3))
        buffers.append(OrderBuffer(draw(size), -1, tuple(sorted(consumers)), draw(st.booleans())))
    for op in range(ops):
        for _ in range(draw(st.integers(0, 2))):
            later = draw(st.sets(st.integers(op + 1, ops - 1), max_size=3)) if op + 1 < ops else set()
            buffers.append(OrderBuffer(draw(size), op, tuple(sorted(later)), draw(st.booleans())))
    edges = tuple((op, op + 2) for op in range(ops - 2) if draw(st.integers(0, 5)) == 0)
    scratch = tuple(draw(st.sampled_from([0, 0, 0, 5])) for _ in range(ops))
    pairs = [
        InPlacePair(b.producer, o, i)
        for o, b in enumerate(buffers)
        for i, source in enumerate(buffers)
        if b.producer in source.consumers and draw(st.booleans())
    ]
    return OrderGraph(ops, tuple(buffers), edges, scratch, tuple(pairs))


def plain(graph):
    """The graph as what the exhaustive checks take."""
    buffers = [(b.size, b.producer, b.consumers, b.kept) for b in graph.buffers]
    pairs = [(p.op, p.output, p.input) for p in graph.in_place]
    return buffers, graph.edges, graph.scratch or (0,) * graph.ops, pairs


@settings(max_examples=80, deadline=None)
@given(graphs(6))
def test_small_graphs_reach_the_least_peak_and_bounds_hold(native, graph):
    buffers, edges, scratch, pairs = plain(graph)
    least = least_peak(graph.ops, buffers, edges, scratch, pairs)
    found = order_ops(graph, tolerance=0.0, native=native)
    assert is_order(graph, found.order)
    assert found.peak == peak_of(buffers, found.order, scratch, pairs)
    assert found.lower_bound <= least
    assert found.peak == least
    exact = order_ops(graph, tolerance=0.0, widest=0, native=native)  # no beam, so that the exact search decides
    assert is_order(graph, exact.order)
    assert exact.peak == exact.lower_bound == least
    cases = order_ops(graph, tolerance=0.0, widest=0, native=native, exact=False)  # neither: by cases alone
    assert is_order(graph, cases.order)
    assert cases.lower_bound <= least <= cases.peak == peak_of(buffers, cases.order, scratch, pairs)
    if not pairs:  # what in-place reuse saves is only bounded, and by then no pair may be left to decide
        assert cases.optimal
    python = order_ops(graph, tolerance=0.0)
    assert is_order(graph, python.order)
    assert python.lower_bound <= least <= python.peak <= python.program_peak
    near = adjacency(graph)
    for v in range(graph.ops):
        assert forced_bound(graph, near, v) <= cut_bound(graph, near, v) <= least


def with_two_pairs():
    """Operation 9 may write over either of two buffers. Freeing the one of no bytes before must not cost the other."""
    sizes = [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 2]
    made = [-1, -1, 0, 0, 1, 2, 3, 4, 4, 6, 6, 7, 8, 8, 9, 9]
    used = {3: (1, 2), 4: (2, 3, 7), 6: (4, 5, 9), 8: (6,), 9: (7, 8, 9), 11: (8, 9)}
    buffers = tuple(OrderBuffer(sizes[k], made[k], used.get(k, ())) for k in range(16))
    edges = ((0, 2), (1, 3), (3, 5), (4, 6), (6, 8), (7, 9))
    return OrderGraph(10, buffers, edges, in_place=(InPlacePair(9, 15, 6), InPlacePair(9, 15, 9)))


@settings(max_examples=80, deadline=None)
@given(graphs(14))
@example(with_two_pairs())
def test_the_exact_search_and_the_beam_agree(native, graph):
    """Two ways that share only the model of memory; where both decide, they found the same least peak."""
    exact = order_ops(graph, tolerance=0.0, widest=0, native=native)
    wide = order_ops(graph, tolerance=0.0, native=native)
    assert is_order(graph, exact.order)
    assert exact.peak == peak_bytes(graph, exact.order)
    assert wide.peak == peak_bytes(graph, wide.order)
    assert exact.optimal
    assert wide.optimal
    assert exact.peak == wide.peak
    cases = order_ops(graph, tolerance=0.0, widest=0, native=native, exact=False)
    assert is_order(graph, cases.order)
    assert cases.lower_bound <= exact.peak <= cases.peak == peak_bytes(graph, cases.order)


@settings(max_examples=40, deadline=None)
@given(graphs(14), st.integers(1, 5_000))
def test_bounds_by_cases_hold_wherever_the_work_ends(native, graph, work):
    """A search cut short in the middle of a case, or of a cut, proves less, not more."""
    least = order_ops(graph, tolerance=0.0, native=native).peak
    cases = order_ops(graph, tolerance=0.0, widest=0, native=native, exact=False, work_limit=work)
    assert cases.lower_bound <= least <= cases.peak == peak_bytes(graph, cases.order)


@settings(max_examples=40, deadline=None)
@given(graphs(40))
def test_never_worse_than_given_and_the_same_every_time(native, graph):
    buffers, _, scratch, pairs = plain(graph)
    given_peak = peak_of(buffers, range(graph.ops), scratch, pairs)
    for search in (native, None):
        found = order_ops(graph, work_limit=200_000, native=search)
        assert is_order(graph, found.order)
        assert found.program_peak == given_peak
        assert found.peak == peak_of(buffers, found.order, scratch, pairs) == peak_bytes(graph, found.order)
        assert found.lower_bound <= found.peak <= given_peak
        assert found == order_ops(graph, work_limit=200_000, native=search)
    assert found.note == NO_COMPILER


@pytest.mark.parametrize("inputs", planner.Inputs)
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("name", ["deeplab", "densenet121", "gpt2", "resnet50", "swin_t"])
def test_training_graphs_are_certified(native, name, optimizer, inputs):
    data = json.loads(gzip.decompress((DATA / f"{name}_train.json.gz").read_bytes()))
    graph = planner.graph_from_data(data, optimizer=optimizer, inputs=inputs)
    found = order_ops(graph, native=native)
    assert is_order(graph, found.order)
    assert peak_bytes(graph, found.order) == found.peak
    assert found.gap <= 0.002
    near = adjacency(graph)
    steps = planner.peak_bytes(graph, found.order)
    assert cut_bound(graph, near, found.order[0]) <= steps


def test_updates_are_numbered_after_the_operations():
    data = {
        "n": 2,
        "edges": [[0, 1]],
        "bufs": [
            {"size": 8, "prod": 0, "cons": [1], "out": True},
            {"size": 4, "prod": 1, "cons": [], "out": True},
            {"size": 16, "prod": 1, "cons": [], "out": True},
        ],
    }
    graph = planner.graph_from_data(data, optimizer=True)
    assert graph.ops == 4
    assert [b.consumers for b in graph.buffers] == [(1, 2), (), (3,)]
    assert [b.kept for b in graph.buffers] == [False, True, False]


def test_an_output_takes_over_a_dying_input():
    buffers = (OrderBuffer(100, -1, (0,)), OrderBuffer(100, 0, (), True))
    assert peak_bytes(OrderGraph(1, buffers), (0,)) == 200
    shared = OrderGraph(1, buffers, in_place=(InPlacePair(0, 1, 0),))
    assert peak_bytes(shared, (0,)) == 100
    assert order_ops(shared).optimal


def test_a_cycle_is_shown():
    graph = OrderGraph(4, (OrderBuffer(1, 1, (2,)),), edges=((0, 1), (2, 3), (3, 1)))
    with pytest.raises(PlanningError, match=r"cycle: 1 -> 2 -> 3 -> 1|cycle: 2 -> 3 -> 1 -> 2|cycle: 3 -> 1 -> 2 -> 3"):
        order_ops(graph)


def test_operations_numbered_out_of_order_are_put_in_order(native):
    graph = OrderGraph(3, (OrderBuffer(4, 2, (0,)), OrderBuffer(4, 0, (1,))))
    assert topological_order(graph) == (2, 0, 1)
    assert order_ops(graph, native=native).order == (2, 0, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OrderGraph(1, (OrderBuffer(-1, 0),)), "negative size"),
        (lambda: OrderGraph(1, (OrderBuffer(float("nan"), 0),)), "whole number"),
        (lambda: OrderGraph(1, (OrderBuffer(1, 3),)), "no operation 3"),
        (lambda: OrderGraph(1, (OrderBuffer(1, 0, (9,)),)), "no operation 9"),
        (lambda: OrderGraph(1, (OrderBuffer(2**62, 0),)), "64-bit"),
        (lambda: OrderGraph(1, (), ((0, 4),)), "edge"),
        (lambda: OrderGraph(2, (), (), (1,)), "scratch"),
        (lambda: OrderGraph(1, (OrderBuffer(1, 0),), in_place=(InPlacePair(0, 0, 0),)), "in-place"),
    ],
)
def test_bad_graphs_are_refused(build, message):
    with pytest.raises(PlanningError, match=message):
        build()


def wired(seed, ops=100, reach=12):
    """A layered tangle: each operation reads one to three of the dozen before it, sizes of 1 to 16 units."""
    draw = random.Random(seed)
    reads = [sorted({draw.randrange(max(0, k - reach), k) for _ in range(draw.choice([1, 2, 3]))}) if k else []
             for k in range(ops)]  # fmt: skip
    consumers = [tuple(k for k in range(ops) if v in reads[k]) for v in range(ops)]
    return OrderGraph(ops, tuple(OrderBuffer(draw.choice([1, 2, 4, 16]), v, consumers[v]) for v in range(ops)))


@pytest.mark.parametrize("seed", range(6))
def test_wired_graphs_get_within_two_percent_inside_a_compilation(native, seed):
    """Narrow beams stop with work left where the gap is still open."""
    graph = wired(seed)
    found = order_ops(graph, native=native)
    assert is_order(graph, found.order)
    assert found.gap <= 0.02


@pytest.mark.parametrize(("seed", "least"), [(0, 208_730), (3, 261_351)])
def test_wide_graphs_are_annealed(native, seed, least):
    """One stage of 100 operations: 30 and more can run at a time, and narrow beams end 11 and 4 % above the least."""
    graph = randomly_wired(seed, 1, 100)
    found = order_ops(graph, native=native)
    assert is_order(graph, found.order)
    assert least <= found.peak <= 1.002 * least


@pytest.mark.parametrize("seed", [1, 2])
def test_cases_prove_what_single_cuts_leave_open(native, seed):
    """A cut sees one moment, not that of two operations one must wait for the other."""
    graph = differentiated(seed, 50, joint=True)
    cases = order_ops(graph, tolerance=0.0, native=native, work_limit=60_000_000)
    assert is_order(graph, cases.order)
    assert cases.optimal
    without = order_ops(graph, tolerance=0.0, native=native, work_limit=60_000_000, widest=8)
    assert without.lower_bound <= cases.peak <= without.peak
    assert without.gap > 0.02
