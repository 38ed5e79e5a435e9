"""What memplan said beforehand: the predicted peak of each graph and of the whole step, in bytes."""

from __future__ import annotations

from collections.abc import Sequence


def predicted_bytes(graphs: Sequence[object]) -> dict[str, object]:
    """``predicted`` (the whole step), ``predicted_graphs`` and, on a GPU, ``predicted_reserved`` beyond what
    parameters and batch have of it.

    Nothing where no graph was recorded.
    """
    if not graphs:
        return {}
    from memplan.recording import CompiledGraph
    from memplan.reports.build import report_of
    from memplan.reports.model import StepRecord

    by_group: dict[int, list[CompiledGraph]] = {}
    for graph in graphs:
        assert isinstance(graph, CompiledGraph)
        by_group.setdefault(graph.group, []).append(graph)
    records = [
        StepRecord(tuple(g.plan for g in group), joins=tuple(dict.fromkeys(pair for g in group for pair in g.joins)))
        for group in by_group.values()
    ]
    report = report_of(records)
    steps = [m for group in by_group.values() for g in group for m in g.plan.step.values()]
    return {
        **({"predicted_reserved": max(m.reserved - m.segments for m in steps)} if steps else {}),
        "predicted": max(report.predicted.values()),
        "predicted_graphs": {
            g.plan.program.name: max(g.plan.predicted_peak.values(), default=0)
            for group in by_group.values()
            for g in group
        },
    }
