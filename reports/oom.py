"""What an out-of-memory error says: the plan at that step, the user's line, and what would have made it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..ir.plan import Plan
from ..out_of_memory import Remedy, Shortage
from .activations import milliseconds
from .allocation import rounded
from .build import graph_of
from .model import Graph
from .terminal import peak_groups, rendered
from .text import clean, code, line_of, size, step_title, whereabouts


def explain_oom(plan: Plan, shortage: Shortage, remedies: Callable[[int], Sequence[Remedy]] = lambda had: ()) -> str:
    """The message for a device that ran out of memory while a plan ran, as plain text.

    Parameters
    ----------
    shortage:
        Where its step is None, the plan's peak is shown.
    remedies:
        Known changes, planned, given the bytes that the step could have had (0: not known). What would have made it
        fit is told, or how much the nearest of them lacks.

    Raises
    ------
    ValueError
        If the plan has no such step.
    """
    step = shortage.step
    if step is not None and not 0 <= step < max(1, len(plan.order)):
        raise ValueError(f"no step {step} in a plan of {len(plan.order)} steps")
    graph = graph_of(plan)
    at = graph.peak_step if step is None else step
    had = there_was(graph, shortage)
    lines = [_headline(graph, at, shortage.requested, known=step is not None)]
    if graph.steps:
        if had is not None:
            lines.append(f"  there were about {size(had)} for it, what it held itself and what was free")
        if plan.program.hints:
            lines.append("  (sizes are symbols in this graph: bytes are those of the sizes it was compiled for)")
        shown = at
        if 2 * graph.live[at] < graph.allocated[at]:  # a pool was asked for: what it is for tells more
            shown = max(range(len(graph.live)), key=lambda k: (graph.live[k], -k))
            lines.append("  A pool is mostly empty then; this is what it will hold:")
        lines.append(_table(graph, shown))
        lines.append(_peak(graph, shown))
        lines += [*advice(remedies(had or 0), had), _largest(graph, shown)]
    return "\n".join(filter(None, lines))


def there_was(graph: Graph, shortage: Shortage) -> int | None:
    """Bytes that a graph could have had: those free when it failed, and those that it held; None if not known.

    What the failing step itself makes is taken to be lacking whole, so that they are never too many.
    """
    if shortage.free is None or shortage.step is None or not graph.steps:
        return None
    device = "cuda" if shortage.on_gpu else "cpu"
    if any(not b.device.startswith(device) for b in graph.buffers if b.counted):
        return None
    if shortage.released:
        return shortage.free
    k = shortage.step
    held = [
        rounded(s.nbytes, s.device)
        for s in graph.storages
        if s.counted
        and s.pool is None
        and k < s.death
        and (s.birth < k or graph.by_name[s.name].placement == "external")
    ]
    held += [rounded(p.nbytes, p.device) for p in graph.pools if p.birth < k < p.death]
    return shortage.free + sum(held)


def _headline(graph: Graph, step: int, requested: int, *, known: bool = True) -> str:
    if not graph.steps:
        return f"out of memory in {clean(graph.name)}, which has no steps"
    running = graph.steps[step]
    place = line_of(running)
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


def advice(remedies: Sequence[Remedy], had: int | None) -> list[str]:
    """Known changes: all that would have made it fit, that which needs least first; else the nearest, and its lack."""
    better = sorted((r for r in remedies if r.peak < r.before), key=lambda r: r.peak)
    if not better:
        return ["  No known change would have made it fit; a smaller batch needs less."]
    if had is None:
        return ["  What would help most:", *_change(better[0])]
    fitting = [r for r in better if r.peak <= had]
    if fitting:
        changes = (_change(r, f", {size(had - r.peak)} less than there were") for r in fitting)
        return ["  What would have made it fit:", *(line for lines in changes for line in lines)]
    nearest = _change(better[0], f", still {size(better[0].peak - had)} more than there were")
    return ["  No known change would have made it fit; a smaller batch needs less. The nearest:", *nearest]


def _change(r: Remedy, against: str = "") -> list[str]:
    slower = f"; about {milliseconds(r.microseconds)} a step slower" if r.microseconds else ""
    needs = f"{clean(r.what)} needs {size(r.peak)} instead of {size(r.before)}"
    return [f"    {clean(r.title)}", f"      {needs}{against}{slower}"]


def _largest(graph: Graph, step: int) -> str:
    alive = graph.alive_at(step)
    if not alive:
        return "  None of this graph's own buffers is alive there: the memory is held by something else."
    b = graph.shown_at(alive[0], step)
    return f"  The largest buffer is {clean(b.name)}, {size(alive[0].nbytes)}, made at {whereabouts(b.origin)}."
