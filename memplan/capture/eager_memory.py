"""The memory of a training step as eager mode would run it, simulated on AOTAutograd's joint graph.

Before anything is decided about the graph. Every operation makes its result, which is freed after its last use; what
the backward uses stays until then. Eager mode itself needs more where Python's variables hold tensors longer, and less
where an in-place operation of the user's became a new tensor here, or one call several.
"""

from __future__ import annotations

import torch.fx

from ..ir.eager import EagerMemory
from .copies import drops_nothing
from .joint import is_view, result_bytes


def eager_memory(joint: torch.fx.Graph) -> EagerMemory:
    """See the module's docstring. Bytes are those of the sizes seen when tracing; inputs are not counted."""
    nodes = list(joint.nodes)
    root: dict[torch.fx.Node, torch.fx.Node] = {}
    last: dict[torch.fx.Node, int] = {}
    backward: set[torch.fx.Node] = set()
    for k, node in enumerate(nodes):
        sources = node.all_input_nodes
        root[node] = root[sources[0]] if sources and (is_view(node) or drops_nothing(node)) else node
        for used in (node, *sources):
            last[root[used]] = len(nodes) if node.op == "output" else k
        tangent = node.op == "placeholder" and node.name.startswith("tangents")
        if tangent or (node.op != "output" and any(s in backward for s in sources)):
            backward.add(node)
    start = next((k for k, n in enumerate(nodes) if n in backward and n.op != "placeholder"), len(nodes))
    ends: dict[int, int] = {}
    live, peaks, between = 0, [0, 0], 0
    for k, node in enumerate(nodes):
        if k == start:
            between = live
        made = root[node] is node and node.op == "call_function"
        if made:
            nbytes = result_bytes(node)
            live += nbytes
            ends[last[node]] = ends.get(last[node], 0) + nbytes
        peaks[k >= start] = max(peaks[k >= start], live)
        live -= ends.pop(k, 0) if node.op != "output" else 0
    return EagerMemory(peaks[0], between if start < len(nodes) else live, peaks[1], live)
