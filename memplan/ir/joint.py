"""A training step before it is cut into forward and backward, as the choice of what is kept sees it.

`JointGraph` is the joint graph of AOTAutograd as plain data: nodes in topological order, each with the storage it
takes, what it costs, and whether the forward, the backward or a recomputation may run it. Positions are indices into
``nodes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class NodeKind(Enum):
    INPUT = "input"  # placeholders and constants: there before the step, or given to the backward
    VIEW = "view"  # takes no bytes and no time
    FUSED = "fused"  # one of our kernels, together with its neighbours
    CALL = "call"  # a call that nothing is fused into


class Side(Enum):
    """Where a node runs. ``EITHER``: only the backward needs it, but it depends on forward values alone."""

    FORWARD = "forward"
    EITHER = "either"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class JointNode:
    """One node.

    Attributes
    ----------
    inputs:
        Positions of the nodes it reads.
    storage:
        Position of the node whose storage its result lies in: its own, or for a view another's.
    nbytes:
        Bytes of the storage, as the device's allocator rounds them, if it is its own; else 0.
    keep:
        Bytes it takes if it is kept for the backward; 0 for what is there anyway; None if it cannot be kept.
    again:
        Microseconds that computing it again adds; None: it must not be.
    cheap:
        Whether it may be computed again though no budget asks for it: it is one pass over memory, or less.
    microseconds:
        What it takes the first time.
    moved:
        Bytes of the largest tensor that it reads or makes: among choices of one price the least of it is done twice.
    result:
        It is a result of the forward or the backward: a loss, a gradient.
    signature:
        Equal for nodes that do the same on tensors of the same sizes.
    elementwise:
        Each element is made of those of its inputs, so that any kernel that reads it may make it itself.
    """

    name: str
    kind: NodeKind
    side: Side
    inputs: tuple[int, ...]
    storage: int
    nbytes: int
    keep: float | None
    again: float | None
    cheap: bool
    microseconds: float
    moved: int = 0
    result: bool = False
    signature: str = ""
    elementwise: bool = False


@dataclass(frozen=True)
class JointGraph:
    """See the module's docstring."""

    nodes: tuple[JointNode, ...]

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each node the positions of those that read it, in order."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            for i in dict.fromkeys(node.inputs):
                found[i].append(k)
        return tuple(map(tuple, found))

    @cached_property
    def needed(self) -> tuple[bool, ...]:
        """Whether the backward reads a value of the forward or of either side directly."""
        backward = [n.side is Side.BACKWARD for n in self.nodes]
        return tuple(
            node.side is not Side.BACKWARD
            and ((node.side is Side.EITHER and node.result) or any(backward[u] for u in self.users[k]))
            for k, node in enumerate(self.nodes)
        )

    @cached_property
    def microseconds(self) -> float:
        """Estimated time of forward and backward if nothing is computed twice."""
        return sum(n.microseconds for n in self.nodes)

    def reached(self, kept: Sequence[int]) -> tuple[int, ...]:
        """What the backward asks for if ``kept`` is kept: what it computes again, and inputs, in order."""
        have = frozenset(kept)
        found: set[int] = set()
        stack = [k for k, needed in enumerate(self.needed) if needed and k not in have]
        while stack:
            k = stack.pop()
            if k not in found:
                found.add(k)
                stack.extend(i for i in self.nodes[k].inputs if i not in have)
        return tuple(sorted(found))

    def recomputed(self, kept: Sequence[int]) -> tuple[int, ...]:
        """What the backward computes again if ``kept`` is kept, in order."""
        return tuple(k for k in self.reached(kept) if self.nodes[k].kind is not NodeKind.INPUT)

    def completed(self, kept: Sequence[int]) -> tuple[int, ...]:
        """``kept`` and what the backward could not have without it: inputs, and what must not be computed again."""
        found = set(kept)
        for k in self.reached(kept):
            node = self.nodes[k]
            if node.again is None and node.keep is not None:
                found.add(k)
        return tuple(sorted(found))

    def added_microseconds(self, kept: Sequence[int]) -> float:
        """What recomputation adds to `microseconds`."""
        return sum(self.nodes[k].again or 0.0 for k in self.recomputed(kept))
