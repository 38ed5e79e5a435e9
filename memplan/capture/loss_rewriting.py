"""A region of logits rewritten: slices of it in the forward, with the gradients that come of each added up at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx
from torch.utils.checkpoint import CheckpointPolicy

from .activations import CHUNKED
from .loss_operands import Whole, Writer, wide_type
from .loss_operators import TOTALS
from .loss_region import Region
from .loss_slices import Slice

Node = torch.fx.Node
aten = torch.ops.aten

#: Devices with a product of half-precision factors that gives float32.
FLOAT32_PRODUCTS = ("cuda",)
#: Devices whose matrix units want every dimension of a product at multiples of 16 bytes, not only the rows' starts
#: (measured on an H100: 23 of GPT-2's 58 ms in two products with 50,257 columns or terms).
PADDED_PRODUCTS = ("cuda",)
_MEAN = 1


def rewrite(graph: torch.fx.Graph, region: Region, rows: int) -> None:
    """Replace all that comes of a region's logits by what is made in slices of at most ``rows`` tokens.

    The old nodes stay, without readers but among themselves.
    """
    with graph.inserting_before(region.before):
        made = _Rewriting.of(Writer(graph, min((*region.totals, *region.exits))), region)
        for start in range(0, region.tokens, rows):
            made.add(start, min(start + rows, region.tokens))
        results = {n: made.exit(n) for n in region.exits} | {n: made.total(n) for n in region.totals}
        hidden, weight, bias = made.gradients()
    for node, result in results.items():
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in region.rows)
    for node in region.hidden_gradients:
        _scaled(graph, node, hidden, region)
    for node, turned in region.weight_gradients:
        _scaled(graph, node, weight, region, turned=turned)
    for node in region.bias_gradients:
        _scaled(graph, node, bias, region)


@dataclass
class _Rewriting:
    write: Writer
    region: Region
    whole: Whole
    weight_t: Node
    bias: Node | None
    parts: dict[Node, list[Node]] = field(default_factory=dict)  # of exits and totals
    hidden: list[Node] = field(default_factory=list)
    biases: list[Node] = field(default_factory=list)
    weight: Node | None = None

    @classmethod
    def of(cls, write: Writer, region: Region) -> _Rewriting:
        """Weight and bias with zeros up to the next multiple of 16 bytes, where products gain by it."""
        value, weight_t, bias = region.linear.meta["val"], region.weight_t, region.bias
        missing = -region.words % max(1, 16 // value.element_size())
        if value.device.type not in PADDED_PRODUCTS:
            missing = 0
        if missing:
            rows = write(aten.permute.default, weight_t, [1, 0])
            rows = write(aten.constant_pad_nd.default, rows, [0, 0, 0, missing], 0.0)
            weight_t = write(aten.permute.default, rows, [1, 0])
            bias = bias and write(aten.constant_pad_nd.default, bias, [0, missing], 0.0)
        whole = Whole(write, region, region.words + missing, wide_type(region))
        return cls(write, region, whole, weight_t, bias)

    def add(self, start: int, stop: int) -> None:
        """The tokens ``[start, stop)``: their part in results and gradients."""
        write, region = self.write, self.region
        hidden = write(aten.slice.Tensor, region.hidden, 0, start, stop)
        if self.bias is None:
            logits = write(aten.mm.default, hidden, self.weight_t)
        else:
            logits = write(aten.addmm.default, self.bias, hidden, self.weight_t)
        made = Slice(self.whole, logits, start, stop)
        for node in region.exits:
            self.parts.setdefault(node, []).append(made.column(node))
        for node in region.totals:
            self.parts.setdefault(node, []).append(made.total(node))
        gradient = self.whole.cast(made.matrix(region.gradient), logits.meta["val"].dtype)
        if region.hidden_gradients:
            weight = write(aten.permute.default, self.weight_t, [1, 0])
            self.hidden.append(write(aten.mm.default, gradient, weight))
        if region.bias_gradients:
            self.biases.append(write(aten.sum.dim_IntList, gradient, [0], False, dtype=self.whole.wide))
        if region.weight_gradients:  # at once: until then the slice's gradient is alive
            self._add_weight_gradient(gradient, hidden)

    def _add_weight_gradient(self, gradient: Node, hidden: Node) -> None:
        """Add gradient.T @ hidden, in float32 or wider."""
        write, total, wide = self.write, self.weight, self.whole.wide
        value = gradient.meta["val"]
        turned = write(aten.permute.default, gradient, [1, 0])
        if value.dtype is wide:
            product = (turned, hidden)
            self.weight = (
                write(aten.mm.default, *product) if total is None else write(aten.addmm.default, total, *product)
            )
        elif value.device.type in FLOAT32_PRODUCTS and wide is torch.float32 and value.dtype.itemsize == 2:
            # float32 results of half-precision factors: the matrix units accumulate in float32 anyway
            widened = (turned, hidden, wide)
            if total is None:
                self.weight = write(aten.mm.dtype, *widened)
            else:
                # torch 2.11 takes the wide form apart wrongly on fake tensors, so its value is given
                self.weight = write.like_first(aten.addmm.dtype, total, *widened)
        else:
            part = write(aten._to_copy.default, write(aten.mm.default, turned, hidden), dtype=wide)
            self.weight = part if total is None else write(aten.add.Tensor, total, part)

    def exit(self, node: Node) -> Node:
        """A vector over the tokens, as the node has it."""
        value = node.meta["val"]
        made = self._tokens(node, self.region.rows[node].inside)
        return self.write.reshaped(self.whole.cast(made, value.dtype), list(value.shape))

    def total(self, node: Node) -> Node:
        """A sum over all tokens, or their mean."""
        write, value = self.write, node.meta["val"]
        source = node.args[0]
        assert isinstance(source, Node)
        of = self.region.rows[source]
        made = write(aten.sum.default, self._tokens(node, of.inside))
        if node.target is aten.mean.default:
            made = write(aten.div.Scalar, made, self.region.count(of.inside) * self.region.words)
        elif node.target not in TOTALS:
            _, target, class_weight, reduction, ignored = source.args
            if reduction == _MEAN:
                targets = self.whole.targets(target, class_weight, int(ignored), of)  # type: ignore[arg-type]
                made = write(aten.div.Tensor, made, targets.total)
        return self.whole.cast(made, value.dtype)

    def _tokens(self, node: Node, inside: bool) -> Node:
        """The parts of a result in a column, without the tokens outside of the window."""
        write, region = self.write, self.region
        made = write(aten.cat.default, self.parts[node])
        if not inside:
            return made
        assert region.window is not None
        length, start, stop = region.window
        made = write(aten.view.default, made, [region.tokens // length, length])
        return write(aten.slice.Tensor, made, 1, start, stop)

    def gradients(self) -> tuple[Node | None, Node | None, Node | None]:
        """Those of hidden, weight and bias, for a tangent of 1."""
        write = self.write
        hidden = _saved(write(aten.cat.default, self.hidden)) if self.hidden else None
        weight = bias = None
        if self.weight is not None:
            weight = _saved(self._without_padding(self.weight, self.region.linear.meta["val"].dtype))
        if self.biases:
            total = self.biases[0]
            for part in self.biases[1:]:
                total = write(aten.add.Tensor, total, part)
            bias = _saved(self._without_padding(total, self.whole.wide))
        return hidden, weight, bias

    def _without_padding(self, node: Node, dtype: torch.dtype) -> Node:
        """A sum over all slices without the rows of the vocabulary's padding, in memory of its own, in a dtype."""
        words, value = self.region.words, node.meta["val"]
        if value.shape[0] != words:
            node = self.write(aten.slice.Tensor, node, 0, 0, words)
            if value.dtype is dtype:
                return self.write(aten.clone.default, node)
        return self.whole.cast(node, dtype)


def _saved(node: Node) -> Node:
    """Computed in the forward, kept for the backward: never the other way round."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    node.meta[CHUNKED] = True
    return node


def _scaled(graph: torch.fx.Graph, node: Node, made: Node | None, region: Region, *, turned: bool = False) -> None:
    """Replace a gradient by what the forward made, times the tangent of the loss."""
    assert made is not None
    with graph.inserting_before(node):
        write = Writer(graph, node)
        source = write(aten.permute.default, made, [1, 0]) if turned else made
        shape = node.meta["val"].shape
        if tuple(source.meta["val"].shape) != tuple(shape):
            source = write(aten.view.default, source, list(shape))
        out = write(aten.mul.Tensor, source, region.tangent)
        if out.meta["val"].dtype is not node.meta["val"].dtype:
            out = write(aten._to_copy.default, out, dtype=node.meta["val"].dtype)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
