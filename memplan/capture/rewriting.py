"""New nodes in a traced FX graph, with fake values and the provenance of the nodes they stand for."""

from __future__ import annotations

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode


def call_node(
    graph: torch.fx.Graph,
    target: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    like: torch.fx.Node,
    *,
    keep_policy: bool = True,
) -> torch.fx.Node:
    """A call with its fake value and the provenance of ``like`` (its checkpointing policy too, unless told not)."""
    node = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    for key in (
        "stack_trace",
        "nn_module_stack",
        "original_aten",
        "seq_nr",
        "partitioner_tag",
        "custom",
        "ac_graph_id",
    ):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if keep_policy and "recompute" in like.meta:
        node.meta["recompute"] = like.meta["recompute"]
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[type-var]
    node.meta["val"] = _fake_call(target, values[0], values[1], like)
    return node


def _fake_call(target: object, args: tuple[object, ...], kwargs: dict[str, object], like: torch.fx.Node) -> object:
    value = like.meta["val"]
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    mode = getattr(tensor, "fake_mode", None)
    assert isinstance(mode, FakeTensorMode)
    with mode:
        return target(*args, **kwargs)  # type: ignore[operator]
