"""Logits, what is made of them and their gradient, slice by slice of tokens.

Each value of a `Region` is made for a slice with a row for each token and a column for each word, or one column. All
floating-point values are of one type, float32 or the widest that the model uses, whatever it rounds them to.

A row that is one word's number and zeros (the gradient of what is picked from a row) is kept as its number and its
place, so that its sum needs no pass over the row. And what is picked from the result of an elementwise operator is made
of what is picked from its operands: so the number comes of a first pass over the logits, not of another one at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from .loss_operands import Targets, Whole, Writer
from .loss_operators import CASTS, CONSTANTS, NEUTRAL, SAME_VALUES, SOFTMAX_GRADIENTS, TOTALS, constant
from .loss_region import NLL, NLL_BACK, SCATTERS, WINDOWS, Rows

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class OneWord:
    """Rows that are 0 but for ``value`` at the word ``index``; both have one column."""

    index: Node
    value: Node


@dataclass
class Slice:
    """The region for the tokens ``[start, stop)``."""

    whole: Whole
    logits: Node
    start: int
    stop: int
    _values: dict[Node, Node | OneWord] = field(default_factory=dict)
    _written: dict[Node, Node] = field(default_factory=dict)
    _cut: dict[Node, Node] = field(default_factory=dict)
    _picked: dict[tuple[Node, Node], Node] = field(default_factory=dict)
    _hits: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        region = self.whole.region
        self._values[region.linear] = self.whole.widened(self.logits)
        for node in region.rows:
            if node is not region.linear:
                self._values[node] = self._made(node)

    @property
    def write(self) -> Writer:
        return self.whole.write

    def value(self, node: Node) -> Node:
        """A value of the region, with as many columns as it takes: a row of one word's number is written out."""
        found = self._values[node]
        if not isinstance(found, OneWord):
            return found
        if node not in self._written:
            zero = self.whole.number(0.0, found.value.meta["val"].dtype)
            self._written[node] = self.write(aten.where.self, self.hit(found.index), found.value, zero)
        return self._written[node]

    def column(self, node: Node) -> Node:
        """A value of the region with one number for each token."""
        return self._full(self.value(node), 1)

    def total(self, node: Node) -> Node:
        """For each token, its part in a sum over all."""
        source = node.args[0]
        assert isinstance(source, Node)
        return self.column(source) if source.target is NLL else self._full(self._sum(source), 1)

    def matrix(self, node: Node) -> Node:
        """A value of the region with a column for each word, and zeros in the padding."""
        found = self._full(self.value(node), self.whole.columns)
        return self._neutral(found, 0.0)

    def hit(self, index: Node) -> Node:
        if index not in self._hits:
            self._hits[index] = self.write(aten.eq.Tensor, self.whole.positions, index)
        return self._hits[index]

    # -- operands ----

    def cut(self, whole: Node) -> Node:
        """These tokens of a column or a matrix of all."""
        if whole not in self._cut:
            self._cut[whole] = self.write(aten.slice.Tensor, whole, 0, self.start, self.stop)
        return self._cut[whole]

    def operand(self, node: Node, user: Node) -> Node:
        region = self.whole.region
        if node in region.rows:
            return self.value(node)
        of, shape = region.rows[user], tuple(user.meta["val"].shape)
        found = self.whole.operand(node, shape, of)
        if found.meta["val"].dim() < 2 or found.meta["val"].shape[0] == 1:
            return found
        if found.meta["val"].shape[1] == 1:
            return self.cut(found)
        return self.whole.padded(self.whole.widened(self.cut(found)))

    def index(self, node: Node, user: Node) -> Node:
        region = self.whole.region
        if node in region.rows:
            return self.value(node)
        return self.cut(self.whole.operand(node, tuple(node.meta["val"].shape), Rows(False, self._space(user).inside)))

    def _space(self, user: Node) -> Rows:
        return self.whole.region.rows[user]

    def _full(self, node: Node, columns: int) -> Node:
        shape = [self.stop - self.start, columns]
        return node if list(node.meta["val"].shape) == shape else self.write(aten.expand.default, node, shape)

    def _neutral(self, node: Node, value: float) -> Node:
        """The padding replaced by what changes no reduction."""
        words = self.whole.words
        if words is None:
            return node
        return self.write(aten.where.self, words, node, self.whole.number(value, node.meta["val"].dtype))

    # -- values ----

    def _made(self, node: Node) -> Node | OneWord:
        target, rows = node.target, self.whole.region.rows
        first = node.args[0] if node.args else None
        if target is operator.getitem:
            return self._values[first]  # type: ignore[index]
        if target in SAME_VALUES:
            return self._same(node)
        if target in WINDOWS:
            return self._windowed(node)
        if target in CONSTANTS:
            number = constant(node)
            assert number is not None
            dtype = node.meta["val"].dtype
            return self.whole.number(number, self.whole.wide if dtype.is_floating_point else dtype)
        if target in NEUTRAL:
            assert isinstance(first, Node)
            return self._reduced(node, first)
        if target is aten.gather.default:
            assert isinstance(first, Node)
            return self._pick(first, self.index(node.args[2], node))  # type: ignore[arg-type]
        if target in SCATTERS:
            values = node.args[3]
            if isinstance(values, Node):
                narrow = (*node.meta["val"].shape[:-1], 1)
                column = self.value(values) if values in rows else self._column(values, narrow, rows[node])
            else:
                column = self.whole.number(float(values))  # type: ignore[arg-type]
            return OneWord(self.index(node.args[2], node), column)  # type: ignore[arg-type]
        if target in SOFTMAX_GRADIENTS:
            return self._softmax_gradient(node)
        if target is NLL:
            return self._likelihood(node)
        if target is NLL_BACK:
            return self._likelihood_gradient(node)
        return self._called(node, [self.operand(a, node) if isinstance(a, Node) else a for a in node.args])

    def _column(self, node: Node, shape: tuple[int, ...], of: Rows) -> Node:
        found = self.whole.operand(node, shape, Rows(False, of.inside))
        return found if found.meta["val"].dim() < 2 else self.cut(found)

    def _called(self, node: Node, args: Sequence[object]) -> Node:
        return self.whole.widened(self.write(node.target, *args, **node.kwargs))

    def _same(self, node: Node) -> Node | OneWord:
        source = node.args[0]
        assert isinstance(source, Node)
        found = self._values.get(source)
        if not isinstance(found, OneWord):
            found = self.operand(source, node)
        if node.target in CASTS and not isinstance(found, OneWord):
            dtype = node.meta["val"].dtype
            return self.whole.cast(found, self.whole.wide if dtype.is_floating_point else dtype)
        return found

    def _windowed(self, node: Node) -> Node | OneWord:
        """All tokens go on, those outside of the window too, whose gradient is zero."""
        source = node.args[0]
        assert isinstance(source, Node)
        found, rows = self._values[source], self.whole.region.rows
        if not rows[source].inside or rows[node].inside:
            return found
        inside = self.cut(self.whole.inside)
        if isinstance(found, OneWord):
            return OneWord(found.index, self.write(aten.where.self, inside, found.value, self.whole.number(0.0)))
        return self.write(aten.where.self, inside, found, self.whole.number(0.0, found.meta["val"].dtype))

    def _reduced(self, node: Node, source: Node) -> Node:
        if node.target is aten.sum.dim_IntList:
            return self._sum(source)
        if node.target is aten.mean.dim:
            return self.write(aten.mul.Scalar, self._sum(source), 1.0 / self.whole.region.words)
        found = self._neutral(self._full(self.value(source), self.whole.columns), NEUTRAL[node.target])  # type: ignore[index]
        if node.target is aten.argmax.default:
            return self.write(aten.argmax.default, found, 1, True)
        return self.write(node.target, found, [1], True)

    def _sum(self, source: Node) -> Node:
        """Over the words, as a column.

        Where part of what is summed needs no pass over the row, it is summed apart; and log-probabilities are what is
        less than the largest logit, and the logarithm of the norm: both of one sign, so that nothing cancels, and the
        first is summed in the pass that makes the norm.
        """
        found = self._values[source]
        if isinstance(found, OneWord):
            return found.value
        if _is_narrow(found):
            return self.write(aten.mul.Scalar, found, self.whole.region.words)
        left, right = (source.args[0], source.args[1]) if len(source.args) == 2 else (None, None)
        if not source.kwargs and left in self._values and right in self._values:
            parts = self._values[left], self._values[right]  # type: ignore[index]
            log_softmax = str(source.meta.get("original_aten")) == str(aten._log_softmax.default)
            apart = any(isinstance(part, OneWord) or _is_narrow(part) for part in parts)
            if apart and (source.target is aten.add.Tensor or (source.target is aten.sub.Tensor and log_softmax)):
                return self.write(source.target, self._sum(left), self._sum(right))  # type: ignore[arg-type]
        return self.write(aten.sum.dim_IntList, self._neutral(found, 0.0), [1], True)

    def _pick(self, source: Node, index: Node) -> Node:
        """The element of each row at one word, as a column."""
        key = (source, index)
        if key not in self._picked:
            self._picked[key] = self._pick_of(source, index)
        return self._picked[key]

    def _pick_of(self, source: Node, index: Node) -> Node:
        region = self.whole.region
        if source in region.rows and not region.rows[source].wide:
            return self.value(source)
        if source in region.rows and source is not region.linear:
            if source.target in SAME_VALUES and source.target not in CASTS and source.args[0] in region.rows:
                return self._pick(source.args[0], index)  # type: ignore[arg-type]
            if source.target not in SAME_VALUES and _elementwise(source):
                args = [self._pick_operand(a, source, index) if isinstance(a, Node) else a for a in source.args]
                return self._called(source, args)
        found = self._values[source]
        return self._at(self.value(source) if isinstance(found, OneWord) else found, index)

    def _pick_operand(self, node: Node, user: Node, index: Node) -> Node:
        if node in self.whole.region.rows:
            return self._pick(node, index)
        return self._at(self.operand(node, user), index)

    def _at(self, found: Node, index: Node) -> Node:
        if _is_narrow(found):
            return found
        zero = self.whole.number(0.0, found.meta["val"].dtype)
        chosen = self.write(aten.where.self, self.hit(index), found, zero)
        return self.write(aten.sum.dim_IntList, chosen, [1], True)

    # -- operators of their own ----

    def _softmax_gradient(self, node: Node) -> Node:
        gradient, output, *_ = node.args
        assert isinstance(gradient, Node)
        assert isinstance(output, Node)
        of = self.value(output)
        if node.target is aten._log_softmax_backward_data.default:
            total = self._sum(gradient)  # (before the gradient is written out, if it is one word's)
            given, of = self.value(gradient), self.write(aten.exp.default, of)
        else:
            given = self.write(aten.mul.Tensor, self.value(gradient), of)
            total = self.write(aten.sum.dim_IntList, self._neutral(given, 0.0), [1], True)
        return self.write(aten.sub.Tensor, given, self.write(aten.mul.Tensor, of, total))

    def _likelihood(self, node: Node) -> Node:
        probabilities, target, class_weight, _, ignored = node.args
        assert isinstance(probabilities, Node)
        targets = self.whole.targets(target, class_weight, int(ignored), self._space(node))  # type: ignore[arg-type]
        picked = self._pick(probabilities, self.cut(targets.classes))
        loss = self.write(aten.neg.default, self.write(aten.mul.Tensor, picked, self.cut(targets.weights)))
        # where the weight is zero (ignored tokens) an infinite logit must not turn into NaN
        return self._where_used(targets, loss)

    def _where_used(self, targets: Targets, column: Node) -> Node:
        used = self.write(aten.ne.Scalar, self.cut(targets.weights), 0)
        return self.write(aten.where.self, used, column, self.whole.number(0.0))

    def _likelihood_gradient(self, node: Node) -> OneWord:
        tangent, _, target, class_weight, reduction, ignored, _ = node.args
        of = self._space(node)
        targets = self.whole.targets(target, class_weight, int(ignored), of)  # type: ignore[arg-type]
        if tangent in self.whole.region.rows:
            factors = self.write(aten.mul.Tensor, self.cut(targets.weights), self.value(tangent))  # type: ignore[arg-type]
            factors = self.write(aten.neg.default, factors)
            assert reduction == 0, "a mean has one tangent"
        else:
            factors = self.cut(self.whole.factors(node, of))
        return OneWord(self.cut(targets.classes), self._where_used(targets, factors))


def _is_narrow(node: Node) -> bool:
    """Whether a value is the same for all words."""
    value = node.meta["val"]
    return bool(value.dim() < 2 or value.shape[1] == 1)


def _elementwise(node: Node) -> bool:
    """Whether a node is made by calling its operator on what its operands are."""
    special = (CONSTANTS, SCATTERS, SOFTMAX_GRADIENTS, NEUTRAL, WINDOWS, TOTALS, (NLL, NLL_BACK, aten.gather.default))
    return not any(node.target in one for one in special)
