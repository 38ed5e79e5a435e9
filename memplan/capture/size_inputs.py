"""Size symbols that no argument of a graph gives: read off the tensors among its inputs.

Dynamo hands over the sizes of ordinary inputs as integers beside them. Of the tensors inside of a subclass (the values
of a nested tensor) it does not: their sizes are known from them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy
import torch
import torch.fx
from torch._functorch._aot_autograd import graph_compile

from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.program import ProgramInput, SizeSource, SymbolInput, TensorInput
from .sizes import solved

_FLOATS_PASS = "tensorify_python_scalars"


def size_inputs(inputs: Sequence[ProgramInput]) -> tuple[SymbolInput, ...]:
    """Further inputs, after those given, for the symbols in sizes and strides of tensors that none of them is.

    Raises
    ------
    UnsupportedError
        For a symbol that no single size or stride tells.
    """
    given = {i.symbol for i in inputs if isinstance(i, SymbolInput)}
    needed: dict[sympy.Symbol, str] = {}
    found: dict[sympy.Symbol, SizeSource] = {}
    for name, size, source in _sizes(inputs):
        if isinstance(size, int):
            continue
        for symbol in size.free_symbols - given:
            needed.setdefault(symbol, name)
        told = solved(size)
        if told is not None:
            symbol, factor, offset = told
            before = found.get(symbol)
            if before is None or ((factor, offset) == (1, 0) != (before.factor, before.offset)):
                found[symbol] = replace(source, factor=factor, offset=offset)
    for symbol, name in needed.items():
        if symbol not in found:
            raise UnsupportedError(
                f"the size {symbol} of the input {name} is not told by any size or stride", where=name
            )
    symbols = sorted(needed, key=str)
    return tuple(SymbolInput(len(inputs) + k, s, found[s]) for k, s in enumerate(symbols))


def _sizes(inputs: Sequence[ProgramInput]) -> Iterator[tuple[str, Size, SizeSource]]:
    """Sizes of all tensors, then their strides."""
    tensors = [i for i in inputs if isinstance(i, TensorInput)]
    for i in tensors:
        for dim, size in enumerate(i.view.sizes):
            yield i.view.buffer, size, SizeSource(i.position, dim)
    for i in tensors:
        for dim, stride in enumerate(i.view.strides):
            yield i.view.buffer, stride, SizeSource(i.position, dim, stride=True)


@contextmanager
def sizes_as_nodes() -> Iterator[None]:
    """AOTAutograd, whose joint and inference graphs name the sizes that their arguments do not give.

    Its pass that turns floats of sizes (one over the number of a mean's elements) into tensors looks for a node for
    each of their symbols, and raises KeyError where there is none. (Compilation holds Dynamo's lock meanwhile.)
    """
    original: Callable[..., None] = getattr(graph_compile, _FLOATS_PASS)

    def tensorify(module: torch.fx.GraphModule, *args: object) -> None:
        name_sizes(module.graph)
        original(module, *args)

    setattr(graph_compile, _FLOATS_PASS, tensorify)
    try:
        yield
    finally:
        setattr(graph_compile, _FLOATS_PASS, original)


def name_sizes(graph: torch.fx.Graph) -> None:
    """A ``sym_size`` for every size symbol of a tensor argument that no argument is."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    values = [n.meta.get("val") for n in placeholders]
    known = {v.node.expr for v in values if isinstance(v, torch.SymInt)}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node, value in zip(placeholders, values, strict=True):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in known:
                known.add(size.node.expr)
                with graph.inserting_before(first):
                    named = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                named.meta["val"] = size
