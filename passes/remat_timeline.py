"""Live bytes of a stretch of a training step, simulated on its joint graph before anything is lowered.

Neighbouring pointwise nodes and reductions between two calls count as one kernel: what only they read takes no bytes,
and what they make may lie where something that dies in them was. What later kernels read and calls do not is made in
those kernels once more, where its operands take less room until then than it would. That is roughly what fusion and
in-place reuse make of it; the plan itself has the last word (`memplan.budget`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memplan.ir.joint import JointGraph, NodeKind, Side

#: Nodes that a kernel takes in to make one value once more.
_CHAIN = 32
#: What such a kernel reads instead of the value, small things aside: fusion stores a value that is made of more.
_LOADS = 3


def peak_of(graph: JointGraph, sequence: Sequence[int], held: Mapping[int, int], lasting: Iterable[int]) -> int:
    """Largest number of live bytes while ``sequence`` runs.

    Parameters
    ----------
    held:
        Bytes of the storages that are alive at the start, each until its last use in the sequence.
    lasting:
        Storages, of those held or made, that live to the end.
    """
    nodes = graph.nodes
    step_of, kinds = _steps(graph, sequence)
    forever = frozenset(lasting)
    last: dict[int, int] = {}
    several: set[int] = set()
    called: set[int] = set()
    made: dict[int, int] = {}
    for n, k in enumerate(sequence):
        step = step_of[n]
        for i in nodes[k].inputs:
            root = nodes[i].storage
            last[root] = step
            if nodes[k].kind is NodeKind.CALL:
                called.add(root)
            if root in made and made[root] != step:
                several.add(root)
        if nodes[k].storage == k and nodes[k].nbytes:
            made[k] = step
            last.setdefault(k, step)
            if nodes[k].kind is not NodeKind.FUSED or k in forever:
                several.add(k)
    _inline(graph, several, last, made, held, called | forever)
    change = [0] * (len(kinds) + 1)
    born = [0] * (len(kinds) + 1)
    for k in several:
        born[made[k]] += nodes[k].nbytes
        if k not in forever:
            change[last[k]] += nodes[k].nbytes
    live = 0
    for root, nbytes in held.items():
        live += nbytes
        if root not in forever and root not in made:
            if root in last:
                change[last[root]] += nbytes
            else:
                live -= nbytes
    peak = live
    for step, fused in enumerate(kinds):
        during = live + born[step]
        peak = max(peak, max(live, during - change[step]) if fused else during)
        live = during - change[step]
    return peak


def _inline(
    graph: JointGraph,
    several: set[int],
    last: dict[int, int],
    made: Mapping[int, int],
    held: Mapping[int, int],
    stored: set[int],
) -> None:
    """Of the storages that outlive their step, drop those that are better made in their readers; operands live longer.

    ``stored`` must not be dropped.
    """
    nodes = graph.nodes
    reads: dict[int, set[int]] = {}  # what the readers of each dropped one read instead of it
    readers: dict[int, set[int]] = {}
    # the last one first: what it is made of then lives longer, and may itself be made in those readers
    for k in sorted(several - stored, key=lambda k: (made[k], k), reverse=True):
        if not nodes[k].elementwise or nodes[k].kind is not NodeKind.FUSED:
            continue
        operands: set[int] = set()
        chain, found = [k], {k}
        while chain:
            for i in nodes[chain.pop()].inputs:
                root = nodes[i].storage
                if root in several or root in held or (root in made and not nodes[root].elementwise):
                    operands.add(root)
                elif root in made and root not in found:
                    found.add(root)
                    chain.append(root)
        instead = {k: operands, **{d: reads[d] - {k} | operands for d in readers.get(k, ())}}
        if len(found) > _CHAIN or any(_large(graph, new, d) > _LOADS for d, new in instead.items()):
            continue
        longer = [r for r in operands if last[r] < last[k] or not (r in several or r in held)]
        if sum(nodes[r].nbytes for r in longer) < nodes[k].nbytes:
            several.discard(k)
            several.update(r for r in operands if r not in held)
            last.update((r, last[k]) for r in longer)
            for d, new in instead.items():
                reads[d] = new
                for r in new:
                    readers.setdefault(r, set()).add(d)


def _large(graph: JointGraph, storages: Iterable[int], k: int) -> int:
    """How many of the storages are not small beside that of ``k``."""
    return sum(8 * graph.nodes[r].nbytes >= graph.nodes[k].nbytes for r in storages)


def _steps(graph: JointGraph, sequence: Sequence[int]) -> tuple[list[int], list[bool]]:
    """The step of each entry of the sequence, and whether each step is a kernel of fused nodes."""
    found: list[int] = []
    kinds: list[bool] = []
    for k in sequence:
        kind = graph.nodes[k].kind
        if kind is NodeKind.CALL:
            kinds.append(False)
        elif not kinds or (kind is NodeKind.FUSED and not kinds[-1]):
            kinds.append(True)
        found.append(len(kinds) - 1)
    return found, kinds


def backward_peak(graph: JointGraph, kept: Sequence[int]) -> int:
    """Largest number of live bytes while the backward runs, with what is not kept computed where it is first needed."""
    nodes = graph.nodes
    done = set(kept)
    sequence: list[int] = []
    for k, node in enumerate(nodes):
        if node.side is not Side.BACKWARD or node.kind is NodeKind.INPUT:
            continue
        stack, found = list(node.inputs), []
        while stack:
            i = stack.pop()
            if i not in done and nodes[i].side is not Side.BACKWARD:
                done.add(i)
                found.append(i)
                stack.extend(nodes[i].inputs)
        sequence += [*sorted(found), k]
    held = {nodes[k].storage: nodes[nodes[k].storage].nbytes for k in kept}
    return peak_of(graph, sequence, held, {n.storage for n in nodes if n.result})
