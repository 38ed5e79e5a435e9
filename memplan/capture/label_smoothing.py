"""The term that label smoothing adds to a loss, found in the joint graph of ``cross_entropy(label_smoothing=...)``.

With smoothing e and a vocabulary of V, the loss is (1 - e) times the negative log-likelihood plus e / V times the sum
of all negative log-probabilities (Szegedy et al., "Rethinking the Inception Architecture", 2016), both over the same
tokens. Two heads read the log-probabilities, then, and two gradients are added before the softmax's: one tangent of
the loss, times two numbers. Those numbers are read off the graph; whatever differs from that form is not matched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.fx

aten = torch.ops.aten
Node = torch.fx.Node

_MEAN = 1


@dataclass(frozen=True)
class Smoothing:
    """``total`` sums the negative log-probabilities of all words and tokens but the ignored; ``reader`` begins it.

    The gradient of the loss, for a tangent ``tangent``, is ``nll_factor`` times that of the negative log-likelihood
    plus ``smooth_factor`` times that of ``total`` (divided by the count of tokens, where the loss is a mean).
    ``gradient`` is the node that adds the two.
    """

    reader: Node
    total: Node
    gradient: Node
    tangent: Node
    nll_factor: float
    smooth_factor: float


def sums_over_vocabulary(readers: list[Node]) -> list[Node]:
    """Those of the readers of log-probabilities (tokens, vocabulary) that may begin the term of label smoothing."""
    return [n for n in readers if n.target is aten.sum.dim_IntList and not n.kwargs and _is_over_columns(n)]


def match_smoothing(nll: Node, backward: Node, reader: Node) -> Smoothing | None:
    """The smoothing whose forward begins at ``reader`` and whose gradient is added to ``backward``'s, or None.

    ``nll`` and ``backward`` are the `nll_loss_forward` and `nll_loss_backward` of the same log-probabilities.
    """
    _, target, class_weight, reduction, ignore_index = nll.args
    if class_weight is not None:  # then the term has weights of its own: those of all words, not of the target
        return None
    total = _total(reader, target, ignore_index)
    # the term is made where the loss is, so nothing may need it before
    if total is None or any(user < nll for user in total.users):
        return None
    if len(backward.users) != 1:
        return None
    (gradient,) = backward.users
    if gradient.target is not aten.add.Tensor or gradient.kwargs or len(gradient.args) != 2:
        return None
    left, right = gradient.args
    if (left is backward) == (right is backward):
        return None
    other = right if left is backward else left
    tangent = _tangent(other, tuple(backward.meta["val"].shape), target, ignore_index)
    if tangent is not None and reduction == _MEAN:
        tangent = _without_count(tangent, target, ignore_index)
    smooth, plain = _multiple(tangent), _multiple(backward.args[0])
    if smooth is None or plain is None or smooth[0] is not plain[0]:
        return None
    return Smoothing(reader, total, gradient, smooth[0], plain[1], smooth[1])


def _calls(node: object, *targets: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.target in targets and not node.kwargs


def _is_over_columns(node: Node) -> bool:
    return len(node.args) == 2 and node.args[1] in ([1], [-1], (1,), (-1,))


def _total(reader: Node, target: object, ignore_index: object) -> Node | None:
    """``sum(masked_fill(-reader, target == ignore_index, 0))``, each read by the next alone."""
    node = reader
    for expected in (aten.neg.default, aten.masked_fill.Scalar, aten.sum.default):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if not _calls(user, expected) or user.args[0] is not node:
            return None
        if expected is aten.masked_fill.Scalar and not _masks_ignored(user, target, ignore_index):
            return None
        node = user
    return node


def _masks_ignored(node: Node, target: object, ignore_index: object) -> bool:
    return _is_ignored(node.args[1], target, ignore_index) and node.args[2] in (0, 0.0)


def _is_ignored(node: object, target: object, ignore_index: object) -> bool:
    """Whether the node is ``target == ignore_index``."""
    return _calls(node, aten.eq.Scalar) and node.args == (target, ignore_index)


def _tangent(node: object, shape: tuple[int, ...], target: object, ignore_index: object) -> Node | None:
    """The number t of a gradient that is -t for each word of each token that counts, and 0 for the ignored."""
    if not _calls(node, aten.expand.default) or tuple(node.meta["val"].shape) != shape:
        return None
    column = node.args[0]
    if not _calls(column, aten.unsqueeze.default) or column.args[1] not in (1, -1):
        return None
    negative = column.args[0]
    if not _calls(negative, aten.neg.default):
        return None
    masked = negative.args[0]
    if not _calls(masked, aten.masked_fill.Scalar) or not _masks_ignored(masked, target, ignore_index):
        return None
    rows = masked.args[0]
    if not _calls(rows, aten.expand.default) or tuple(rows.meta["val"].shape) != shape[:1]:
        return None
    tangent = rows.args[0]
    return tangent if isinstance(tangent, Node) and tangent.meta["val"].dim() == 0 else None


def _without_count(node: Node, target: object, ignore_index: object) -> Node | None:
    """What is divided by the count of the tokens that are not ignored."""
    if not _calls(node, aten.div.Tensor):
        return None
    number, count = node.args
    if not isinstance(number, Node) or not _calls(count, aten.sum.default):
        return None
    kept = count.args[0]
    if not _calls(kept, aten.bitwise_not.default, aten.logical_not.default):
        return None
    return number if _is_ignored(kept.args[0], target, ignore_index) else None


def _multiple(node: object) -> tuple[Node, float] | None:
    """A tensor and the number that it is multiplied by."""
    if not _calls(node, aten.mul.Scalar, aten.mul.Tensor):
        return None
    tensor, number = node.args
    if not isinstance(tensor, Node) or not isinstance(number, float):
        return None
    return tensor, number
