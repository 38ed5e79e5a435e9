"""What the partition did with every value that the backward reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx

from ..ir.activation import Activation, Fate
from ..ir.joint import JointGraph, NodeKind, Side
from .joint import result_bytes
from .origin import origin_of

#: Key in an FX node's meta that marks what a loss in slices made.
CHUNKED = "memplan_chunked"
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def activations(graph: JointGraph, nodes: Sequence[torch.fx.Node], kept: Sequence[int]) -> tuple[Activation, ...]:
    """Saved values in the forward's order, then what is recomputed in place of one.

    Of a recomputed value the time is that of all that runs again for it and for none before it.
    """
    found = []
    for k in sorted(kept):
        node = graph.nodes[k]
        if node.kind is NodeKind.INPUT or not result_bytes(nodes[k]):
            continue
        found.append(Activation(node.name, _fate(nodes[k]), result_bytes(nodes[k]), node.again, origin_of(nodes[k])))
    again = frozenset(graph.recomputed(kept))
    counted: set[int] = set()
    for k in sorted(again):
        node = graph.nodes[k]
        read = [u for u in graph.users[k] if graph.nodes[u].side is Side.BACKWARD]
        if node.side is not Side.FORWARD or node.kind in (NodeKind.INPUT, NodeKind.VIEW) or not read or not node.nbytes:
            continue
        spent = 0.0
        stack = [k]
        while stack:
            i = stack.pop()
            if i in again and i not in counted:
                counted.add(i)
                spent += graph.nodes[i].again or 0.0
                stack.extend(graph.nodes[i].inputs)
        found.append(Activation(node.name, Fate.RECOMPUTED, node.nbytes, spent, origin_of(nodes[k])))
    return tuple(found)


def _fate(node: torch.fx.Node) -> Fate:
    if node.meta.get(CHUNKED):
        return Fate.CHUNKED
    if node.target in _CASTS and node.all_input_nodes:
        wide = node.all_input_nodes[0].meta.get("val")
        value = node.meta["val"]
        if isinstance(wide, torch.Tensor) and wide.dtype.itemsize > value.dtype.itemsize:
            return Fate.NARROWED
    return Fate.SAVED
