"""Dropout without a stored mask: each `native_dropout` becomes a comparison with numbers from a seed.

Done on the joint graph, before it is partitioned, so that the partitioner sees a cheap pure function of a seed.
"""

from __future__ import annotations

import torch
import torch.fx

from . import operators as _operators  # registers memplan::rand
from .rewriting import call_node

aten = torch.ops.aten


def seed_dropout(graph_module: torch.fx.GraphModule) -> int:
    """Replace `native_dropout` in place; returns how many there were.

    The results have eager's distribution, not its numbers: with ``random="eager"`` this is not called.
    """
    graph = graph_module.graph
    found = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.native_dropout.default]
    found = [n for n in found if n.args[2] is not False and 0.0 < float(n.args[1]) < 1.0 and _floating(n)]
    if not found:
        return 0
    by_device: dict[torch.device, list[torch.fx.Node]] = {}
    for node in found:
        by_device.setdefault(node.args[0].meta["val"].device, []).append(node)
    for device, nodes in by_device.items():
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            seeds = call_node(
                graph,
                torch.ops.memplan.seeds.default,
                (len(nodes),),
                {"device": device},
                nodes[0],
                keep_policy=False,
            )
        for k, node in enumerate(nodes):
            with graph.inserting_before(node):
                _replace(graph, node, seeds, k)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return len(found)


def _floating(node: torch.fx.Node) -> bool:
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    return bool(value.dtype.is_floating_point)


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, seeds: torch.fx.Node, index: int) -> None:
    x, p = node.args[0], float(node.args[1])  # type: ignore[arg-type]
    assert isinstance(x, torch.fx.Node)
    size = [_size(graph, x, d) for d in range(x.meta["val"].dim())]
    rand = call_node(graph, torch.ops.memplan.rand.default, (seeds, index, size), {}, node)
    keep = call_node(graph, aten.gt.Scalar, (rand, p), {}, node)
    # eager multiplies by the mask (not a selection): an infinity that is dropped gives NaN there too
    masked = call_node(graph, aten.mul.Tensor, (x, keep), {}, node)
    scaled = call_node(graph, aten.mul.Tensor, (masked, 1.0 / (1.0 - p)), {}, node)
    for user in list(node.users):
        user.replace_all_uses_with(scaled if user.args[1] == 0 else keep)
        graph.erase_node(user)
    graph.erase_node(node)


def _size(graph: torch.fx.Graph, x: torch.fx.Node, dim: int) -> int | torch.fx.Node:
    size = x.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return call_node(graph, aten.sym_size.int, (x, dim), {}, x)


__all__ = ["seed_dropout"]
assert _operators is not None
