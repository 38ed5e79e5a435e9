"""The plan in torch's structured trace (``TORCH_TRACE=folder``), so that tlparse shows it beside the graphs."""

from __future__ import annotations

from torch._logging._internal import trace_structured

from ..ir.plan import Plan
from .build import graph_of
from .model import Graph
from .terminal import buffers, curve, peak, rendered
from .text import clean


def trace_plan(plan: Plan) -> None:
    """Add the plan as an artifact named ``memplan_<graph>``. Costs nothing where no trace is being written."""
    name = f"memplan_{clean(plan.program.name)}"
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: plan_text(graph_of(plan)),
    )


def plan_text(graph: Graph) -> str:
    """A plan as plain text: the curve, what is alive at the peak, every buffer with its life and place."""
    by_birth = sorted(graph.buffers, key=lambda b: (b.birth, b.name))
    return rendered(curve(graph), peak(graph), buffers(graph, by_birth, top=len(by_birth)), width=160)
