"""The joint graph cut into forward and backward.

torch's partitioner does the surgery (symbolic sizes, random states, effect tokens, user checkpointing); which values
are kept is decided here, through the one function of it that chooses them. `Chooser` is memplan's own minimum cut
(`memplan.passes.rematerialize`), given by the backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
import torch.fx
from functorch.compile import min_cut_rematerialization_partition

from ..ir.activation import Activation
from ..ir.config import Config
from ..ir.eager import EagerMemory
from ..ir.joint import JointGraph
from .activations import activations
from .changed_inputs import keep_changed_inputs
from .chunked_loss import chunk_losses
from .copies import without_copies
from .dropout import seed_dropout
from .eager_memory import eager_memory
from .joint import Costs, joint_graph
from .layout import convolutions_channels_last
from .traced import copied

log = logging.getLogger(__name__)


#: Where a cut forward holds what became of the values that its backward reads.
_FATES = "memplan_activations"
#: Where a search says which saved values, by node, go to the host.
OFFLOADED = "memplan_offloaded"
Modules = tuple[torch.fx.GraphModule, torch.fx.GraphModule]
Choose = Callable[[JointGraph], Sequence[int]]
#: Makes forward and backward with the values kept that a choice names.
Cutter = Callable[[Choose], Modules]


@dataclass(frozen=True)
class Chooser:
    """How values are kept: a choice over a joint graph, as positions of its nodes, and what its nodes cost.

    ``search`` tries several choices, where one is not enough: it is given the means to cut, the number of the forward's
    results and the positions of parameters among the inputs, and returns the cut that it likes best.
    """

    choose: Choose
    costs: Costs
    search: Callable[[Cutter, int, frozenset[int]], Modules] | None = None


@dataclass(frozen=True)
class Recut:
    """The means to cut a region's joint graph again; the number of the forward's results, parameters by position."""

    cut: Cutter
    forward_outputs: int
    parameters: frozenset[int]


@dataclass
class Partitioned:
    """What the partitioner learned, for the compilers that AOTAutograd calls next."""

    forward_outputs: int = 0
    forward: torch.fx.GraphModule | None = None
    backward: torch.fx.GraphModule | None = None
    activations: tuple[Activation, ...] = ()
    #: nodes whose values are kept on the host, in the forward's order of results
    offloaded: tuple[str, ...] = ()
    #: the step as eager mode would run it
    eager: EagerMemory | None = None
    #: how it can be cut again, where what is kept is ours to choose
    recut: Recut | None = None


def partitioner(config: Config, found: Partitioned, chooser: Chooser) -> Callable[..., Modules]:
    """A partition function for AOTAutograd; ``found`` is filled in when it runs."""

    def partition(joint: torch.fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **kwargs: object) -> Modules:
        found.eager = eager_memory(joint.graph)
        keep_changed_inputs(joint.graph)
        if config.enabled("copies"):
            without_copies(joint.graph)
        if config.enabled("layout"):
            convolutions_channels_last(joint)
        if config.random == "fast":
            seed_dropout(joint)
        if config.loss_chunk and config.enabled("chunked_loss"):
            chunk_losses(joint, config.loss_chunk)
        own = config.enabled("rematerialize")

        def cut(choose: Choose) -> Modules:
            # torch's partitioner changes the graph that it is given (cut again, what it made of it is cut)
            given = torch.fx.GraphModule(joint, copied(joint.graph)) if chooser.search or found.recut else joint
            fates: list[tuple[Activation, ...]] = []
            choosing = _choosing(replace(chooser, choose=choose) if own else None, fates)
            with functorch_config.patch(recompute_views=True), choosing:
                modules: Modules = min_cut_rematerialization_partition(
                    given, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
                )
            modules[0].meta[_FATES] = fates[-1] if fates else ()
            return modules

        parameters = frozenset(kwargs.get("static_lifetime_input_indices") or ())  # type: ignore[call-overload]
        if chooser.search is not None and own:
            forward, backward = chooser.search(cut, num_fwd_outputs, parameters)
        else:
            forward, backward = cut(chooser.choose)
        found.recut = Recut(cut, num_fwd_outputs, parameters) if own else None
        found.forward_outputs = num_fwd_outputs
        found.forward, found.backward = forward, backward
        found.activations = forward.meta.pop(_FATES, ())
        found.offloaded = forward.meta.pop(OFFLOADED, ())
        return forward, backward

    return partition


@contextmanager
def _choosing(chooser: Chooser | None, fates: list[tuple[Activation, ...]]) -> Iterator[None]:
    """torch's partitioner with the choice of kept values replaced (compilation holds Dynamo's lock meanwhile)."""
    if chooser is None:
        yield
        return
    original = partitioners.choose_saved_values_set

    def choose(joint_graph: torch.fx.Graph, node_info: object, memory_budget: float = 1) -> list[torch.fx.Node]:
        if memory_budget != 1:
            # the user set torch's own budget: theirs is the say
            return original(joint_graph, node_info, memory_budget)  # type: ignore[arg-type]
        return choose_saved(joint_graph, node_info, chooser, fates)

    partitioners.choose_saved_values_set = choose
    try:
        yield
    finally:
        partitioners.choose_saved_values_set = original


def choose_saved(
    graph: torch.fx.Graph, node_info: object, chooser: Chooser, fates: list[tuple[Activation, ...]]
) -> list[torch.fx.Node]:
    """The forward nodes whose values are kept for the backward; what became of all is added to ``fates``."""
    joint, nodes = joint_graph(graph, node_info, chooser.costs)
    positions = chooser.choose(joint)
    fates.append(activations(joint, nodes, positions))
    kept = [nodes[k] for k in positions]
    # what is no tensor (the mesh of a DTensor) may be an input of the forward that the backward returns as it is
    objects = [n for n in graph.output_node().all_input_nodes if n.op == "placeholder" and not _is_tensor(n)]
    kept += [n for n in objects if n not in kept and n not in node_info.tangents_closure]  # type: ignore[attr-defined]
    log.debug("%d of %d values are kept", len(kept), len(nodes))
    return kept


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
