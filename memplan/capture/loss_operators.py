"""Operators that keep the rows of a matrix of logits apart, and those through which a gradient is a linear function."""

from __future__ import annotations

import torch
import torch.fx

Node = torch.fx.Node
aten = torch.ops.aten

#: Calls that change no value; casts among floating-point types are such where all is computed in the widest of them.
SAME_VALUES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
    }
)
CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})
#: Reductions, by the value that changes none of them: what padding is given.
NEUTRAL = {
    aten.sum.dim_IntList: 0.0,
    aten.mean.dim: 0.0,
    aten.amax.default: float("-inf"),
    aten.amin.default: float("inf"),
    aten.argmax.default: float("-inf"),
}
#: Sums over all elements.
TOTALS = frozenset({aten.sum.default, aten.mean.default})
#: One number everywhere, in the shape that is asked for; the first operand gives no more than that.
CONSTANTS = {
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.full.default: 1,
    aten.scalar_tensor.default: 0,
    aten.zeros_like.default: None,
    aten.new_zeros.default: None,
    aten.zeros.default: None,
    aten.ones_like.default: None,
    aten.new_ones.default: None,
    aten.ones.default: None,
}
_ONES = (aten.ones_like.default, aten.new_ones.default, aten.ones.default)
SOFTMAX_GRADIENTS = frozenset({aten._log_softmax_backward_data.default, aten._softmax_backward_data.default})
_WINDOWS_BACK = (aten.slice_backward.default, aten.constant_pad_nd.default)
#: Linear in the first operand alone.
_LINEAR_IN_FIRST = frozenset(
    {
        *SAME_VALUES,
        *SOFTMAX_GRADIENTS,
        *_WINDOWS_BACK,
        aten.neg.default,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.mul.Scalar,
        aten.permute.default,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.nll_loss_backward.default,
        aten.tanh_backward.default,
        aten.sigmoid_backward.default,
        aten.threshold_backward.default,
        aten.slice.Tensor,
    }
)


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result is made of the operands' elements at its place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or any(isinstance(v, Node) for v in node.kwargs.values()):
        return False
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def constant(node: object) -> float | None:
    """The number that a node is everywhere, or None."""
    if not isinstance(node, Node) or node.target not in CONSTANTS:
        return None
    where = CONSTANTS[node.target]
    if where is None:
        return 1.0 if node.target in _ONES else 0.0
    number = node.args[where]
    return float(number) if isinstance(number, (int, float)) else None


def is_linear(node: Node, varying: list[Node]) -> bool:
    """Whether the result is linear in those operands that are ``varying``, taken together (no constant term)."""
    target, args = node.target, node.args
    if target in _LINEAR_IN_FIRST:
        return varying == [args[0]] and args[1:].count(args[0]) == 0 and _pads_zeros(node)
    if target is aten.mul.Tensor:
        return len(varying) == 1 and args.count(varying[0]) == 1
    if target in (aten.add.Tensor, aten.sub.Tensor):
        return len(varying) == 2  # (a number, or what the forward knows, would be a constant term)
    if target is aten.where.self:
        return args[0] not in varying and all(a in varying or constant(a) == 0 for a in args[1:])
    if target is aten.masked_fill.Scalar:
        return varying == [args[0]] and args[2] in (0, 0.0)
    if target in (aten.scatter_add.default, aten.scatter.src):
        return varying == [args[3]] and constant(args[0]) == 0
    return False


def _pads_zeros(node: Node) -> bool:
    return node.target is not aten.constant_pad_nd.default or len(node.args) < 3 or node.args[2] in (0, 0.0)


def is_repeatable(node: Node) -> bool:
    """Whether a call may be made again, earlier: no random numbers, no collective, nothing changed."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return (
        target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
