"""The loss of a language model without its logits: linear, softmax and cross entropy in slices of tokens.

``cross_entropy(hidden @ weight.T, target)`` makes logits of tokens x vocabulary, the largest tensor of most language
models, and a gradient of the same size. Both are needed one slice of tokens at a time only, and the gradient depends
on the backward pass by a factor (the tangent of the loss) alone. So the joint graph is rewritten: for each slice the
logits are made, turned into their loss and their gradient, and multiplied into the gradients of hidden and weight, all
in the forward pass; the backward multiplies those by the tangent. No product is computed twice.

Which operators stand between is not asked for by name: whatever keeps the rows of different tokens apart
(`loss_region`) is made slice by slice (`loss_slices`). So it holds for a loss per token with a mask and a mean, for
class weights, label smoothing, soft targets, a z-loss (the squared logarithm of the softmax's norm, Chowdhery et al.,
"PaLM", 2022), logits that are scaled or capped, and sums of those. Exact but for the order of summation. Not applied
where something reads the logits whole, nor for float16 (its range needs the tangent's scale inside).

The idea of computing the gradient in the forward is that of Hsu et al., "Liger Kernel" (2024), and Wijmans et al.,
"Cut Your Losses" (2024), who does without the logits altogether.
"""

from __future__ import annotations

import logging

import torch
import torch.fx

from .loss_match import find_region
from .loss_operators import CONSTANTS, SAME_VALUES, is_pointwise
from .loss_region import NLL, WINDOWS, Region, WholeLogits
from .loss_rewriting import rewrite

log = logging.getLogger(__name__)
aten = torch.ops.aten
Node = torch.fx.Node
Note = tuple[str, str]

#: Fewest tokens of a slice: below, matrix products lose speed.
MIN_ROWS = 1024
#: Tokens that the matrix units take at a time.
_TILE = 128
_PRODUCTS = (aten.mm.default, aten.addmm.default)


def chunk_losses(module: torch.fx.GraphModule, chunk_bytes: int) -> tuple[Note, ...]:
    """Rewrite every loss whose logits are larger than ``chunk_bytes``, in slices of at most that.

    Returns (where, why) of those losses whose logits exist whole.
    """
    graph = module.graph
    done, notes = 0, []
    backward = of_tangents(graph)
    for linear in _large(graph, chunk_bytes):
        if not linear.users:  # part of a loss that was rewritten
            continue
        found = _match(linear, backward)
        if isinstance(found, Region):
            rows = _rows(linear.meta["val"], chunk_bytes)
            assert rows is not None
            rewrite(graph, found, rows)
            graph.eliminate_dead_code()
            backward = of_tangents(graph)
            done += 1
        elif found is not None:
            notes.append(found)
    if done:
        graph.lint()
        module.recompile()
        log.info("%d losses are computed in slices of tokens", done)
    return tuple(notes)


def chunk_sizes(graph: torch.fx.Graph, largest: int) -> tuple[int, ...]:
    """``largest`` and smaller bytes of a slice, each half of another, with which some loss has smaller slices."""
    backward = of_tangents(graph)
    logits = [n.meta["val"] for n in _large(graph, 1) if isinstance(_match(n, backward), Region)]
    sizes, size = [largest], largest
    while logits and size > 1:
        size //= 2
        if [_rows(one, size) for one in logits] != [_rows(one, sizes[-1]) for one in logits]:
            sizes.append(size)
    return tuple(sizes)


def _large(graph: torch.fx.Graph, chunk_bytes: int) -> list[Node]:
    """Products whose result is larger than a slice."""
    calls = [n for target in _PRODUCTS for n in graph.find_nodes(op="call_function", target=target)]
    return [n for n in calls if _rows(n.meta["val"], chunk_bytes) is not None]


def of_tangents(graph: torch.fx.Graph) -> frozenset[Node]:
    """What depends on a tangent of the joint graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if "tangents" in str(node.target):
                found.add(node)
        elif node.target not in CONSTANTS and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _rows(logits: torch.Tensor, chunk_bytes: int) -> int | None:
    """Tokens of a slice, or None where slicing is not worth it."""
    tokens, vocabulary = logits.shape
    if not isinstance(tokens, int) or not isinstance(vocabulary, int) or logits.dtype is torch.float16:
        return None
    row_bytes = vocabulary * logits.element_size()
    most = chunk_bytes // max(1, row_bytes)
    if tokens <= most or tokens < 2 * MIN_ROWS:
        return None
    most = max(MIN_ROWS, most // _TILE * _TILE if most >= _TILE else most)
    even = -(-tokens // -(-tokens // most))  # the last slice is not left with what is over
    return min(most, -(-even // _TILE) * _TILE)


def _match(linear: Node, backward: frozenset[Node]) -> Region | Note | None:
    """The region of a product's result, or, where it looks like logits, why it is to exist whole."""
    if linear in backward:
        return None
    try:
        return find_region(linear, backward)
    except WholeLogits as reason:
        if not _looks_like_logits(linear):
            return None
        shape = " x ".join(str(n) for n in linear.meta["val"].shape)
        return linear.name, f"logits of {shape} exist whole: {reason}"


def _looks_like_logits(linear: Node) -> bool:
    """Whether a likelihood or a largest element is taken of a product's result, or of what is elementwise in it."""
    words = linear.meta["val"].shape[-1]
    stack, seen = [linear], {linear}
    while stack:
        for user in stack.pop().users:
            if user.target is NLL or user.target is aten.amax.default:
                return True
            value = user.meta.get("val")
            along = user.target in SAME_VALUES or user.target in WINDOWS or is_pointwise(user)
            if along and user not in seen and isinstance(value, torch.Tensor) and value.shape[-1:] == (words,):
                seen.add(user)
                stack.append(user)
    return False
