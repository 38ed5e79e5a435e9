"""Results that are tensors of their own stay so.

torch's elimination of common subexpressions leaves calls that return a result alone, but not those that return a tuple
of which a part is a result: two equal calls become one, and with it two results one tensor. Who changes the one in
place has then changed the other.
"""

from __future__ import annotations

import operator

import torch
import torch.fx

from .joint import is_view

#: What a result is a view of: a node, or one of the tensors that a call returns.
Root = tuple[torch.fx.Node, object]


def result_roots(graph: torch.fx.Graph, count: int) -> tuple[Root | None, ...]:
    """What each of the first ``count`` results is a view of; None for what is no tensor."""
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    return tuple(_root(n) if isinstance(n, torch.fx.Node) else None for n in results[:count])


def _root(node: torch.fx.Node) -> Root | None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.target is operator.getitem:
        source, position = node.args
        assert isinstance(source, torch.fx.Node)
        return source, position
    return node, None


def separate_results(module: torch.fx.GraphModule, before: tuple[Root | None, ...]) -> None:
    """Copy the results of a cut forward that share what they did not share ``before`` (`result_roots` of its joint)."""
    graph = module.graph
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first: dict[Root, Root] = {}
    changed = False
    for k, (root, own) in enumerate(zip(result_roots(graph, len(before)), before, strict=True)):
        if root is None or own is None or first.setdefault(root, own) == own:
            continue
        with graph.inserting_before(output):
            copy = graph.call_function(torch.ops.aten.clone.default, (results[k],))
        copy.meta = {key: v for key, v in results[k].meta.items() if key in ("val", "stack_trace", "nn_module_stack")}
        results[k], changed = copy, True
    if changed:
        output.args = (tuple(results),)
        module.recompile()
