"""Copies in a joint graph that hold what another value of the graph holds already, in the same layout.

A dropout that drops nothing (probability zero, or evaluation) becomes ``clone`` in the trace, where eager mode hands
its argument on. To the choice of what the backward keeps, the argument and its copy are two values: both were kept
where both are needed, and the copy was priced like any other kernel. The graph is functional, so a copy and what it
copies stay equal; reading the one for the other is safe unless somebody outside could change or keep one of them:
neither may share its storage with an input or a result, or be given to an operation that changes it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.fx

from .joint import is_view, must_save
from .sizes import size_of

Node = torch.fx.Node
aten = torch.ops.aten


def without_copies(graph: torch.fx.Graph) -> int:
    """Lets the readers of plain copies read what is copied, and takes the copies away; how many those were."""
    root = _roots(graph)
    outside = {root[n] for n in graph.output_node().all_input_nodes}
    outside |= {n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    outside |= {root[s] for n in graph.nodes if _may_change(n) for s in n.all_input_nodes}
    instead: dict[Node, Node] = {}  # of a copy that went: what made the storage that stands for it
    for node in list(graph.nodes):
        if node.target is not aten.clone.default:
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        made = instead.get(root[source], root[source])
        if made in outside or node in outside or not _same(node, source, made):
            continue
        instead[node] = made
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return len(instead)


def drops_nothing(node: Node) -> bool:
    """Whether a node is a dropout that drops nothing: a copy in the trace, its argument itself in eager mode."""
    if node.target is not aten.clone.default or node.kwargs:
        return False
    stack: Sequence[tuple[str, object]] = node.meta.get("source_fn_stack") or ()
    if not stack:
        return False
    made_by = stack[-1][1]
    return "dropout" in getattr(made_by, "__name__", str(made_by)).lower()


def _roots(graph: torch.fx.Graph) -> dict[Node, Node]:
    """The node that made the storage of each node's value."""
    root: dict[Node, Node] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        root[node] = root[sources[0]] if sources and is_view(node) else node
    return root


def _may_change(node: Node) -> bool:
    """Whether a node may change its arguments, or is nothing of which we know that it does not."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.OperatorBase)


def _same(copy: Node, source: Node, root: Node) -> bool:
    """Whether both hold the same elements at the same strides, and the source has no memory beside them."""
    a, b, whole = (n.meta.get("val") for n in (copy, source, root))
    if not all(isinstance(t, torch.Tensor) and t.layout is torch.strided for t in (a, b, whole)):
        return False
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    assert isinstance(whole, torch.Tensor)
    if any(t.is_conj() or t.is_neg() for t in (a, b)) or a.dtype != b.dtype or a.dtype != whole.dtype:
        return False
    if _expressions(a.shape) != _expressions(b.shape) or _expressions(a.stride()) != _expressions(b.stride()):
        return False
    plain = "recompute" not in copy.meta and must_save(source)
    if not plain and any(copy.meta.get(key) != source.meta.get(key) for key in ("recompute", "ac_graph_id")):
        return False  # activation checkpointing draws its boundaries by these
    return size_of(a.numel()) == size_of(whole.numel())


def _expressions(sizes: object) -> list[object]:
    return [size_of(s) for s in sizes]  # type: ignore[attr-defined]
