"""The dependency graph of a plan in DOT, for Graphviz: operations in the plan's order, buffers by size."""

from __future__ import annotations

from .colours import colour_of
from .model import Graph
from .text import clean, line_of, shape, size


def dot(graph: Graph) -> bytes:
    """Boxes are operations, rounded boxes buffers; those alive at the peak have a thick border."""
    peak = {m for s in graph.alive_at(graph.peak_step) for m in s.members}
    out = [f"digraph {quoted(graph.name)} {{", "  rankdir=TB;", '  node [fontname="sans-serif", fontsize=10];']
    for k, step in enumerate(graph.steps):
        place = line_of(step)
        label = "\n".join(filter(None, (f"{k}: {clean(step.name)}", clean(step.target), place)))
        out.append(f'  {quoted(f"op {k}")} [shape=box, style=filled, fillcolor="#eeeeee", label={quoted(label)}];')
    for b in graph.buffers:
        label = f"{clean(b.name)}\n{shape(b)}\n{size(b.nbytes)}"
        width = 3 if b.name in peak else 1
        out.append(
            f'  {quoted("buffer " + b.name)} [shape=box, style="rounded,filled", penwidth={width}, '
            f'fillcolor="{colour_of(b.kind)}55", label={quoted(label)}];'
        )
    names = {b.name for b in graph.buffers}
    for k, step in enumerate(graph.steps):
        out += [f"  {quoted('buffer ' + b)} -> {quoted(f'op {k}')};" for b in step.reads if b in names]
        out += [f"  {quoted(f'op {k}')} -> {quoted('buffer ' + b)};" for b in step.writes if b in names]
    for b in graph.buffers:
        if b.in_place_of is not None:
            ends = f"{quoted('buffer ' + b.in_place_of)} -> {quoted('buffer ' + b.name)}"
            out.append(f'  {ends} [style=dashed, label="in place"];')
    return ("\n".join([*out, "}"]) + "\n").encode()


def quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, line feeds as DOT writes them."""
    lines = text.split("\n")
    return '"' + "\\n".join(clean(x, 300).replace("\\", "\\\\").replace('"', '\\"') for x in lines) + '"'
