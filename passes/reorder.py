"""The order of operations that needs the least memory, with a certified bound on every order.

The program's operations and buffers are handed to the planner (`order_ops`) as plain numbers; what it gives back is a
permutation. Where nothing better is found, program order stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.program import EXTERNAL_KINDS, Extern, Program, all_views_buffers, evaluate, order_edges
from .order import OrderResult, order_ops
from .order_model import InPlacePair, OrderBuffer, OrderGraph
from .order_search import OrderSearch
from .schedule import UNCOUNTED, rounded


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order by names of operations, and its certificate in bytes."""

    order: tuple[str, ...]
    peak: int
    program_peak: int
    lower_bound: int
    note: str = ""


def order_graph(program: Program, in_place: Mapping[str, str]) -> OrderGraph:
    """The program as the planner's graph: what the caller keeps has no bytes, donated inputs die with their last use.

    Parameters
    ----------
    in_place:
        {new: old} pairs that are allowed (not forced) when the old one dies at the operation that makes the new one.
    """
    index = {op.name: k for k, op in enumerate(program.operations)}
    producer: dict[str, int] = {}
    uses: dict[str, set[int]] = {}
    edges: set[tuple[int, int]] = set()
    for k, op in enumerate(program.operations):
        for buffer in op.writes:
            first = producer.setdefault(buffer, k)
            if first != k:
                uses.setdefault(buffer, set()).add(k)
                edges.add((first, k))
        for buffer in (*op.reads, *all_views_buffers(op)):
            if producer.get(buffer) != k:
                uses.setdefault(buffer, set()).add(k)
    # a reader of a buffer that several operations write in parts comes after all of them
    for name, before in program.dependencies.items():
        for earlier in before:
            edges.add((index[earlier], index[name]))
    edges.update((index[a], index[b]) for a, b in order_edges(program.operations))
    numbers: dict[str, int] = {}
    buffers: list[OrderBuffer] = []
    leaving = program.output_buffers
    for b in program.buffers.values():
        external = b.kind in EXTERNAL_KINDS
        if (external and not b.donated) or (not external and b.name not in producer):
            continue
        if external and b.name not in uses and b.name not in leaving:
            # freed before anything could be put in another order: the planner would keep it to the end
            continue
        numbers[b.name] = len(buffers)
        consumers = tuple(sorted(uses.get(b.name, ())))
        # an arena is there whatever the order
        size = 0 if b.memory in UNCOUNTED else rounded(program.nbytes(b.name), b.device)
        buffers.append(OrderBuffer(size, -1 if external else producer[b.name], consumers, b.name in leaving))
    scratch = tuple(evaluate(op.scratch, program.hints) if isinstance(op, Extern) else 0 for op in program.operations)
    pairs = tuple(
        InPlacePair(producer[new], numbers[new], numbers[old])
        for new, old in in_place.items()
        if new in numbers and old in numbers
    )
    return OrderGraph(
        len(program.operations), tuple(buffers), tuple(sorted(e for e in edges if e[0] != e[1])), scratch, pairs
    )


def reorder(program: Program, in_place: Mapping[str, str], native: OrderSearch | None) -> Ordered:
    """The best order found; never one with a higher simulated peak than program order."""
    names: Sequence[str] = [op.name for op in program.operations]
    graph = order_graph(program, in_place)
    found: OrderResult = order_ops(graph, native=native)
    # below a thousandth nothing is gained that is worth leaving the order that the user can follow
    worth = found.peak < found.program_peak * 0.999
    order = tuple(names[k] for k in found.order) if worth else tuple(names)
    peak = found.peak if worth else found.program_peak
    return Ordered(order, peak, found.program_peak, found.lower_bound, found.note)
