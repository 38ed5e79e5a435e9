"""Who is told about every graph that is compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from .ir.activation import Activation
from .ir.eager import EagerMemory
from .ir.plan import Plan

_lock = threading.Lock()
_active: list[Recording] = []


@dataclass(frozen=True)
class CompiledGraph:
    """One compiled graph.

    ``group`` numbers the torch.compile region that it belongs to (a forward and its backward share one);
    ``joins`` pairs what the forward saves with the backward's inputs: (forward buffer, backward buffer).
    ``activations``, of a backward: what became of every value of the forward that it needs.
    ``compilation`` is Dynamo's number of the Python frame, and how often it was compiled before: two of one frame are
    alternatives, of which a step runs one. ``eager``, of a forward: the step as eager mode would run it.
    """

    plan: Plan
    group: int
    joins: tuple[tuple[str, str], ...] = ()
    waterfall: tuple[tuple[str, int], ...] = ()
    wrapper: str = ""
    activations: tuple[Activation, ...] = ()
    compilation: tuple[int, int] | None = None
    eager: EagerMemory | None = None


@dataclass
class Recording:
    """All graphs compiled while it was active, in order."""

    graphs: list[CompiledGraph] = field(default_factory=list)

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(g.plan for g in self.graphs)


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Collect the plans of everything that memplan compiles inside the block.

    Examples
    --------
    >>> import memplan
    >>> with memplan.record() as r:
    ...     pass  # run a model compiled with backend="memplan" here
    >>> r.plans
    ()
    """
    recording = Recording()
    with _lock:
        _active.append(recording)
    try:
        yield recording
    finally:
        with _lock:
            _active.remove(recording)


def listening() -> bool:
    """Whether anybody is told."""
    return bool(_active)


def tell(graph: CompiledGraph) -> None:
    """Add a compiled graph to every active recording."""
    with _lock:
        for recording in _active:
            recording.graphs.append(graph)
