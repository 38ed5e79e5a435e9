"""Softmax in one pass less: the maximum and the sum of exponentials of a long row, kept up together.

``m = max(v)`` followed by ``sum(exp(v - m))`` takes two passes over a row that does not fit into a block. One pass is
enough if the sum is rescaled whenever the maximum grows (M. Milakov, N. Gimelshein, "Online normalizer calculation for
softmax", 2018).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from memplan.ir.loops import Call, Item, Kernel, Node, Reduce

#: a reduction that only this emitter knows; its results are the maximum and the sum of exponentials
ONLINE = "online_softmax"


def with_online_softmax(kernel: Kernel) -> Kernel:
    """The kernel with every such pair of reductions made one; positions of nodes stay as they are."""
    nodes: list[Node] = list(kernel.nodes)
    for k in kernel.reductions:
        top = _maximum_of(kernel, k)
        if top is None or not isinstance(nodes[top], Reduce) or nodes[top] != kernel.nodes[top]:
            continue
        nodes[top] = replace(nodes[top], op=ONLINE)  # type: ignore[arg-type]
        nodes[k] = Item(top, 1, torch.float32)
    return kernel if nodes == list(kernel.nodes) else replace(kernel, nodes=tuple(nodes))


def _maximum_of(kernel: Kernel, k: int) -> int | None:
    """The maximum that reduction ``k``, a sum of exponentials, subtracts; None if it is not one."""
    total = kernel.nodes[k]
    if not isinstance(total, Reduce) or total.op != "sum" or total.dtype != torch.float32:
        return None
    exponential = kernel.nodes[total.args[0]]
    if not isinstance(exponential, Call) or exponential.op != "exp" or exponential.dtype != torch.float32:
        return None
    difference = kernel.nodes[exponential.args[0]]
    if not isinstance(difference, Call) or difference.op != "sub" or difference.dtype != torch.float32:
        return None
    value, top = difference.args
    found = kernel.nodes[top]
    if isinstance(found, Reduce) and found.op == "max" and found.args == (value,) and found.dtype == torch.float32:
        return top
    return None
