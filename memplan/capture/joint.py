"""AOTAutograd's joint graph as `memplan.ir.joint.JointGraph`: storages, costs, and what may be kept or done twice."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from ..ir.call_work import call_work as work_of_call
from ..ir.device import DeviceFigures, Unit, Work
from ..ir.joint import JointGraph, JointNode, NodeKind, Side
from ..ir.program import evaluate
from .fx import symbol_hint
from .sizes import size_of

Node = torch.fx.Node
aten = torch.ops.aten

#: Calls whose result is one literal; their tensor operand, if they have one, gives only its type and device.
CONSTANTS = frozenset(
    {
        aten.full.default,
        aten.full_like.default,
        aten.scalar_tensor.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones.default,
        aten.ones_like.default,
        aten.zeros.default,
        aten.zeros_like.default,
    }
)
#: Operators that need not give the same bits twice (atomic additions), or change something.
_NEVER_AGAIN = ("scatter_add", "scatter_reduce", "index_put", "index_add", "embedding_bag", "_embedding_bag", "histc")
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@dataclass(frozen=True)
class Costs:
    """How nodes are priced: the device's figures, and which operators are one fused pass."""

    figures: DeviceFigures
    fused: Callable[[str], bool]


@dataclass(frozen=True)
class _Reader:
    """One walk over the joint graph; ``node_info`` is torch's classification of its nodes."""

    node_info: object
    costs: Costs
    position: dict[Node, int] = field(default_factory=dict)
    nodes: list[JointNode] = field(default_factory=list)
    kinds: dict[Node, NodeKind] = field(default_factory=dict)
    #: (by the backward, node)
    read_already: set[tuple[bool, Node]] = field(default_factory=set)
    #: what the forward runs for the sake of values that must be saved
    for_saved: set[Node] = field(default_factory=set)

    def read(self, graph: torch.fx.Graph) -> None:
        results = set(graph.output_node().all_input_nodes)
        for node in reversed(graph.nodes):
            if must_save(node) or any(u in self.for_saved for u in node.users):
                self.for_saved.add(node)
        for node in graph.nodes:
            if node.op == "output":
                continue
            self.position[node] = len(self.nodes)
            self.nodes.append(self.node(node, node in results))

    def node(self, node: Node, result: bool) -> JointNode:
        kind, side = self.kind(node), self.side(node)
        inputs = tuple(self.position[i] for i in node.all_input_nodes)
        own = len(self.nodes)
        view = kind is NodeKind.VIEW and not _is_item_of_call(node)
        storage = self.nodes[inputs[0]].storage if view and inputs else own
        nbytes = result_bytes(node) if storage == own and kind is not NodeKind.INPUT else 0
        duration = self.duration(node, kind, side)
        if side is Side.BACKWARD:
            keep, again = None, None
        elif side is Side.EITHER and node.op != "placeholder":
            # nothing in the forward needs it: computing it is work either way, so doing it in the backward is free
            keep, again = keep_bytes(node), None if must_save(node) else 0.0
        else:
            keep, again = keep_bytes(node), self.again(node, kind, duration)
        cheap = again == 0 or kind is not NodeKind.CALL
        signature = f"{node.target}|{nbytes}|{kind.value}|{side.value}|{keep}|{again}|{cheap}|{result}"
        return JointNode(
            node.name, kind, side, inputs, storage, nbytes, keep, again, cheap, duration, moved_bytes(node), result,
            signature, is_elementwise(node),
        )  # fmt: skip

    def kind(self, node: Node) -> NodeKind:
        found = self.kinds.get(node)
        if found is None:
            found = self.kinds[node] = kind_of(node, self.costs.fused)
        return found

    def side(self, node: Node) -> Side:
        info = self.node_info
        if node in info.tangents_closure:  # type: ignore[attr-defined]
            return Side.BACKWARD
        if info.is_required_fw(node) or node.op == "placeholder" or node in self.for_saved:  # type: ignore[attr-defined]
            return Side.FORWARD
        return Side.EITHER

    def duration(self, node: Node, kind: NodeKind, side: Side) -> float:
        figures = self.costs.figures
        if kind is NodeKind.CALL:
            return figures.microseconds(call_work(node))
        if kind is not NodeKind.FUSED or node.target in CONSTANTS:
            return 0.0
        launch = figures.launch if self.feeds_call(node) else 0.0
        return figures.streaming(self.fused_work(node, backward=side is Side.BACKWARD)) + launch

    def fused_work(self, node: Node, *, backward: bool) -> Work:
        """What a node adds to the kernel it is a part of: reading what calls made, and writing what calls read.

        What several read is counted for the first of them: they are one kernel as a rule. The backward reads what the
        forward has read once more, and what it has made.
        """
        nbytes = result_bytes(node) if self.feeds_call(node) or not node.users else 0
        for i in node.all_input_nodes:
            source = i
            while is_view(source) and source.all_input_nodes:
                source = source.all_input_nodes[0]
            if (backward, source) in self.read_already:
                continue
            self.read_already.add((backward, source))
            stored = self.kind(source) in (NodeKind.CALL, NodeKind.INPUT) or _is_item_of_call(source)
            if stored or (backward and self.nodes[self.position[source]].side is not Side.BACKWARD):
                nbytes += result_bytes(i)
        return Work(nbytes, elements(node), Unit.SCALAR)

    def feeds_call(self, node: Node) -> bool:
        stack = list(node.users)
        while stack:
            user = stack.pop()
            match self.kind(user):
                case NodeKind.CALL:
                    return True
                case NodeKind.VIEW:
                    stack.extend(user.users)
                case _:
                    pass
        return False

    def again(self, node: Node, kind: NodeKind, duration: float) -> float | None:
        """Microseconds of computing a forward node again; None: never."""
        if node.op in ("placeholder", "get_attr") or must_save(node):
            return None
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)) or kind is NodeKind.VIEW:
            return 0.0
        if node.meta.get("recompute") in _RECOMPUTED or node.target in CONSTANTS:
            return 0.0  # a literal is part of whatever reads it, where keeping it is a kernel and an allocation
        if not repeatable(node):
            return None
        return duration


def joint_graph(graph: torch.fx.Graph, node_info: object, costs: Costs) -> JointGraph:
    """The graph as data: all nodes but the output, in its order.

    Parameters
    ----------
    node_info:
        torch's `NodeInfo` of the graph.
    """
    reader = _Reader(node_info, costs)
    reader.read(graph)
    return JointGraph(tuple(reader.nodes))


def kind_of(node: Node, fused: Callable[[str], bool]) -> NodeKind:
    """What a node is to the cost model."""
    if node.op in ("placeholder", "get_attr"):
        return NodeKind.INPUT
    if node.target is operator.getitem or is_view(node):
        return NodeKind.VIEW
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return NodeKind.VIEW  # sizes
    if isinstance(node.target, torch._ops.OpOverload) and fused(str(node.target)):
        return NodeKind.FUSED
    return NodeKind.CALL


def is_elementwise(node: Node) -> bool:
    """Whether each element of the result is made of the operands' elements that are broadcast to its place."""
    target = node.target
    if target in _CASTS:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def repeatable(node: Node) -> bool:
    """Whether running a call twice gives the same values and changes nothing: not random, no effects, no collective."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims", "memplan"):
        return False
    name = target._schema.name.partition("::")[2]
    if name in _NEVER_AGAIN or target._schema.is_mutable:
        return False
    if node.meta.get("partitioner_tag") == "must_be_in_forward":
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return True
    # attention is marked as random for its dropout: without any it is a function of its inputs
    return argument_of(node, "dropout_p") == 0.0


def argument_of(node: Node, name: str) -> object:
    """The value of a call's argument of that name, its default where it is not given; None if it has no such."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for k, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[k] if k < len(node.args) and not argument.kwarg_only else node.kwargs.get(name)
            return argument.default_value if given is None else given
    return None


def call_work(node: Node) -> Work:
    """Bytes and operations of a call."""
    target = node.target
    values = [node.meta.get("val"), *(i.meta.get("val") for i in node.all_input_nodes)]
    tensors = [t for v in values for t in (v if isinstance(v, (tuple, list)) else (v,)) if isinstance(t, torch.Tensor)]
    nbytes = sum(_nbytes(t) for t in tensors)
    itemsize = min((t.dtype.itemsize for t in tensors if t.dtype.is_floating_point), default=4)
    args, kwargs = pytree.tree_map(
        lambda a: _hinted(a.meta.get("val")) if isinstance(a, Node) else a, (node.args, dict(node.kwargs))
    )
    result = _hinted(node.meta.get("val"))
    return work_of_call(target, args, kwargs, result, nbytes=nbytes, itemsize=itemsize, elements=elements(node))


def _hinted(value: object) -> object:
    """The value with sizes that are symbols replaced by their hints, for formulas that compute with them."""
    if isinstance(value, (tuple, list)):
        return type(value)(_hinted(v) for v in value)
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    return value


def hint(size: int | torch.SymInt) -> int:
    """The size seen when tracing."""
    if type(size) is int:
        return size
    found = size_of(size)
    if isinstance(size, torch.SymInt) and not isinstance(found, int):
        return int(evaluate(found, {f: symbol_hint(size.node.shape_env, f) for f in size.node.expr.free_symbols}))
    return int(found)


def elements(node: Node) -> int:
    """Elements of the results."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return sum(_numel(t) for t in values if isinstance(t, torch.Tensor))


def result_bytes(node: Node) -> int:
    """Bytes of a tensor result; 0 of anything else."""
    value = node.meta.get("val")
    return _nbytes(value) if isinstance(value, torch.Tensor) else 0


def moved_bytes(node: Node) -> int:
    """Bytes of the largest tensor that a node reads or makes."""
    return max((result_bytes(n) for n in (node, *node.all_input_nodes)), default=0)


def keep_bytes(node: Node) -> float | None:
    """Bytes of keeping a node's value; None if it cannot be kept."""
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return 1.0 if isinstance(value, torch.SymInt) else None
    if not isinstance(value, torch.Tensor):
        return 0.0 if node.op == "placeholder" else None
    if node.op in ("placeholder", "get_attr"):
        return 0.0
    if is_view(node) and not must_save(node):
        return None
    if node.meta.get("recompute") in _RECOMPUTED:
        return None
    return float(_nbytes(value))


def must_save(node: Node) -> bool:
    """Whether the user, or a rewriting of ours, wants the value computed in the forward and kept."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE


def is_view(node: Node) -> bool:
    """Whether the node is a view of one of its inputs."""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and is_view(source)
    return isinstance(target, torch._ops.OpOverload) and _makes_view(target)


@cache
def _makes_view(target: torch._ops.OpOverload) -> bool:
    schema = target._schema
    return (
        bool(schema.returns)
        and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        and not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    )


def _is_item_of_call(node: Node) -> bool:
    return node.target is operator.getitem and not is_view(node)


def _numel(value: torch.Tensor) -> int:
    count = 1
    for s in value.shape:
        count *= hint(s)
    return count


def _nbytes(value: torch.Tensor) -> int:
    return _numel(value) * value.dtype.itemsize
