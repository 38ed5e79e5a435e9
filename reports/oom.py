"""What an out-of-memory error says: the plan at that step, the user's line, and what would have made it fit."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.plan import Plan
from .build import graph_of
from .fit import Attempt
from .model import Graph
from .terminal import peak_groups, rendered
from .text import clean, code, line, size, step_title, whereabouts


def explain_oom(
    plan: Plan,
    step: int | None,
    *,
    requested: int = 0,
    attempts: Sequence[Attempt] = (),
    alternatives: Sequence[tuple[str, Plan]] = (),
) -> str:
    """The message for a device that ran out of memory while ``step`` of ``plan`` ran, as plain text.

    Parameters
    ----------
    step:
        None if it is not known: the plan's peak is shown then.
    requested:
        Bytes that were asked for and not given; 0 if not known.
    attempts:
        Changes whose plans are known (see `memplan.reports.fit.changes`); the one that saves most is named.
    alternatives:
        The same for plans of this graph: (what to change, its plan).

    Raises
    ------
    ValueError
        If the plan has no such step.
    """
    if step is not None and not 0 <= step < max(1, len(plan.order)):
        raise ValueError(f"no step {step} in a plan of {len(plan.order)} steps")
    graph = graph_of(plan)
    at = graph.peak_step if step is None else step
    lines = [_headline(graph, at, requested, known=step is not None)]
    if graph.steps:
        if plan.program.hints:
            lines.append("  (sizes are symbols in this graph: bytes are those of the sizes it was compiled for)")
        if 2 * graph.live[at] < graph.allocated[at]:  # a pool was asked for: what it is for tells more
            at = max(range(len(graph.live)), key=lambda k: (graph.live[k], -k))
            lines.append("  A pool is mostly empty then; this is what it will hold:")
        lines.append(_table(graph, at))
        lines.append(_peak(graph, at))
    others = [Attempt(title, 0, graph_of(other).peak) for title, other in alternatives]
    lines.append(advice(graph, at, [*attempts, *others]))
    return "\n".join(filter(None, lines))


def _headline(graph: Graph, step: int, requested: int, *, known: bool = True) -> str:
    if not graph.steps:
        return f"out of memory in {clean(graph.name)}, which has no steps"
    running = graph.steps[step]
    place = next((line(o) for o in running.origins if o.file), "")
    source = next((code(o) for o in running.origins if o.code), "")
    where = f"step {step} of {len(graph.steps)} of {clean(graph.name)}: {step_title(running)}"
    asking = f", asking for {size(requested)}" if requested else ""
    if known:
        text = f"memplan: memory ran out at {where}{asking}"
    else:
        text = f"memplan: memory ran out in {clean(graph.name)}{asking}; its plan is largest at {where}"
    if place:
        text += f"\n  your line: {place}{f'    {source}' if source else ''}"
    return text + f"\n  by plan {size(graph.allocated[step])} are allocated there, {size(graph.live[step])} of it live"


def largest_lines(graph: Graph) -> str:
    """What is alive at the peak, as plain text."""
    return _table(graph, graph.peak_step)


def _table(graph: Graph, step: int) -> str:
    rows = rendered(peak_groups(graph, step=step, top=6), width=110).splitlines()
    return "\n".join(f"  {row}" for row in rows)


def _peak(graph: Graph, step: int) -> str:
    at = graph.peak_step
    if graph.allocated[step] == graph.peak:
        return "  This step is the peak of the graph."
    return f"  The peak of the graph would have been {size(graph.peak)}, at step {at}: {step_title(graph.steps[at])}."


def advice(graph: Graph, step: int, attempts: Sequence[Attempt] = ()) -> str:
    """The largest known change: of the plans given the one with the least bytes, else what is largest at the step."""
    better = [a for a in attempts if a.peak < graph.peak]
    if better:
        best = min(better, key=lambda a: a.peak)
        return f"  What would help most: {clean(best.title)} needs {size(best.peak)} instead of {size(graph.peak)}."
    alive = graph.alive_at(step)
    saved = sum(s.nbytes for s in alive if graph.shown_at(s, step).kind == "saved")
    if saved and 2 * saved > graph.live[step]:
        return (
            f"  What would help most: {size(saved)} are kept for the backward pass. Recompute more of it with "
            'options={"recompute_time": 0.3}, or use a smaller batch.\n'
            "  `memplan fit MODULE:FACTORY --budget BYTES` tries such changes without running them."
        )
    if alive:
        b = graph.shown_at(alive[0], step)
        return (
            f"  The largest buffer is {clean(b.name)}, {size(alive[0].nbytes)}, made at {whereabouts(b.origin)}.\n"
            "  `memplan fit MODULE:FACTORY --budget BYTES` tries smaller batches and options without running them."
        )
    return "  None of this graph's own buffers is alive there: the memory is held by something else."
