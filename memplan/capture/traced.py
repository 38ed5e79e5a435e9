"""A traced graph as far as its program does not say all, and run as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """What compiling needs of a graph besides its program.

    ``lazy``: positions of the inputs that are lazily conjugated or negated. ``module``: the graph itself; None where
    the program comes from the cache.
    """

    lazy: tuple[int, ...]
    module: torch.fx.GraphModule | None = None

    @classmethod
    def of(cls, module: torch.fx.GraphModule) -> Traced:
        values = (n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder")
        lazy = (k for k, v in enumerate(values) if isinstance(v, torch.Tensor) and (v.is_conj() or v.is_neg()))
        return cls(tuple(lazy), module)


@contextmanager
def quiet_copies() -> Iterator[None]:
    """Inside, torch does not warn of itself while it copies its own description of a graph's results."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a graph."""
    with quiet_copies():
        return copy.deepcopy(graph)


def runnable(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph, or a copy of it that can be run on fake tensors.

    torch 2.11 takes every overload of ``aten.addmm`` apart by one rule, which reads the dtype of ``aten.addmm.dtype``
    as a factor; here such a call is a product and a sum.
    """
    if not any(n.target is aten.addmm.dtype for n in module.graph.nodes):
        return module
    changed = torch.fx.GraphModule(module, copied(module.graph))
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
