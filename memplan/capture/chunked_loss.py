"""The loss of a language model without its logits: linear, softmax and cross entropy in slices of tokens.

``cross_entropy(hidden @ weight.T, target)`` makes logits of tokens x vocabulary, the largest tensor of most language
models, and a gradient of the same size. Both are needed one slice of tokens at a time only, and the gradient depends
on the backward pass by a factor (the tangent of the loss) alone. So the joint graph is rewritten: for each slice the
logits are made, turned into their loss and their gradient in place, and multiplied into the gradients of hidden and
weight, all in the forward pass; the backward multiplies those by the tangent. No product is computed twice.

Exact but for the order of summation. Label smoothing is another head over the same logits, with a factor of the same
tangent (`label_smoothing`). Not applied where logits have other readers, for smoothing with class weights, nor for
float16 (its range needs the tangent's scale inside). The idea of computing the gradient in the forward is that of Hsu
et al., "Liger Kernel" (2024), and Wijmans et al., "Cut Your Losses" (2024), who does without the logits altogether.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.utils.checkpoint import CheckpointPolicy

from .activations import CHUNKED
from .label_smoothing import Smoothing, match_smoothing, sums_over_vocabulary
from .rewriting import call_node

log = logging.getLogger(__name__)
aten = torch.ops.aten
Node = torch.fx.Node

_MEAN, _SUM = 1, 2
#: Fewest tokens of a slice: below, matrix products lose speed.
MIN_ROWS = 1024
#: Tokens that the matrix units take at a time.
_TILE = 128
#: Devices with a product of half-precision factors that gives float32.
FLOAT32_PRODUCTS = ("cuda",)
#: Devices whose matrix units want every dimension of a product at multiples of 16 bytes, not only the rows' starts
#: (measured on an H100: 23 of GPT-2's 58 ms in two products with 50,257 columns or terms).
PADDED_PRODUCTS = ("cuda",)
_TRANSPARENT = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


@dataclass
class Loss:
    """One matched loss: ``linear`` makes logits (tokens, vocabulary) of ``hidden`` and ``weight_t``, its transpose."""

    nll: Node
    linear: Node
    hidden: Node
    weight_t: Node
    bias: Node | None
    target: Node
    class_weight: Node | None
    reduction: int
    ignore_index: int
    backward: Node
    window: tuple[int, int, int] | None  # (length, start, stop): the sequence positions that have a target
    smoothing: Smoothing | None
    hidden_gradients: list[Node] = field(default_factory=list)
    weight_gradients: list[tuple[Node, bool]] = field(default_factory=list)  # (node, is it (features, vocabulary))
    bias_gradients: list[Node] = field(default_factory=list)

    @property
    def tangent(self) -> object:
        """What the gradients that the forward makes are multiplied by."""
        return self.backward.args[0] if self.smoothing is None else self.smoothing.tangent

    @property
    def wide(self) -> torch.dtype:
        """What losses and gradients are computed in: float32, or the wider one that the model uses."""
        used = (self.linear.meta["val"].dtype, _getitem(self.nll, 0).meta["val"].dtype)
        return functools.reduce(torch.promote_types, used, torch.float32)


def chunk_losses(module: torch.fx.GraphModule, chunk_bytes: int) -> int:
    """Rewrite every loss whose logits are larger than ``chunk_bytes``, in slices of at most that; returns how many."""
    graph = module.graph
    done = 0
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target is aten.nll_loss_forward.default]:
        found = _match(node)
        if found is None:
            continue
        logits = found.linear.meta["val"]
        rows = _rows(logits, chunk_bytes)
        if rows is None:
            continue
        _rewrite(graph, found, rows)
        done += 1
    if done:
        graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
        log.info("%d losses are computed in slices of tokens", done)
    return done


def chunk_sizes(graph: torch.fx.Graph, largest: int) -> tuple[int, ...]:
    """``largest`` and smaller bytes of a slice, each half of another, with which some loss has smaller slices."""
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.nll_loss_forward.default]
    logits = [found.linear.meta["val"] for found in map(_match, calls) if found is not None]
    sizes, size = [largest], largest
    while logits and size > 1:
        size //= 2
        if [_rows(one, size) for one in logits] != [_rows(one, sizes[-1]) for one in logits]:
            sizes.append(size)
    return tuple(sizes)


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


# -- matching ----


def _original(node: Node) -> object:
    return node.meta.get("original_aten", node.target)


def _is_part_of(node: object, op: torch._ops.OpOverload) -> bool:
    """Whether the node is ``op`` or came of taking it apart (AOTAutograd may hold another object for an operator)."""
    return isinstance(node, Node) and node.op == "call_function" and str(_original(node)) == str(op)


def _match(nll: Node) -> Loss | None:
    """The loss around an `nll_loss_forward`, or None if it has not the form that can be sliced."""
    log_probabilities, target, class_weight, reduction, ignore_index = nll.args
    if reduction not in (_MEAN, _SUM) or not isinstance(log_probabilities, Node) or not isinstance(target, Node):
        return None
    source = _softmax_input(log_probabilities)
    if source is None or len(source.meta["val"].shape) != 2:
        return None
    walked = _walk_back(source)
    if walked is None:
        return None
    linear, window = walked
    if linear.target is aten.mm.default:
        bias, (hidden, weight_t) = None, linear.args
    elif linear.target is aten.addmm.default and not linear.kwargs and len(linear.args) == 3:
        bias, hidden, weight_t = linear.args
        if bias.meta["val"].dim() != 1:  # type: ignore[union-attr]
            return None
    else:
        return None
    readers = _readers(log_probabilities)
    backward = [u for u in readers if u.target is aten.nll_loss_backward.default]
    if len(backward) != 1:
        return None
    smoothing = None
    if sums := sums_over_vocabulary(readers):
        smoothing = match_smoothing(nll, backward[0], sums[0])
        if smoothing is None:
            return None
    found = Loss(
        nll, linear, hidden, weight_t, bias, target,  # type: ignore[arg-type]
        class_weight, reduction, int(ignore_index), backward[0], window, smoothing,  # type: ignore[arg-type]
    )  # fmt: skip
    if not _follow_gradient(found) or not _only_reader(found):
        return None
    return found


def _softmax_input(node: Node) -> Node | None:
    """What the log-softmax that ``node`` belongs to is taken of (the operator may be decomposed already)."""
    if not _is_part_of(node, aten._log_softmax.default):
        return None
    seen, stack, outside = {node}, [node], []
    while stack:
        for n in stack.pop().all_input_nodes:
            if n in seen:
                continue
            seen.add(n)
            if _is_part_of(n, aten._log_softmax.default):
                stack.append(n)
            else:
                outside.append(n)
    return outside[0] if len(outside) == 1 else None


def _walk_back(node: Node) -> tuple[Node, tuple[int, int, int] | None] | None:
    """From the softmax's input to the product that makes it, and the window of sequence positions that is kept."""
    vocabulary = node.meta["val"].shape[-1]
    window = None
    while node.target in _TRANSPARENT or node.target is aten.slice.Tensor:
        source = node.args[0]
        assert isinstance(source, Node)
        shape = source.meta["val"].shape
        if shape[-1] != vocabulary:
            return None
        if node.target is aten.slice.Tensor:
            if _covers(node):
                node = source
                continue
            dim = node.args[1] if len(node.args) > 1 else 0
            step = node.args[4] if len(node.args) > 4 else 1
            if window is not None or dim != 1 or len(shape) != 3 or step != 1:
                return None
            length = shape[1]
            start, stop, _ = slice(*node.args[2:4]).indices(length)
            window = (length, start, stop)
        node = source
    if node.target in (aten.mm.default, aten.addmm.default) and node.meta["val"].shape[-1] == vocabulary:
        return node, window
    return None


def _covers(node: Node) -> bool:
    source = node.args[0]
    assert isinstance(source, Node)
    return bool(source.meta["val"].shape == node.meta["val"].shape)


def _readers(node: Node) -> list[Node]:
    """Users through views that change nothing."""
    out: list[Node] = []
    for user in node.users:
        if user.target in (aten.detach.default, aten.alias.default):
            out.extend(_readers(user))
        else:
            out.append(user)
    return out


_GRADIENT_CHAIN = (*_TRANSPARENT, aten.slice_backward.default, aten.constant_pad_nd.default)


def _follow_gradient(found: Loss) -> bool:
    """From the loss's backward to the products that use the gradient of the logits; fills in the gradients found."""
    hidden, weight_t = found.hidden.meta["val"], found.weight_t.meta["val"]
    tokens, vocabulary = found.linear.meta["val"].shape
    first = found.backward if found.smoothing is None else found.smoothing.gradient
    stack: list[tuple[Node, bool]] = [(u, False) for u in first.users]
    sources = {first}
    while stack:
        node, turned = stack.pop()
        if _is_part_of(node, aten._log_softmax_backward_data.default) or node.target in _GRADIENT_CHAIN:
            sources.add(node)
            stack.extend((u, turned) for u in node.users)
        elif node.target in (aten.permute.default, aten.t.default, aten.transpose.int) and node.meta["val"].dim() == 2:
            if tuple(node.meta["val"].shape) != (vocabulary, tokens):
                return False
            sources.add(node)
            stack.extend((u, not turned) for u in node.users)
        elif node.target is aten.mm.default:
            left, right = node.args
            shape = tuple(node.meta["val"].shape)
            if left in sources and not turned and shape == (tokens, hidden.shape[1]):
                if not _same_storage(right, found.weight_t):
                    return False
                found.hidden_gradients.append(node)
            elif left in sources and turned and shape == (vocabulary, weight_t.shape[0]):
                if not _same_storage(right, found.hidden):
                    return False
                found.weight_gradients.append((node, False))
            elif right in sources and not turned and shape == (weight_t.shape[0], vocabulary):
                if not _same_storage(left, found.hidden):
                    return False
                found.weight_gradients.append((node, True))
            else:
                return False
        elif node.target is aten.sum.dim_IntList and not turned and node.args[1] in ([0], [-2], (0,), (-2,)):
            found.bias_gradients.append(node)
        else:
            return False
    return bool(found.hidden_gradients or found.weight_gradients)


def _same_storage(a: object, b: Node) -> bool:
    """Whether two nodes are views of one tensor."""
    if not isinstance(a, Node):
        return False
    return bool(a.meta["val"].untyped_storage()._cdata == b.meta["val"].untyped_storage()._cdata)


def _only_reader(found: Loss) -> bool:
    """Whether nothing but the loss reads the logits."""
    allowed = {found.nll, found.backward}
    if found.smoothing is not None:
        allowed.add(found.smoothing.reader)
    stack, seen = [found.linear], {found.linear}
    while stack:
        for user in stack.pop().users:
            if user in allowed or user in seen:
                continue
            inner = user.target in _TRANSPARENT or user.target is aten.slice.Tensor
            softmax = _is_part_of(user, aten._log_softmax.default)
            gradient = _is_part_of(user, aten._log_softmax_backward_data.default)
            if gradient:
                continue
            if not inner and not softmax:
                return False
            seen.add(user)
            stack.append(user)
    return True


# -- rewriting ----


@dataclass
class _Writer:
    """Appends calls before one node."""

    graph: torch.fx.Graph
    like: Node

    def __call__(self, target: object, *args: object, **kwargs: object) -> Node:
        return call_node(self.graph, target, args, kwargs, self.like, keep_policy=False)

    def like_first(self, target: object, first: Node, *args: object) -> Node:
        """A call whose result is a fresh tensor like its first argument."""
        node = self(aten.empty_like.default, first, pin_memory=False)
        node.target, node.args, node.kwargs = target, (first, *args), {}  # type: ignore[assignment, arg-type]
        return node


def _rewrite(graph: torch.fx.Graph, found: Loss, rows: int) -> None:
    tokens = found.linear.meta["val"].shape[0]
    with graph.inserting_before(found.nll):
        write = _Writer(graph, found.nll)
        target = _all_targets(write, found, tokens)
        valid = write(aten.ne.Scalar, target, found.ignore_index)
        safe = write(aten.where.ScalarOther, valid, target, 0)
        wide = found.wide
        weights = write(aten._to_copy.default, valid, dtype=wide)
        if found.class_weight is not None:
            chosen = write(aten.index.Tensor, found.class_weight, [safe])
            weights = write(aten.mul.Tensor, write(aten._to_copy.default, chosen, dtype=wide), weights)
        total = write(aten.sum.default, weights)
        scale = write(aten.reciprocal.default, total) if found.reduction == _MEAN else None
        # for all tokens at once: made for a slice, they would share a kernel with its sum, which comes between the
        # softmax and its gradient, and these would be two kernels with a float32 copy of the logits between them
        factors = weights if scale is None else write(aten.mul.Tensor, weights, scale)
        used = write(aten.ne.Scalar, weights, 0)
        vocabulary = found.linear.meta["val"].shape[1]
        _pad_vocabulary(write, found)
        per_token = _PerToken(safe, weights, factors, used)
        slices: list[_Slice] = []
        gathered: Node | None = None
        for start in range(0, tokens, rows):
            made = _slice(write, found, vocabulary, per_token, start, min(start + rows, tokens))
            slices.append(made)
            if found.weight_gradients:  # at once: until then the slice's gradient is alive
                gathered = _add_weight_gradient(write, found, gathered, made)
        loss = _added(write, [s.loss for s in slices])
        if scale is not None:
            loss = write(aten.mul.Tensor, loss, scale)
        loss = _narrowed(write, loss, _getitem(found.nll, 0))
        if found.smoothing is not None:
            smooth = _added(write, [s.smooth for s in slices if s.smooth is not None])
            found.smoothing.total.replace_all_uses_with(_narrowed(write, smooth, found.smoothing.total))
        hidden = _saved(write(aten.cat.default, [s.hidden for s in slices])) if found.hidden_gradients else None
        weight = bias = None
        if gathered is not None:
            weight = _saved(_weight_gradient(write, found, vocabulary, gathered))
        if found.bias_gradients:
            bias = _added(write, [s.bias for s in slices if s.bias is not None])
            bias = _saved(_whole(write, bias, vocabulary))
    _getitem(found.nll, 0).replace_all_uses_with(loss)
    for node in found.hidden_gradients:
        _scaled(graph, node, hidden, found)
    for node, turned in found.weight_gradients:
        _scaled(graph, node, weight, found, turned=turned)
    for node in found.bias_gradients:
        _scaled(graph, node, bias, found)


def _narrowed(write: _Writer, made: Node, old: Node) -> Node:
    """A loss in the dtype of the one that it takes the place of."""
    dtype = old.meta["val"].dtype
    return made if made.meta["val"].dtype is dtype else write(aten._to_copy.default, made, dtype=dtype)


def _pad_vocabulary(write: _Writer, found: Loss) -> None:
    """Weight and bias with zeros up to the next multiple of 16 bytes, where products gain by it."""
    value = found.linear.meta["val"]
    missing = -value.shape[1] % max(1, 16 // value.element_size())
    if missing == 0 or value.device.type not in PADDED_PRODUCTS:
        return
    rows = write(aten.permute.default, found.weight_t, [1, 0])
    rows = write(aten.constant_pad_nd.default, rows, [0, 0, 0, missing], 0.0)
    found.weight_t = write(aten.permute.default, rows, [1, 0])
    if found.bias is not None:
        found.bias = write(aten.constant_pad_nd.default, found.bias, [0, missing], 0.0)


def _whole(write: _Writer, node: Node, count: int) -> Node:
    """A gradient without the rows of the vocabulary's padding, in memory of its own."""
    if node.meta["val"].shape[0] == count:
        return node
    return write(aten.clone.default, write(aten.slice.Tensor, node, 0, 0, count))


@dataclass(frozen=True)
class _PerToken:
    """For each token: its class, what its loss and its gradient are multiplied by, and whether that is not 0."""

    target: Node
    weights: Node
    factors: Node
    used: Node


@dataclass(frozen=True)
class _Slice:
    loss: Node
    smooth: Node | None
    gradient: Node
    hidden_rows: Node
    hidden: Node | None
    bias: Node | None


def _slice(
    write: _Writer,
    found: Loss,
    vocabulary: int,
    tokens: _PerToken,
    start: int,
    stop: int,
) -> _Slice:
    """The loss of tokens ``[start, stop)``, the gradient of their logits and what comes of it."""
    dtype = found.linear.meta["val"].dtype
    device = found.linear.meta["val"].device
    columns = found.weight_t.meta["val"].shape[1]
    hidden = write(aten.slice.Tensor, found.hidden, 0, start, stop)
    if found.bias is None:
        logits = write(aten.mm.default, hidden, found.weight_t)
    else:
        logits = write(aten.addmm.default, found.bias, hidden, found.weight_t)
    wide = found.wide
    x = logits if dtype is wide else write(aten._to_copy.default, logits, dtype=wide)
    positions = write(aten.arange.default, columns, dtype=torch.int64, device=device, pin_memory=False)
    words = None if columns == vocabulary else write(aten.lt.Scalar, positions, vocabulary)
    if words is not None:
        # padding has no part in the softmax and no gradient
        lowest = write(aten.full.default, [], -math.inf, dtype=wide, device=device, pin_memory=False)
        x = write(aten.where.self, words, x, lowest)
    shifted = write(aten.sub.Tensor, x, write(aten.amax.default, x, [1], True))
    powers = write(aten.exp.default, shifted)
    norm = write(aten.sum.dim_IntList, powers, [1], True)
    row_target, row_weight, factor, used = (
        write(aten.unsqueeze.default, write(aten.slice.Tensor, part, 0, start, stop), 1)
        for part in (tokens.target, tokens.weights, tokens.factors, tokens.used)
    )
    hit = write(aten.eq.Tensor, positions, row_target)
    zero = write(aten.full.default, [], 0.0, dtype=wide, device=device, pin_memory=False)
    picked = write(aten.sum.dim_IntList, write(aten.where.self, hit, shifted, zero), [1], True)
    log_norm = write(aten.log.default, norm)
    row_loss = write(aten.sub.Tensor, log_norm, picked)
    # where the weight is zero (ignored tokens) an infinite logit must not turn into NaN
    row_loss = write(aten.where.self, used, write(aten.mul.Tensor, row_loss, row_weight), zero)
    label = write(aten._to_copy.default, hit, dtype=wide)
    probability = write(aten.div.Tensor, powers, norm)
    smooth = None
    if found.smoothing is not None:
        # the negative log-probabilities of all words: neither part is negative, so nothing cancels
        inside = shifted if words is None else write(aten.where.self, words, shifted, zero)
        row_smooth = write(aten.mul.Scalar, log_norm, float(vocabulary))
        row_smooth = write(aten.sub.Tensor, row_smooth, write(aten.sum.dim_IntList, inside, [1], True))
        smooth = write(aten.sum.default, write(aten.where.self, used, row_smooth, zero))
        on_target, on_all = found.smoothing.nll_factor, found.smoothing.smooth_factor
        label = write(aten.add.Scalar, write(aten.mul.Scalar, label, on_target), on_all)
        if words is not None:
            label = write(aten.where.self, words, label, zero)
        probability = write(aten.mul.Scalar, probability, on_target + on_all * vocabulary)
    difference = write(aten.sub.Tensor, probability, label)
    gradient = write(aten.where.self, used, write(aten.mul.Tensor, difference, factor), zero)
    if dtype is not wide:
        gradient = write(aten._to_copy.default, gradient, dtype=dtype)
    weight = write(aten.permute.default, found.weight_t, [1, 0])
    return _Slice(
        loss=write(aten.sum.default, row_loss),
        smooth=smooth,
        gradient=gradient,
        hidden_rows=hidden,
        hidden=write(aten.mm.default, gradient, weight) if found.hidden_gradients else None,
        bias=write(aten.sum.dim_IntList, gradient, [0], False, dtype=wide) if found.bias_gradients else None,
    )


def _add_weight_gradient(write: _Writer, found: Loss, total: Node | None, part: _Slice) -> Node:
    """``total`` and a slice's gradient.T @ hidden, in float32 or wider."""
    value = found.linear.meta["val"]
    turned = write(aten.permute.default, part.gradient, [1, 0])
    if value.dtype is found.wide:
        plain = (turned, part.hidden_rows)
        return write(aten.mm.default, *plain) if total is None else write(aten.addmm.default, total, *plain)
    if value.device.type in FLOAT32_PRODUCTS and found.wide is torch.float32 and value.dtype.itemsize == 2:
        # float32 results of half-precision factors: the matrix units accumulate in float32 anyway
        widened = (turned, part.hidden_rows, found.wide)
        if total is None:
            return write(aten.mm.dtype, *widened)
        # torch 2.11 takes the wide form apart wrongly on fake tensors, so its value is given
        return write.like_first(aten.addmm.dtype, total, *widened)
    product = write(aten._to_copy.default, write(aten.mm.default, turned, part.hidden_rows), dtype=found.wide)
    return product if total is None else write(aten.add.Tensor, total, product)


def _weight_gradient(write: _Writer, found: Loss, vocabulary: int, total: Node) -> Node:
    """The sum over all slices as the gradient that the product would give: its dtype, no row of the padding."""
    value = found.linear.meta["val"]
    if value.dtype is found.wide:
        return _whole(write, total, vocabulary)
    if total.meta["val"].shape[0] != vocabulary:
        total = write(aten.slice.Tensor, total, 0, 0, vocabulary)
    return write(aten._to_copy.default, total, dtype=value.dtype)


def _added(write: _Writer, nodes: list[Node]) -> Node:
    total = nodes[0]
    for node in nodes[1:]:
        total = write(aten.add.Tensor, total, node)
    return total


def _saved(node: Node) -> Node:
    """Computed in the forward, kept for the backward: never the other way round."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    node.meta[CHUNKED] = True
    return node


def _all_targets(write: _Writer, found: Loss, tokens: int) -> Node:
    """A target for every token; those outside of the window are ignored."""
    if found.window is None:
        return found.target
    length, start, stop = found.window
    rows = write(aten.view.default, found.target, [tokens // length, stop - start])
    padded = write(aten.constant_pad_nd.default, rows, [start, length - stop], found.ignore_index)
    return write(aten.view.default, padded, [tokens])


def _getitem(node: Node, item: int) -> Node:
    return next(u for u in node.users if u.target is operator.getitem and u.args[1] == item)


def _scaled(graph: torch.fx.Graph, node: Node, made: Node | None, found: Loss, *, turned: bool = False) -> None:
    """Replace a gradient by what the forward made, times the tangent of the loss."""
    assert made is not None
    with graph.inserting_before(node):
        write = _Writer(graph, node)
        source = write(aten.permute.default, made, [1, 0]) if turned else made
        shape = node.meta["val"].shape
        if tuple(source.meta["val"].shape) != tuple(shape):
            source = write(aten.view.default, source, list(shape))
        out = write(aten.mul.Tensor, source, found.tangent)
        if out.meta["val"].dtype is not node.meta["val"].dtype:
            out = write(aten._to_copy.default, out, dtype=node.meta["val"].dtype)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
