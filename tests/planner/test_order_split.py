"""Graphs that fall into stretches: the same answers as for the whole, and sooner."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planner import randomly_wired
from memplan import planner
from memplan.passes import order_split
from memplan.passes.order import order_ops
from memplan.passes.order_model import OrderGraph, adjacency, is_order, live_bytes, peak_bytes
from memplan.passes.order_split import Stretch, order_stretches, stretch_starts, stretches

from .exhaustive import least_peak, peak_of
from .test_order import graphs, native, plain

__all__ = ["native"]


def always_split(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(order_split, "SMALLEST", 1)
    patch.setattr(order_split, "SHORTEST", 1)
    patch.setattr(order_split, "LARGEST_PART", 1.0)


def split(graph: OrderGraph) -> tuple[Stretch, ...]:
    program = range(graph.ops)
    starts = stretch_starts(adjacency(graph), program)
    return stretches(graph, program, starts) if starts else ()


def pinched(graph: OrderGraph, at: int) -> OrderGraph:
    """The graph with every operation before or after one of them."""
    edges = [(v, at) if v < at else (at, v) for v in range(graph.ops) if v != at]
    return dataclasses.replace(graph, edges=(*graph.edges, *edges))


@settings(max_examples=150, deadline=None)
@given(graphs(7), st.integers(0, 6))
def test_stretches_reach_the_least_peak(native, graph, at):
    graph = pinched(graph, min(at, graph.ops - 1))
    buffers, edges, scratch, pairs = plain(graph)
    least = least_peak(graph.ops, buffers, edges, scratch, pairs)
    with pytest.MonkeyPatch.context() as patch:
        always_split(patch)
        parts = split(graph)
    found = order_stretches(parts, native, tolerance=0.0, widest=2048, work=10**7, seconds=0.0, exact=True)
    assert [op for part in parts for op in part.ops] == list(range(graph.ops))
    assert is_order(graph, found.order)
    assert found.peak == peak_of(buffers, found.order, scratch, pairs) == least
    assert found.lower_bound == least
    assert found.program_peak == peak_bytes(graph, range(graph.ops))


@settings(max_examples=100, deadline=None)
@given(graphs(14), st.integers(0, 13))
def test_live_bytes_of_stretches_are_those_of_the_whole(graph, at):
    """Step by step, in the order as it was given."""
    graph = pinched(graph, min(at, graph.ops - 1))
    with pytest.MonkeyPatch.context() as patch:
        always_split(patch)
        parts = split(graph)
    steps = [b for part in parts for b in live_bytes(part.graph, range(part.graph.ops))]
    assert steps == live_bytes(graph, range(graph.ops))
    assert parts[0].graph.initial_bytes() == graph.initial_bytes()


def test_many_stages_are_proved_inside_a_compilation(native, monkeypatch):
    graph = randomly_wired(1, 30, 32)
    found = order_ops(graph, native=native)
    assert is_order(graph, found.order)
    assert found.peak == peak_bytes(graph, found.order)
    assert found.gap <= 0.0005
    monkeypatch.setattr(order_split, "SMALLEST", 10**9)
    assert order_ops(graph, native=native).gap > 0.01


def test_what_a_backward_needs_leads_past_every_operation():
    chain = randomly_wired(0, 10, 32)
    assert len(split(chain)) > 1
    last = chain.ops - 1
    saved = [dataclasses.replace(b, consumers=(*b.consumers, last)) if b.producer < last else b for b in chain.buffers]
    held = dataclasses.replace(chain, buffers=tuple(saved))
    assert split(held) == ()


def test_a_long_chain_is_split_into_few(native):
    ops = 20_000
    buffers = tuple(planner.OrderBuffer(4, v, (v + 1,) if v + 1 < ops else ()) for v in range(ops))
    graph = OrderGraph(ops, buffers)
    assert len(split(graph)) <= ops / order_split.SHORTEST + 1
    assert order_ops(graph, native=native).optimal
