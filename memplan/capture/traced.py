"""A traced graph, run as it is."""

from __future__ import annotations

import copy

import torch
import torch.fx

aten = torch.ops.aten


def runnable(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph, or a copy of it that can be run on fake tensors.

    torch 2.11 takes every overload of ``aten.addmm`` apart by one rule, which reads the dtype of ``aten.addmm.dtype``
    as a factor; here such a call is a product and a sum.
    """
    if not any(n.target is aten.addmm.dtype for n in module.graph.nodes):
        return module
    changed = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in changed.graph.nodes:
        if node.target is aten.addmm.dtype:
            node.target = added_product
    changed.recompile()
    return changed


def added_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """``beta * total + alpha * (a @ b)``, the product in ``out_dtype``."""
    product: torch.Tensor = aten.mm.dtype(a, b, out_dtype)
    return total * beta + product * alpha
