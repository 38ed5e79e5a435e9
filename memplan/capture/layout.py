"""Convolutional networks with channels last, whatever layout the model and its inputs are in.

The matrix units of a GPU want the channels of a convolution's tensors side by side. Given whole planes instead, cuDNN
turns every tensor round inside of the call, and depthwise convolutions run on torch's own kernels instead of cuDNN's
(on an H200 35 of the 61 ms of EfficientNet-B3's step were convolutions, 8 with channels last). Since all other
operations follow the layout of what they read, turning round the network's input and its weights is enough: the graph
is walked in order, the arguments of convolutions are copied to channels last where they are not, and what depends on
them gets its fake value anew. Where the layout matters (results of the graph, operators that are not known here to
follow any) a value is turned back. Were much to be copied, the graph stays as it was.

Inductor does the like, by other rules (`torch._inductor.graph.GraphLowering.decide_layout_opt`).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.fx
from torch.fx.node import Argument

from .joint import is_view, result_bytes
from .rewriting import call_node
from .traced import copied

log = logging.getLogger(__name__)
aten = torch.ops.aten
Node = torch.fx.Node

_LAST = torch.channels_last
_FORWARD, _BACKWARD = aten.convolution.default, aten.convolution_backward.default
#: positions of the tensors that should have channels last, among the arguments of either
_TURNED = {_FORWARD: (0, 1), _BACKWARD: (0, 1, 2)}
#: Bytes that may be copied for the layout's sake, over those that the convolutions read and write.
MOST_COPIED = 0.15
#: Element types that a device's convolutions are fastest for with channels last.
DTYPES = {"cuda": (torch.bfloat16, torch.float16)}
#: Operators whose values do not depend on the strides of their arguments, beside pointwise ones and views.
_FOLLOWING = frozenset(
    f"aten.{name}"
    for name in (
        "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "_batch_norm_no_update", "_batch_norm_with_update",
        "_log_softmax", "_log_softmax_backward_data", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training", "_softmax", "_softmax_backward_data", "_to_copy", "amax", "amin",
        "any", "all", "argmax", "argmin", "avg_pool2d", "avg_pool2d_backward", "batch_norm_backward", "cat", "clone",
        "constant_pad_nd", "full_like", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "mean",
        "native_batch_norm", "native_batch_norm_backward", "native_group_norm", "native_group_norm_backward",
        "native_layer_norm", "native_layer_norm_backward", "ones_like", "prod", "stack", "std", "sum",
        "upsample_bilinear2d", "upsample_bilinear2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward",
        "var", "var_mean", "zeros_like",
    )
)  # fmt: skip
#: Views of the storage rather than of the tensor.
_OF_STRIDES = frozenset({"aten.as_strided", "aten.view_as_real", "aten.view_as_complex", "aten.alias_copy"})


def convolutions_channels_last(module: torch.fx.GraphModule) -> bool:
    """Give the convolutions of a graph of AOTAutograd (joint, or of inference) channels last, where that pays.

    The graph's results keep their strides. Returns whether the graph was changed; it is replaced whole.
    """
    if not _wanted(module.graph):
        return False
    graph = copied(module.graph)
    walk = _Walk(graph)
    if not walk.run():
        return False
    log.info("%d bytes are copied so that convolutions of %d bytes have channels last", walk.copied, walk.convolved)
    graph.eliminate_dead_code()
    graph.lint()
    module.graph = graph
    module.recompile()
    return True


def _wanted(graph: torch.fx.Graph) -> bool:
    """Whether the graph has convolutions that are not all of a kind that is slower with channels last."""
    found = [n for n in graph.nodes if n.op == "call_function" and n.target is _FORWARD]
    return bool(found) and all(_is_static(n) and not _is_grouped(n) for n in found) and any(map(_eligible, found))


def _is_static(node: Node) -> bool:
    return all(isinstance(s, int) for n in node.all_input_nodes for s in n.meta["val"].shape)


def _is_grouped(node: Node) -> bool:
    """Whether it has groups of several channels (cuDNN's kernels for them want whole planes of a channel)."""
    weight = cast(Node, node.args[1]).meta["val"]
    return cast(int, node.args[8]) > 1 and weight.shape[1] > 1


def _eligible(node: Node) -> bool:
    turned = [cast(Node, node.args[k]).meta["val"] for k in _TURNED[node.target]]  # type: ignore[index]
    return all(t.dim() == 4 and t.dtype in DTYPES.get(t.device.type, ()) for t in turned)


@dataclass
class _Walk:
    """One pass over a graph, in order, that changes it as it goes."""

    graph: torch.fx.Graph
    #: nodes whose strides are others than they were: what they were
    before: dict[Node, object] = field(default_factory=dict)
    turned: dict[Node, Node] = field(default_factory=dict)
    restored: dict[Node, Node] = field(default_factory=dict)
    copied: int = 0
    convolved: int = 0

    def run(self) -> bool:
        """Whether all could be done at a cost that pays."""
        for node in list(self.graph.nodes):
            changed = [n for n in node.all_input_nodes if n in self.before]
            try:
                if node.op == "call_function" and node.target in _TURNED and _eligible(node):
                    self.convolution(node)
                elif changed:
                    self.follow(node, changed)
            except _NotRestorableError as error:
                log.info("the layout of convolutions stays: %s", error)
                return False
        return self.copied <= MOST_COPIED * self.convolved

    def convolution(self, node: Node) -> None:
        args = list(node.args)
        for k in _TURNED[node.target]:  # type: ignore[index]
            args[k] = self.with_channels_last(cast(Node, args[k]), node)
        node.args = tuple(args)
        self.again(node)
        made = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
        self.convolved += sum(result_bytes(n) for n in node.all_input_nodes)
        self.convolved += sum(t.numel() * t.itemsize for t in made if isinstance(t, torch.Tensor))

    def with_channels_last(self, node: Node, reader: Node) -> Node:
        if node.meta["val"].is_contiguous(memory_format=_LAST):
            return node
        if node not in self.turned:
            with self.graph.inserting_before(reader):
                kwargs: dict[str, object] = {"memory_format": _LAST}
                self.turned[node] = call_node(self.graph, aten.clone.default, (node,), kwargs, node, keep_policy=False)
            self.copied += result_bytes(node)
        return self.turned[node]

    def follow(self, node: Node, changed: list[Node]) -> None:
        """A node some of whose inputs have other strides than they had."""
        if node.op == "call_function" and node.target is operator.getitem and not is_view(node):
            source, key = node.args
            self.replace_value(node, cast(Node, source).meta["val"][key])
        elif node.op == "call_function" and node.target is aten.copy_.default and changed == [node.args[1]]:
            pass  # its result has the strides of what is written
        elif not (_follows(node) and self.again(node)):
            for n in changed:
                node.replace_input_with(n, self.as_before(n, node))

    def again(self, node: Node) -> bool:
        """Give the node its fake value anew; False where there is no such view."""
        value_of = cast(Callable[[Node], Argument], lambda n: n.meta["val"])
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
        mode = _fake_mode(node)
        try:
            with mode, torch.no_grad():
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            if is_view(node):
                return False
            raise
        self.replace_value(node, value)
        return True

    def replace_value(self, node: Node, value: object) -> None:
        old = node.meta["val"]
        if _strides(value) != _strides(old):
            self.before[node] = old
            node.meta["val"] = value

    def as_before(self, node: Node, reader: Node) -> Node:
        """The node's value with the strides that it had."""
        if node not in self.restored:
            old = self.before[node]
            if not isinstance(old, torch.Tensor):
                raise _NotRestorableError(f"{node.name} has several results, and {reader.name} reads them together")
            with self.graph.inserting_before(node.next):
                self.restored[node] = self.copy_like(node, old)
            self.copied += result_bytes(node)
        return self.restored[node]

    def copy_like(self, node: Node, old: torch.Tensor) -> Node:
        strides = old.stride()
        order = sorted(range(old.dim()), key=lambda d: (-strides[d], d))
        back = sorted(range(old.dim()), key=order.__getitem__)

        def call(target: object, source: Node, *args: object, **kwargs: object) -> Node:
            return call_node(self.graph, target, (source, *args), kwargs, node, keep_policy=False)

        straight = order == back == list(range(old.dim()))
        found = node if straight else call(aten.permute.default, node, order)
        found = call(aten.clone.default, found, memory_format=torch.contiguous_format)
        found = found if straight else call(aten.permute.default, found, back)
        if _strides(found.meta["val"]) != _strides(old):
            raise _NotRestorableError(f"{node.name} has strides {strides} of sizes {tuple(old.shape)}")
        return found


class _NotRestorableError(Exception):
    """A value whose strides no copy has."""


def _follows(node: Node) -> bool:
    """Whether an operator gives the same values for arguments of any strides."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    name = f"{target.namespace}.{target._schema.name.partition('::')[2]}"
    if is_view(node):
        return name not in _OF_STRIDES
    pointwise = torch.Tag.pointwise in target.tags and not target._schema.is_mutable
    return pointwise or name in _FOLLOWING or name == "prims.convert_element_type"


def _fake_mode(node: Node) -> torch._subclasses.FakeTensorMode:
    value = node.meta["val"]
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return next(t.fake_mode for t in tensors if isinstance(t, torch._subclasses.FakeTensor))


def _strides(value: object) -> object:
    """What of a value the layout decides; dimensions of one element have no stride that matters."""
    if isinstance(value, (tuple, list)):
        return [_strides(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return None
    return [*value.shape], [s for s, n in zip(value.stride(), value.shape, strict=True) if n != 1]
