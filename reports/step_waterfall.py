"""What each stage of the compiler does to the peak of the whole step, from eager on."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.eager import EagerMemory
from .model import Graph, WaterfallStep

#: What a step is before anything of this compiler is done to it.
EAGER = "eager"
#: The first stage of a graph: a graph without a backward is then as eager runs it, any other has been partitioned.
_CAPTURED = "captured"


def step_waterfall(
    whole: Graph, graphs: Sequence[Graph], eager: Sequence[EagerMemory | None]
) -> tuple[WaterfallStep, ...]:
    """The peak of the whole step in bytes after each stage; the last is the plan's.

    A graph's peak at a stage is that graph simulated then, beside what the others hold in the finished plan while it
    runs. Nothing where a graph has no stages.

    Parameters
    ----------
    graphs:
        Those on the timeline of ``whole``, in its order.
    eager:
        Of each region, in the order of its forwards; None where it is not known.
    """
    if not graphs or any(not g.waterfall for g in graphs):
        return ()
    beside = _beside(whole, graphs)
    known = [{s.name: s.peak for s in g.waterfall} for g in graphs]
    current = [g.waterfall[0].peak for g in graphs]
    first = eager_peak([e for e in eager if e is not None]) if eager and None not in eager else 0
    rows = [WaterfallStep(name=EAGER, peak=first)] if first else []
    alone = all(g.phase == "inference" for g in graphs)
    for name in _in_order([[s.name for s in g.waterfall] for g in graphs]):
        current = [stages.get(name, before) for stages, before in zip(known, current, strict=True)]
        peak = max(a + b for a, b in zip(current, beside, strict=True))
        title = name if name != _CAPTURED else "partition" if first else EAGER if alone else name
        rows.append(WaterfallStep(name=title, peak=max(0, peak)))
    if rows[-1].peak != whole.peak:
        rows.append(WaterfallStep(name="unattributed", peak=whole.peak))
    return tuple(rows)


def _beside(whole: Graph, graphs: Sequence[Graph]) -> list[int]:
    """For each graph the bytes that are held beside it while it runs, at its worst step."""
    ranges: dict[str, list[int]] = {}
    for k, step in enumerate(whole.steps):
        ranges.setdefault(step.graph, []).append(whole.allocated[k])
    return [max(ranges.get(g.name, [0])) - g.peak for g in graphs]


def _in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """All names once, each after those that stand before it in a list (the lists are parts of one sequence)."""
    out: list[str] = []
    for names in lists:
        at = 0
        for name in names:
            if name in out:
                at = out.index(name) + 1
            else:
                out.insert(at, name)
                at += 1
    return out


def eager_peak(regions: Sequence[EagerMemory]) -> int:
    """The peak of regions whose forwards run one after the other, then their backwards, the last one's first."""
    held, peak = 0, 0
    for r in regions:
        peak = max(peak, held + r.forward)
        held += r.between
    for r in reversed(regions):
        held -= r.between
        peak = max(peak, held + r.backward)
        held += r.after
    return peak
