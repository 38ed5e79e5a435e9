"""What slices of a region of logits read that is no part of them: made for all tokens, before the first slice."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.fx

from .loss_operators import constant
from .loss_region import Region, Role, Rows
from .rewriting import call_node

Node = torch.fx.Node
aten = torch.ops.aten

_MEAN = 1


@dataclass
class Writer:
    """Appends calls before one node."""

    graph: torch.fx.Graph
    like: Node

    def __call__(self, target: object, *args: object, **kwargs: object) -> Node:
        return call_node(self.graph, target, args, kwargs, self.like, keep_policy=False)

    def reshaped(self, node: Node, shape: list[int]) -> Node:
        """The same elements in another shape; a copy where their strides have none."""
        value = node.meta["val"]
        if list(value.shape) == shape:
            return node
        if not value.is_contiguous():
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self(aten.view.default, node, shape)

    def like_first(self, target: object, first: Node, *args: object) -> Node:
        """A call whose result is a fresh tensor like its first argument."""
        node = self(aten.empty_like.default, first, pin_memory=False)
        node.target, node.args, node.kwargs = target, (first, *args), {}  # type: ignore[assignment, arg-type]
        return node


def wide_type(region: Region) -> torch.dtype:
    """What losses and gradients are computed in: float32, or the wider one that the model uses."""
    values = [n.meta["val"] for n in (region.linear, *region.rows)]
    used = [v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point]
    return functools.reduce(torch.promote_types, used, torch.float32)


@dataclass(frozen=True)
class Targets:
    """Of each token: its class (0 for the ignored) and its weight, 0 for the ignored; and the sum of the weights."""

    classes: Node
    weights: Node
    total: Node


@dataclass
class Whole:
    """What the slices read that is no part of them, made before them; ``columns`` counts words and their padding."""

    write: Writer
    region: Region
    columns: int
    wide: torch.dtype
    _made: dict[Node, Node] = field(default_factory=dict)
    _operands: dict[tuple[Node, Role, tuple[int, ...]], Node] = field(default_factory=dict)
    _targets: dict[tuple[object, ...], Targets] = field(default_factory=dict)

    @functools.cached_property
    def device(self) -> torch.device:
        return self.region.linear.meta["val"].device  # type: ignore[no-any-return]

    @functools.cached_property
    def positions(self) -> Node:
        return self.write(aten.arange.default, self.columns, dtype=torch.int64, device=self.device, pin_memory=False)

    @functools.cached_property
    def words(self) -> Node | None:
        """Which columns are no padding; None where there is none."""
        return (
            None if self.columns == self.region.words else self.write(aten.lt.Scalar, self.positions, self.region.words)
        )

    @functools.cached_property
    def inside(self) -> Node:
        """Which tokens are in the window, as a column."""
        assert self.region.window is not None
        length, start, stop = self.region.window
        kept = self.write(
            aten.full.default, [stop - start], True, dtype=torch.bool, device=self.device, pin_memory=False
        )
        padded = self.write(aten.constant_pad_nd.default, kept, [start, length - stop], False)
        rows = self.write(aten.expand.default, padded, [self.region.tokens // length, length])
        return self.write.reshaped(rows, [self.region.tokens, 1])

    def number(self, value: float, dtype: torch.dtype | None = None) -> Node:
        return self.write(aten.full.default, [], value, dtype=dtype or self.wide, device=self.device, pin_memory=False)

    def widened(self, node: Node) -> Node:
        dtype = node.meta["val"].dtype
        return node if dtype is self.wide or not dtype.is_floating_point else self.cast(node)

    def cast(self, node: Node, dtype: torch.dtype | None = None) -> Node:
        dtype = dtype or self.wide
        return node if node.meta["val"].dtype is dtype else self.write(aten._to_copy.default, node, dtype=dtype)

    def available(self, node: Node) -> Node:
        """The node, or the same once more where it comes too late, or depends on the tangent: for a tangent of 1."""
        region = self.region
        if node.op != "call_function" and node is not region.tangent:
            return node
        if node not in region.backward and node < region.before:
            return node
        if node not in self._made:
            value, number = node.meta["val"], 1.0 if node is region.tangent else constant(node)
            if number is not None:
                made = self.number(number, value.dtype)
                self._made[node] = self.write(aten.expand.default, made, list(value.shape)) if value.dim() else made
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.available)
                self._made[node] = self.write(node.target, *args, **kwargs)
        return self._made[node]

    def operand(self, node: Node, shape: tuple[int, ...], of: Rows) -> Node:
        """An operand from outside of a result of this shape: a number, a row, a column or a matrix, of all tokens."""
        role = self.region.role(node, shape, of)
        assert role is not None, f"{node.name} is checked by the match"
        key = (node, role, () if role is not Role.COLUMN else shape)
        if key not in self._operands:
            self._operands[key] = self._operand(self.available(node), role, shape, of)
        return self._operands[key]

    def _operand(self, node: Node, role: Role, shape: tuple[int, ...], of: Rows) -> Node:
        write, region = self.write, self.region
        given = tuple(node.meta["val"].shape)
        match role:
            case Role.SCALAR:
                return self.widened(write.reshaped(node, []))
            case Role.ROW:
                return self.padded(self.widened(write.reshaped(node, [1, region.words])))
            case Role.MATRIX:
                return write.reshaped(node, [region.tokens, region.words])
            case Role.COLUMN:
                full = (*shape[:-1], 1) if of.wide else shape
                column = node if given == full else write(aten.expand.default, node, list(full))
                return self.widened(self.spread(column, of))

    def padded(self, node: Node) -> Node:
        """A matrix with zeros in the columns of the padding."""
        missing = self.columns - self.region.words
        return node if not missing else self.write(aten.constant_pad_nd.default, node, [0, missing], 0)

    def spread(self, node: Node, of: Rows, fill: int = 0) -> Node:
        """Numbers of tokens as a column for all of them; those outside of the window are given ``fill``."""
        write, region = self.write, self.region
        if of.inside:
            assert region.window is not None
            length, start, stop = region.window
            node = write.reshaped(node, [region.tokens // length, stop - start])
            node = write(aten.constant_pad_nd.default, node, [start, length - stop], fill)
        return write.reshaped(node, [region.tokens, 1])

    def targets(self, target: Node, class_weight: Node | None, ignored: int, of: Rows) -> Targets:
        """Once for all tokens: made for a slice, weights would share a kernel with the sum over them, which comes
        between the softmax and its gradient, and these would be two kernels with a copy of the logits between them."""
        key = (target, class_weight, ignored, of.inside)
        if key not in self._targets:
            write = self.write
            classes = self.spread(self.available(target), of, ignored)
            valid = write(aten.ne.Scalar, classes, ignored)
            safe = write(aten.where.ScalarOther, valid, classes, 0)
            weights = self.cast(valid)
            if class_weight is not None:
                chosen = write(aten.index.Tensor, self.available(class_weight), [safe])
                weights = write(aten.mul.Tensor, self.cast(chosen), weights)
            self._targets[key] = Targets(safe, weights, write(aten.sum.default, weights))
        return self._targets[key]

    def factors(self, node: Node, of: Rows) -> Node:
        """What an `nll_loss_backward` multiplies the weights by: its tangent, over their sum where it is of a mean."""
        tangent, _, target, class_weight, reduction, ignored, _ = node.args
        assert isinstance(tangent, Node)
        given = self.operand(tangent, (self.region.count(of.inside),), Rows(False, of.inside))
        targets = self.targets(target, class_weight, int(ignored), of)  # type: ignore[arg-type]
        factors = self.write(aten.mul.Tensor, targets.weights, given)
        if reduction == _MEAN:
            factors = self.write(aten.div.Tensor, factors, targets.total)
        return self.write(aten.neg.default, factors)
