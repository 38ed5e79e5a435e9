"""What memplan said beforehand: the predicted peak of each graph and of the whole step, in bytes."""

from __future__ import annotations

from collections.abc import Sequence


def predicted_bytes(graphs: Sequence[object]) -> dict[str, object]:
    """``predicted`` (the whole step) and ``predicted_graphs`` of recorded graphs; nothing where there are none."""
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
    return {
        "predicted": max(report.predicted.values()),
        "predicted_graphs": {
            g.plan.program.name: max(g.plan.predicted_peak.values(), default=0)
            for group in by_group.values()
            for g in group
        },
    }
