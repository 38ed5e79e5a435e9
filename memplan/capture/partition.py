"""The joint graph cut into forward and backward.

torch's partitioner does the surgery (symbolic sizes, random states, effect tokens, user checkpointing); which values
are kept is decided here, through the one function of it that chooses them. `Chooser` is memplan's own minimum cut
(`memplan.passes.rematerialize`), given by the backend.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
import torch.fx
from functorch.compile import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from ..ir.config import Config
from ..ir.program import evaluate
from .chunked_loss import chunk_losses
from .dropout import seed_dropout
from .fx import symbol_hint
from .sizes import size_of

log = logging.getLogger(__name__)
aten = torch.ops.aten


class JointValue(Protocol):
    """What the chooser needs to know of a forward value; see `memplan.passes.rematerialize.Value`."""

    def __call__(
        self, name: str, keep: float | None, again: float | None, inputs: tuple[int, ...], needed: bool
    ) -> object: ...


@dataclass(frozen=True)
class Chooser:
    """How values are kept: a constructor of values, the choice over them, and which operators are cheap to repeat."""

    value: JointValue
    choose: Callable[[Sequence[object]], Sequence[int]]
    cheap: Callable[[str], bool]


@dataclass
class Partitioned:
    """What the partitioner learned, for the compilers that AOTAutograd calls next."""

    forward_outputs: int = 0
    forward: torch.fx.GraphModule | None = None
    backward: torch.fx.GraphModule | None = None
    recomputed: list[str] = field(default_factory=list)


def partitioner(
    config: Config, found: Partitioned, chooser: Chooser
) -> Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]]:
    """A partition function for AOTAutograd; ``found`` is filled in when it runs."""

    def partition(
        joint: torch.fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **kwargs: object
    ) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
        if config.random == "fast":
            seed_dropout(joint)
        if config.loss_chunk and config.enabled("chunked_loss"):
            chunk_losses(joint, config.loss_chunk)
        own = config.enabled("rematerialize") and config.recompute_time > 0
        with functorch_config.patch(recompute_views=True), _choosing(chooser if own else None):
            forward, backward = min_cut_rematerialization_partition(
                joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
            )
        found.forward_outputs = num_fwd_outputs
        found.forward, found.backward = forward, backward
        return forward, backward

    return partition


@contextmanager
def _choosing(chooser: Chooser | None) -> Iterator[None]:
    """torch's partitioner with the choice of kept values replaced (compilation holds Dynamo's lock meanwhile)."""
    if chooser is None:
        yield
        return
    original = partitioners.choose_saved_values_set

    def choose(joint_graph: torch.fx.Graph, node_info: object, memory_budget: float = 1) -> list[torch.fx.Node]:
        if memory_budget != 1:
            # the user set torch's own budget: theirs is the say
            return original(joint_graph, node_info, memory_budget)  # type: ignore[arg-type]
        return choose_saved(joint_graph, node_info, chooser)

    partitioners.choose_saved_values_set = choose
    try:
        yield
    finally:
        partitioners.choose_saved_values_set = original


def choose_saved(graph: torch.fx.Graph, node_info: object, chooser: Chooser) -> list[torch.fx.Node]:
    """The forward nodes whose values are kept for the backward."""
    forward = [n for n in graph.nodes if n.op != "output" and n not in node_info.required_bw_nodes]  # type: ignore[attr-defined]
    extra = [n for n in node_info.required_bw_nodes if n not in node_info.tangents_closure]  # type: ignore[attr-defined]
    order = {n: k for k, n in enumerate(graph.nodes)}
    nodes = sorted({*forward, *extra}, key=lambda n: order[n])
    position = {n: k for k, n in enumerate(nodes)}
    inside = node_info.tangents_closure  # type: ignore[attr-defined]
    values = []
    for node in nodes:
        needed = node in extra or any(u in inside for u in node.users)
        inputs = tuple(position[i] for i in node.all_input_nodes if i in position)
        if node_info.is_required_fw(node) or node.op == "placeholder":  # type: ignore[attr-defined]
            keep, again = keep_bytes(node), again_cost(node, chooser.cheap)
        else:
            # nothing in the forward needs it: computing it is work either way, so doing it in the backward is free
            keep, again = keep_bytes(node), None if must_save(node) else 0.0
        values.append(chooser.value(node.name, keep, again, inputs, needed))
    kept = [nodes[k] for k in chooser.choose(values)]
    log.debug("%d of %d forward values are kept", len(kept), len(nodes))
    return kept


def keep_bytes(node: torch.fx.Node) -> float | None:
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
    if node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE):
        return None
    return float(_nbytes(value))


def again_cost(node: torch.fx.Node, cheap: Callable[[str], bool]) -> float | None:
    """Cost of computing a node again in bytes of what is kept: a small part of the bytes it moves; None: never."""
    if node.op in ("placeholder", "get_attr"):
        return None
    if must_save(node):
        return None
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return 0.0
    if node.target is operator.getitem or is_view(node):
        return 0.0
    marked = node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0.0 if marked else None
    if marked:
        return 0.0
    if node.target in CONSTANTS:
        return 0.0  # a literal in whatever reads it, where keeping it is a kernel and an allocation
    if torch.Tag.nondeterministic_seeded in node.target.tags or not cheap(str(node.target)):
        return None
    moved = [_nbytes(i.meta["val"]) for i in node.all_input_nodes if isinstance(i.meta.get("val"), torch.Tensor)]
    if isinstance(value, torch.Tensor):
        moved.append(_nbytes(value))
    return RECOMPUTE_WEIGHT * max(moved, default=0)


#: Calls whose result is one literal; their tensor operand, if they have one, gives only its type and device.
CONSTANTS = frozenset(
    {
        torch.ops.aten.full.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.scalar_tensor.default,
        torch.ops.aten.new_full.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.ones.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.zeros.default,
        torch.ops.aten.zeros_like.default,
    }
)
#: Bytes that one would keep to save moving one byte in a fused recomputation.
RECOMPUTE_WEIGHT = 0.02


def must_save(node: torch.fx.Node) -> bool:
    """Whether the user, or a rewriting of ours, wants the value computed in the forward and kept."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE


def is_view(node: torch.fx.Node) -> bool:
    """Whether the node is a view of one of its inputs."""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, torch.fx.Node) and is_view(source)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    return (
        bool(schema.returns)
        and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        and not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    )


def _nbytes(value: torch.Tensor) -> int:
    count = 1
    for s in value.shape:
        size = size_of(s)
        if isinstance(s, torch.SymInt) and not isinstance(size, int):
            hints = {f: symbol_hint(s.node.shape_env, f) for f in s.node.expr.free_symbols}
            size = evaluate(size, hints)
        count *= int(size)
    return count * value.dtype.itemsize
