"""Random numbers from seeds: dropout is a comparison with them, and the user's own uniform numbers are them.

Done on the joint graph, before it is partitioned, so that the partitioner sees a cheap pure function of a seed: the
backward makes a mask again where it would else be kept as a byte for each element.
"""

from __future__ import annotations

import torch
import torch.fx

from . import operators as _operators  # registers memplan::rand
from .rewriting import call_node

aten = torch.ops.aten


_UNIFORM = (aten.rand.default, aten.rand_like.default, aten.bernoulli.p)


def seed_random(graph_module: torch.fx.GraphModule) -> int:
    """Replace `native_dropout`, `rand`, `rand_like` and `bernoulli` with one probability; returns how many there were.

    The results have eager's distribution, not its numbers: with ``random="eager"`` this is not called.
    """
    graph = graph_module.graph
    found = [n for n in graph.nodes if n.op == "call_function" and (_is_dropout(n) or _is_uniform(n))]
    if not found:
        return 0
    by_device: dict[torch.device, list[torch.fx.Node]] = {}
    for node in found:
        value = node.meta["val"]
        by_device.setdefault((value[0] if isinstance(value, tuple) else value).device, []).append(node)
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


def _is_dropout(node: torch.fx.Node) -> bool:
    if node.target is not aten.native_dropout.default:
        return False
    floating = node.args[0].meta["val"].dtype.is_floating_point  # type: ignore[union-attr]
    return bool(node.args[2] is not False and 0.0 < float(node.args[1]) < 1.0 and floating)  # type: ignore[arg-type]


def _is_uniform(node: torch.fx.Node) -> bool:
    """Whether a call draws from torch's own generator what float32 numbers in [0, 1) give, in row-major order.

    (Rounded to half precision they would reach 1, and float64 has finer ones.)
    """
    if node.target not in _UNIFORM or node.kwargs.get("generator") is not None:
        return False
    value = node.meta["val"]
    if node.target is aten.bernoulli.p:
        probability = node.args[1] if len(node.args) > 1 else 0.5
        right = isinstance(probability, float) and 0.0 <= probability <= 1.0 and value.dtype.is_floating_point
    else:
        right = value.dtype is torch.float32
    return bool(right and value.layout is torch.strided and value.is_contiguous())


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, seeds: torch.fx.Node, index: int) -> None:
    if node.target is aten.native_dropout.default:
        _replace_dropout(graph, node, seeds, index)
        return
    if node.target is aten.rand.default:
        size = node.args[0]
    else:
        size = [_size(graph, node.args[0], d) for d in range(node.meta["val"].dim())]  # type: ignore[arg-type]
    out = call_node(graph, torch.ops.memplan.rand.default, (seeds, index, size), {}, node)
    if node.target is aten.bernoulli.p:
        out = call_node(graph, aten.lt.Scalar, (out, node.args[1] if len(node.args) > 1 else 0.5), {}, node)
        out = call_node(graph, aten._to_copy.default, (out,), {"dtype": node.meta["val"].dtype}, node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _replace_dropout(graph: torch.fx.Graph, node: torch.fx.Node, seeds: torch.fx.Node, index: int) -> None:
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


__all__ = ["seed_random"]
assert _operators is not None
