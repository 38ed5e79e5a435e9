"""Inputs that a training graph changes: what the backward needs of them from before the change is kept.

A functionalised graph computes with the old values and writes the new ones back at its end (``copy_``), or leaves that
to AOTAutograd, which does it after the call. To the cut of the joint graph such an input is an input like any other,
which costs nothing to keep, and from which the backward may compute again: it would read the new values. Gradients
are silently wrong then (torch 2.11 to 2.14, with its own compilers too), or a valid program raises torch's error of a
variable modified in place. Here the graph reads a copy, made in the forward only, wherever the backward needs
something that is made of the old values; copies that nobody keeps go when the plan takes its copies away.
"""

from __future__ import annotations

import torch
import torch.fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch.utils.checkpoint import CheckpointPolicy

from .rewriting import call_node

Node = torch.fx.Node
aten = torch.ops.aten


def keep_changed_inputs(graph: torch.fx.Graph) -> int:
    """Lets a joint graph read copies of the inputs that it changes where its backward depends on them; how many."""
    changed = _changed_inputs(graph)
    if not changed:
        return 0
    backward = _backward(graph)
    body = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    made = 0
    for node in changed:
        if not _read_by(node, backward):
            continue
        with graph.inserting_before(body):
            copy = call_node(graph, aten.clone.default, (node,), {}, node)
        copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # by the backward it would be another value
        for user in list(node.users):
            if user is not copy and not (user.target is aten.copy_.default and user.args[0] is node):
                user.replace_input_with(node, copy)
        made += 1
    return made


def _changed_inputs(graph: torch.fx.Graph) -> list[Node]:
    """Inputs that the graph, or AOTAutograd after it, writes over."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents")]
    found = {n.args[0] for n in graph.nodes if n.target is aten.copy_.default}
    results = graph.output_node().meta.get("desc") or ()
    later = {d.mutated_input for d in results if isinstance(d, InputMutationAOTOutput)}
    found |= {n for n in inputs if n.meta.get("desc") in later}
    return [n for n in inputs if n in found and isinstance(n.meta.get("val"), torch.Tensor)]


def _backward(graph: torch.fx.Graph) -> set[Node]:
    """Nodes that depend on gradients."""
    found: set[Node] = set()
    for node in graph.nodes:
        gradient = node.op == "placeholder" and node.name.startswith("tangents")
        if gradient or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    found.discard(graph.output_node())
    return found


def _read_by(node: Node, backward: set[Node]) -> bool:
    """Whether the backward reads a node, or something that the forward makes of it."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user in backward:
                return True
            if user not in seen and user.op != "output":
                seen.add(user)
                stack.append(user)
    return False
