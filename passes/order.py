"""The order of operations: small peaks of live bytes, with a proof of how far they can be from the least.

A portfolio (program order, least peak memory first forwards and from the end, depth and breadth first, randomised
with fixed seeds), a lower bound by forced live sets and minimum cuts, a beam over downsets around the peak while the
gap to the bound is open, and on small graphs simulated annealing beside it; then branch and bound over which of two
operations runs first, each case bounded by cuts of its own; and on small graphs an exact search from both ends for what
is left. Graphs that fall into stretches are searched stretch by stretch. The result is never worse than the order that
was given.

Finding the least peak is one-shot black pebbling, strongly NP-complete (arXiv 2312.13526), hence the certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .order_beam import beam
from .order_bound import cut_bound, forced_bound
from .order_greedy import breadth_first, depth_first, least_peak_first
from .order_model import Adjacency, OrderGraph, adjacency, is_order, live_bytes, peak_bytes, topological_order
from .order_search import OrderSearch
from .order_split import order_stretches, stretch_starts, stretches

#: Work inside a compilation: at most some tenths of a second where the gap stays open, more for large graphs.
COMPILE_WORK = 10_000_000
COMPILE_WORK_PER_OPERATION = 500
#: Where the peak is within this of the bound, the search stops.
TOLERANCE = 0.0005
NO_COMPILER = "no C++ compiler: greedy orders and bounds in Python, a narrow beam on small graphs only"
_LARGEST_PYTHON_BEAM = 300
_PYTHON_CUTS = 4


@dataclass(frozen=True, slots=True)
class OrderResult:
    """An order of operation indices and its certificate, in bytes.

    ``program_peak`` is the peak of the order that was given, ``lower_bound`` what no order goes below under the
    graph's own model of memory (in-place pairs included).
    """

    order: tuple[int, ...]
    peak: int
    program_peak: int
    lower_bound: int
    note: str = ""
    work: int = 0

    @property
    def gap(self) -> float:
        """``peak / lower_bound - 1``."""
        return self.peak / self.lower_bound - 1 if self.lower_bound else 0.0

    @property
    def optimal(self) -> bool:
        """Whether no order has a lower peak."""
        return self.peak <= self.lower_bound


def order_ops(
    graph: OrderGraph,
    *,
    work_limit: int | None = None,
    tolerance: float = TOLERANCE,
    widest: int = 2048,
    seconds: float = 0.0,
    native: OrderSearch | None = None,
    exact: bool = True,
) -> OrderResult:
    """Put operations in an order with a small peak; deterministic unless ``seconds`` sets a time limit.

    Parameters
    ----------
    work_limit
        Elementary steps (some fifty million a second), by default what is fit for use inside a compilation; ignored
        by the Python way, which does a fixed amount.
    tolerance
        Relative gap to the lower bound at which the search is content.
    widest
        The most sets that a beam keeps.
    native
        The compiled search; without it the result's note says what was left out.
    exact
        Whether small graphs are searched exactly at the end; by cases they are in any case.

    Raises
    ------
    PlanningError
        The graph has a cycle.
    """
    near = adjacency(graph)
    identity = tuple(range(graph.ops))
    forward = all(not ops or ops[-1] < op for op, ops in enumerate(near.before))
    program = identity if forward else topological_order(graph, near)
    if graph.ops == 0:
        initial = graph.initial_bytes()
        return OrderResult((), initial, initial, initial)
    if native is None:
        return _order_in_python(graph, near, program, tolerance)
    if work_limit is None:
        work_limit = COMPILE_WORK + COMPILE_WORK_PER_OPERATION * graph.ops
    starts = stretch_starts(near, program)
    # in most graphs that can be split there is nothing to gain
    found = native.run(graph, program, tolerance=tolerance, widest=0, work=0, exact=False) if starts else None
    if found is not None and found.peak - found.lower_bound > tolerance * found.lower_bound:
        parts = stretches(graph, program, starts)
        found = order_stretches(
            parts, native, tolerance=tolerance, widest=widest, work=work_limit, seconds=seconds, exact=exact
        )
    elif found is None:
        found = native.run(
            graph, program, tolerance=tolerance, widest=widest, work=work_limit, seconds=seconds, exact=exact
        )
    return OrderResult(found.order, found.peak, found.program_peak, found.lower_bound, work=found.work)


def _order_in_python(graph: OrderGraph, near: Adjacency, program: tuple[int, ...], tolerance: float) -> OrderResult:
    best, steps = program, live_bytes(graph, program, near)
    initial = graph.initial_bytes()
    program_peak = peak = max(initial, *steps)
    bound = initial

    def good() -> bool:
        return peak - bound <= tolerance * bound

    def highest(count: int) -> list[int]:
        return [best[i] for i in sorted(range(graph.ops), key=lambda i: (-steps[i], i))[:count]]

    def offer(order: tuple[int, ...]) -> None:
        nonlocal best, steps, peak
        trial = peak_bytes(graph, order, near)
        if trial < peak:
            best, peak = order, trial
            steps = live_bytes(graph, order, near)

    for v in highest(8):
        bound = max(bound, forced_bound(graph, near, v))
    greedy_orders: tuple[Callable[[], tuple[int, ...]], ...] = (
        lambda: least_peak_first(graph, near, bound),
        lambda: depth_first(graph, near),
        lambda: breadth_first(graph, near),
    )
    for greedy in greedy_orders:
        if not good():
            offer(greedy())
    for v in highest(_PYTHON_CUTS):
        if not good():
            bound = max(bound, cut_bound(graph, near, v))
    if not good() and graph.ops <= _LARGEST_PYTHON_BEAM:
        found = beam(graph, near, width=32, target=peak, bound=bound)
        if found is not None:
            offer(found)
    return OrderResult(best, peak, program_peak, min(bound, peak), NO_COMPILER)


__all__ = ["COMPILE_WORK", "TOLERANCE", "OrderResult", "is_order", "order_ops", "peak_bytes"]
