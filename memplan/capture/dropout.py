"""Dropout without a stored mask: each `native_dropout` becomes a comparison with numbers from a seed.

Done on the joint graph, before it is partitioned, so that the partitioner sees a cheap pure function of a seed.
"""

from __future__ import annotations

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from . import operators as _operators  # registers memplan::rand

aten = torch.ops.aten


def seed_dropout(graph_module: torch.fx.GraphModule) -> int:
    """Replace `native_dropout` in place; returns how many there were.

    The results have eager's distribution, not its numbers: with ``random="eager"`` this is not called.
    """
    graph = graph_module.graph
    found = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.native_dropout.default]
    found = [n for n in found if n.args[2] is not False and 0.0 < float(n.args[1]) < 1.0 and _floating(n)]  # type: ignore[arg-type]
    if not found:
        return 0
    by_device: dict[torch.device, list[torch.fx.Node]] = {}
    for node in found:
        by_device.setdefault(node.args[0].meta["val"].device, []).append(node)  # type: ignore[union-attr]
    for device, nodes in by_device.items():
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            seeds = _call(graph, torch.ops.memplan.seeds.default, (len(nodes),), {"device": device}, nodes[0])
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
    rand = _call(graph, torch.ops.memplan.rand.default, (seeds, index, size), {}, node)
    keep = _call(graph, aten.gt.Scalar, (rand, p), {}, node)
    # eager multiplies by the mask (not a selection): an infinity that is dropped gives NaN there too
    masked = _call(graph, aten.mul.Tensor, (x, keep), {}, node)
    scaled = _call(graph, aten.mul.Tensor, (masked, 1.0 / (1.0 - p)), {}, node)
    for user in list(node.users):
        user.replace_all_uses_with(scaled if user.args[1] == 0 else keep)
        graph.erase_node(user)
    graph.erase_node(node)


def _size(graph: torch.fx.Graph, x: torch.fx.Node, dim: int) -> int | torch.fx.Node:
    size = x.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return _call(graph, aten.sym_size.int, (x, dim), {}, x)


def _call(
    graph: torch.fx.Graph, target: object, args: tuple[object, ...], kwargs: dict[str, object], like: torch.fx.Node
) -> torch.fx.Node:
    """A node with its fake value, and the provenance and checkpointing tags of ``like``."""
    node = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    for key in ("stack_trace", "nn_module_stack", "original_aten", "seq_nr", "partitioner_tag", "custom", "ac_graph_id"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if target is not torch.ops.memplan.seeds.default and "recompute" in like.meta:
        node.meta["recompute"] = like.meta["recompute"]
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = _fake_call(target, values[0], values[1], like)
    return node


def _fake_call(target: object, args: tuple[object, ...], kwargs: dict[str, object], like: torch.fx.Node) -> object:
    value = like.meta["val"]
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    mode = getattr(tensor, "fake_mode", None)
    assert isinstance(mode, FakeTensorMode)
    with mode:
        return target(*args, **kwargs)  # type: ignore[operator]


__all__ = ["seed_dropout"]
assert _operators is not None
