"""The joint graph cut into forward and backward.

torch's partitioner does the surgery (symbolic sizes, random states, effect tokens, user checkpointing); which values
are kept is decided here, through the one function of it that chooses them. `Chooser` is memplan's own minimum cut
(`memplan.passes.rematerialize`), given by the backend.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
import torch.fx
from functorch.compile import min_cut_rematerialization_partition
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from ..ir.activation import Activation
from ..ir.config import Config
from ..ir.eager import EagerMemory
from ..ir.errors import PlanningError
from ..ir.joint import JointGraph
from .activations import activations
from .changed_inputs import keep_changed_inputs
from .chunked_loss import Note, chunk_losses, chunk_sizes
from .copies import without_copies
from .dropout import seed_random
from .eager_memory import eager_memory
from .joint import Costs, joint_graph
from .layout import convolutions_channels_last
from .results import result_roots, separate_results
from .traced import copied

log = logging.getLogger(__name__)


#: Where a cut forward holds what became of the values that its backward reads.
_FATES = "memplan_activations"
#: Where a search says which saved values, by node, go to the host.
OFFLOADED = "memplan_offloaded"
Modules = tuple[torch.fx.GraphModule, torch.fx.GraphModule]
Choose = Callable[[JointGraph], Sequence[int]]


@dataclass(frozen=True)
class Cutter:
    """Makes forward and backward with the values kept that a choice names, and losses in slices of a given size.

    ``loss_chunks``: bytes of logits that a slice may have, the largest first, which is the one that is asked for.
    ``read``: the joint graph with losses in slices of a size.
    """

    make: Callable[[Choose, int], Modules]
    loss_chunks: tuple[int, ...]
    read: Callable[[int], JointGraph]

    def __call__(self, choose: Choose, loss_chunk: int | None = None) -> Modules:
        return self.make(choose, self.loss_chunks[0] if loss_chunk is None else loss_chunk)


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
    #: the forward's results by node; None for what is none
    results: tuple[str | None, ...] = ()
    backward: torch.fx.GraphModule | None = None
    activations: tuple[Activation, ...] = ()
    #: nodes whose values are kept on the host, in the forward's order of results
    offloaded: tuple[str, ...] = ()
    #: the step as eager mode would run it
    eager: EagerMemory | None = None
    #: how it can be cut again, where what is kept is ours to choose
    recut: Recut | None = None
    #: (node, why): logits that are not made in slices
    whole_logits: tuple[Note, ...] = ()


def result_names(forward: torch.fx.GraphModule) -> tuple[str | None, ...]:
    """The results of a graph by node; None for a literal."""
    results = forward.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    return tuple(n.name if isinstance(n, torch.fx.Node) else None for n in results)


def partitioner(config: Config, found: Partitioned, chooser: Chooser) -> Callable[..., Modules]:
    """A partition function for AOTAutograd; ``found`` is filled in when it runs."""

    def partition(joint: torch.fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **kwargs: object) -> Modules:
        found.eager = eager_memory(joint.graph)
        roots = result_roots(joint.graph, num_fwd_outputs)
        keep_changed_inputs(joint.graph)
        if config.enabled("copies"):
            without_copies(joint.graph)
        if config.enabled("layout"):
            convolutions_channels_last(joint)
        if config.random == "fast":
            seed_random(joint)
        own = config.enabled("rematerialize")
        sliced = _Sliced.of(joint, config, several=own and chooser.search is not None)

        def cut_graph(given: torch.fx.GraphModule, choose: Choose, loss_chunk: int, *, shared: bool) -> Modules:
            fates: list[tuple[Activation, ...]] = []
            known = sliced.read.setdefault(loss_chunk, [])
            choosing = _choosing(replace(chooser, choose=choose) if own else None, num_fwd_outputs, fates, known)
            options = functorch_config.patch(recompute_views=True, cse=functorch_config.cse and not shared)
            # (of the modules that it makes only the graphs are read: their Python is not printed, which took as long)
            with _use_lazy_graph_module(True), options, choosing:
                modules: Modules = min_cut_rematerialization_partition(
                    given, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
                )
            separate_results(modules[0], roots)
            modules[0].meta[_FATES] = fates[-1] if fates else ()
            return modules

        def make(choose: Choose, loss_chunk: int) -> Modules:
            # torch's partitioner changes the graph that it is given
            several = bool(chooser.search or found.recut)
            given = sliced.copy(loss_chunk) if several else sliced.joint(loss_chunk)
            return cut_graph(given, choose, loss_chunk, shared=several)

        def read(loss_chunk: int) -> JointGraph:
            known = sliced.read.setdefault(loss_chunk, [])
            if not known:
                # before it asks what to keep, it only marks nodes, and would mark them so again
                with contextlib.suppress(_GraphRead):
                    cut_graph(sliced.shared(loss_chunk), _stop, loss_chunk, shared=True)
            if not known:
                raise PlanningError(
                    "what is kept for the backward is not memplan's to choose here: leave out option 'budget', or "
                    "torch's own activation_memory_budget"
                )
            return known[0]

        cut = Cutter(make, sliced.sizes, read)
        parameters = frozenset(kwargs.get("static_lifetime_input_indices") or ())  # type: ignore[call-overload]
        if chooser.search is not None and own:
            forward, backward = chooser.search(cut, num_fwd_outputs, parameters)
        else:
            forward, backward = cut(chooser.choose)
        found.recut = Recut(cut, num_fwd_outputs, parameters) if own else None
        found.whole_logits = sliced.whole_logits
        found.forward_outputs = num_fwd_outputs
        found.results, found.backward = result_names(forward), backward
        found.activations = forward.meta.pop(_FATES, ())
        found.offloaded = forward.meta.pop(OFFLOADED, ())
        return forward, backward

    return partition


@dataclass(frozen=True)
class _Sliced:
    """A joint graph with its losses in slices of one size or another, made when it is asked for.

    ``whole``: the graph with its losses as they came, where there are several sizes. ``whole_logits``: (node, why) of
    those that stay so in slices of the first size. ``read``: graphs as they were read by the first cut, by size.
    """

    sizes: tuple[int, ...]
    whole: torch.fx.GraphModule | None
    made: dict[int, torch.fx.GraphModule]
    whole_logits: tuple[Note, ...]
    read: dict[int, list[JointGraph]] = field(default_factory=dict)
    _shared: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, joint: torch.fx.GraphModule, config: Config, *, several: bool) -> _Sliced:
        """``joint`` is changed: its losses are in slices of the size that the user wants."""
        size = config.loss_chunk if config.enabled("chunked_loss") else 0
        sizes = chunk_sizes(joint.graph, size) if several and size else (size,)
        whole = torch.fx.GraphModule(joint, copied(joint.graph)) if len(sizes) > 1 else None
        return cls(sizes, whole, {size: joint}, chunk_losses(joint, size) if size else ())

    def joint(self, size: int) -> torch.fx.GraphModule:
        if size not in self.made:
            assert self.whole is not None, "losses in slices of one size only"
            self.made[size] = torch.fx.GraphModule(self.whole, copied(self.whole.graph))
            chunk_losses(self.made[size], size)
        return self.made[size]

    def shared(self, size: int) -> torch.fx.GraphModule:
        """The graph to cut copies of: what torch's partitioner would do first, whatever the cut, is done once."""
        module = self.joint(size)
        if size not in self._shared:
            module.graph.eliminate_dead_code()
            if functorch_config.cse:
                module = self.made[size] = _make_graph_module(module, fx_graph_cse(module.graph))
            self._shared.add(size)
        return module

    def copy(self, size: int) -> torch.fx.GraphModule:
        """A copy to be cut."""
        module = self.shared(size)
        return _make_graph_module(module, copied(module.graph))


class _GraphRead(Exception):
    """Ends a cut when all that was wanted of it is there."""


def _stop(graph: JointGraph) -> Sequence[int]:
    raise _GraphRead


@contextmanager
def _choosing(
    chooser: Chooser | None, forward_outputs: int, fates: list[tuple[Activation, ...]], known: list[JointGraph]
) -> Iterator[None]:
    """torch's partitioner with the choice of kept values replaced (compilation holds Dynamo's lock meanwhile)."""
    if chooser is None:
        yield
        return
    original = partitioners.choose_saved_values_set

    def choose(joint_graph: torch.fx.Graph, node_info: object, memory_budget: float = 1) -> list[torch.fx.Node]:
        if memory_budget != 1:
            # the user set torch's own budget: theirs is the say
            return original(joint_graph, node_info, memory_budget)  # type: ignore[arg-type]
        return choose_saved(joint_graph, node_info, chooser, forward_outputs, fates, known)

    partitioners.choose_saved_values_set = choose
    try:
        yield
    finally:
        partitioners.choose_saved_values_set = original


def choose_saved(
    graph: torch.fx.Graph,
    node_info: object,
    chooser: Chooser,
    forward_outputs: int,
    fates: list[tuple[Activation, ...]],
    known: list[JointGraph],
) -> list[torch.fx.Node]:
    """The forward nodes whose values are kept for the backward; what became of all is added to ``fates``.

    ``known`` holds the graph as data once it was read: a graph that is cut several times is read the first time.
    """
    nodes = tuple(n for n in graph.nodes if n.op != "output")
    joint = next((g for g in known if [n.name for n in g.nodes] == [n.name for n in nodes]), None)
    if joint is None:
        joint = joint_graph(graph, node_info, chooser.costs)
        known.append(joint)
    positions = chooser.choose(joint)
    fates.append(activations(joint, nodes, positions))
    kept = [nodes[k] for k in positions]
    # the backward may return an input of the forward as it is: the mesh of a DTensor, the offsets of a nested tensor
    # (a gradient of its own has the same ones)
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    returned = dict.fromkeys(
        n
        for k, n in enumerate(results)
        if isinstance(n, torch.fx.Node) and n.op == "placeholder" and (k >= forward_outputs or not _is_tensor(n))
    )
    kept += [n for n in returned if n not in kept and n not in node_info.tangents_closure]  # type: ignore[attr-defined]
    log.debug("%d of %d values are kept", len(kept), len(nodes))
    return kept


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
