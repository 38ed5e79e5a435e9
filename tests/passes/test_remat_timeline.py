"""Live bytes of a step before it is lowered: what is stored, and what is made in the kernels that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from memplan.ir.joint import JointGraph, JointNode, NodeKind, Side
from memplan.passes.remat_menu import _Run, run_nodes
from memplan.passes.remat_segments import OUTSIDE, Segments
from memplan.passes.remat_timeline import peak_of

CALL, FUSED, INPUT = NodeKind.CALL, NodeKind.FUSED, NodeKind.INPUT
Row = tuple[str, NodeKind, tuple[int, ...], int, bool]


def graph_of(rows: Sequence[Row], sides: Sequence[Side] = ()) -> JointGraph:
    """Nodes of (name, kind, inputs, bytes, whether elementwise), of the forward where nothing else is said."""
    sides = sides or [Side.FORWARD] * len(rows)
    return JointGraph(
        tuple(
            JointNode(name, kind, side, inputs, k, nbytes, nbytes, 1.0, False, 1.0, nbytes, False, name, elementwise)
            for k, ((name, kind, inputs, nbytes, elementwise), side) in enumerate(zip(rows, sides, strict=True))
        )
    )


def gelu(*, elementwise: bool = True, reader: NodeKind = FUSED) -> JointGraph:
    """A product, a tanh of it, a product of both, and a kernel that reads all three."""
    return graph_of(
        [
            ("x", INPUT, (), 0, False),
            ("first", CALL, (0,), 100, False),
            ("tanh", FUSED, (1,), 100, elementwise),
            ("out", FUSED, (2, 1), 100, True),
            ("second", CALL, (3,), 10, False),
            ("later", reader, (2, 1, 4), 10, True),
        ]
    )


def test_what_later_kernels_read_is_made_in_them() -> None:
    # while the second product runs: the first, which is read later, what the second reads, and what it makes
    assert peak_of(gelu(), range(1, 6), {}, ()) == 100 + 100 + 10


@pytest.mark.parametrize("graph", [gelu(elementwise=False), gelu(reader=CALL)], ids=["a reduction", "read by a call"])
def test_what_is_stored_all_the_same(graph: JointGraph) -> None:
    assert peak_of(graph, range(1, 6), {}, ()) == 100 + 100 + 100 + 10


def test_what_takes_less_room_than_its_operand_is_stored() -> None:
    def peak(operand: int) -> int:
        rows: list[Row] = [
            ("x", INPUT, (), 0, False),
            ("first", CALL, (0,), operand, False),
            ("cast", FUSED, (1,), 100, True),
            ("between", CALL, (0,), 500, False),
            ("later", FUSED, (2,), 10, True),
        ]
        return peak_of(graph_of(rows), range(1, 5), {}, ())

    assert peak(200) == 500 + 100
    assert peak(50) == 500 + 50


def test_a_result_is_stored() -> None:
    assert peak_of(gelu(), range(1, 6), {}, {2}) == 100 + 100 + 100 + 10


def test_sums_that_the_forward_hands_on_are_alive_in_the_runs_that_they_pass() -> None:
    """Three segments: a sum made in the first is read in the last, and nothing of it is kept."""
    rows: list[Row] = [
        ("x", INPUT, (), 0, False),
        ("sum", CALL, (0,), 50, False),
        ("other", CALL, (0,), 8, False),
        ("read", CALL, (1,), 8, False),
        ("backward", CALL, (3,), 8, False),
    ]
    sides = [*[Side.FORWARD] * 4, Side.BACKWARD]
    graph = graph_of(rows, sides)
    nodes = list(graph.nodes)
    segments = Segments(JointGraph(tuple(nodes)), (OUTSIDE, 0, 1, 2, 2), 3)
    assert segments.carried == {}, "what later segments need again is kept, and counted as that"
    nodes[3] = replace(nodes[3], again=None)  # it must be saved: nothing that it is made of runs again
    segments = Segments(JointGraph(tuple(nodes)), (OUTSIDE, 0, 1, 2, 2), 3)
    assert segments.carried == {1: (0, 2)}
    peaks = [_Run(segments, s, 1, run_nodes(segments, s, 1)).item(()).forward for s in range(3)]
    assert peaks == [50, 50 + 8, 50 + 8]
    assert _Run(segments, 0, 2, run_nodes(segments, 0, 2)).item(()).forward == 50 + 8
