"""Who is told about every graph that is compiled."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from .ir.activation import Activation
from .ir.eager import EagerMemory
from .ir.plan import Plan
from .ir.program import Phase

_lock = threading.Lock()
_active: list[Recording] = []
#: Regions whose calls are counted, by number. They live as long as their calls, or a recording that was told of them.
_regions: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class CompiledGraph:
    """One compiled graph.

    ``group`` numbers the torch.compile region that it belongs to (a forward and its backward share one);
    ``joins`` pairs what the forward saves with the backward's inputs: (forward buffer, backward buffer).
    ``activations``, of a backward: what became of every value of the forward that it needs.
    ``compilation`` is Dynamo's number of the Python frame, and how often it was compiled before: two of one frame are
    alternatives, of which a step runs one. ``eager``, of a forward: the step as eager mode would run it.
    ``runs``: (step, place) of the calls that were seen, for steps that differ: its region's forward ran as number
    ``place`` of that step. One region may run many times in a step: layers of one class share it.
    """

    plan: Plan
    group: int
    joins: tuple[tuple[str, str], ...] = ()
    waterfall: tuple[tuple[str, int], ...] = ()
    wrapper: str = ""
    activations: tuple[Activation, ...] = ()
    compilation: tuple[int, int] | None = None
    eager: EagerMemory | None = None
    runs: tuple[tuple[int, int], ...] = ()


@dataclass(eq=False)
class Region:
    """The graphs of a region, for recordings that begin when it has been compiled already."""

    graphs: list[CompiledGraph] = field(default_factory=list)


@dataclass
class Recording:
    """All graphs compiled while it was active, in order, and the steps in which their calls were seen.

    Graphs that an earlier recording saw being compiled are in it too if they were called: a cell of a notebook that
    runs again compiles nothing.

    A step is a row of forwards with the backwards that follow it. Where no backward follows, calls of one region may be
    steps of their own: they count once.
    """

    #: a call runs the whole step (nothing calls a backward afterwards)
    one_step: bool = False
    _told: list[CompiledGraph] = field(default_factory=list)
    _regions: list[Region] = field(default_factory=list)
    _steps: dict[tuple[int, ...], None] = field(default_factory=dict)
    _now: list[tuple[int, Phase]] = field(default_factory=list)
    _backward: bool = False

    def add(self, graph: CompiledGraph, region: Region) -> None:
        """A graph has been compiled, or is known of a region that begins to run."""
        if all(graph is not told for told in self._told):
            self._told.append(graph)
        if all(region is not known for known in self._regions):
            self._regions.append(region)

    def called(self, group: int, phase: Phase) -> None:
        """A graph of a region begins to run."""
        if phase is Phase.BACKWARD:
            self._backward = True
            return
        if self._backward:
            self._steps[self._step()] = None
            self._now.clear()
            self._backward = False
        if self.one_step or phase is Phase.FORWARD or (group, phase) not in self._now:
            self._now.append((group, phase))

    def _step(self) -> tuple[int, ...]:
        """The forwards of the step so far, by region."""
        groups = tuple(group for group, _ in self._now)
        return groups if self._backward or self.one_step else tuple(dict.fromkeys(groups))

    @property
    def graphs(self) -> list[CompiledGraph]:
        """The graphs, in order of compilation."""
        steps = list(dict.fromkeys((*self._steps, self._step())))
        runs: dict[int, list[tuple[int, int]]] = {}
        for number, step in enumerate(steps):
            for place, group in enumerate(step):
                runs.setdefault(group, []).append((number, place))
        return [replace(g, runs=tuple(runs.get(g.group, ()))) for g in self._told]

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(g.plan for g in self.graphs)


@contextlib.contextmanager
def record(*, one_step: bool = False) -> Iterator[Recording]:
    """Collect the plans of everything that memplan compiles inside the block, or compiled inside an earlier one and
    runs inside this one.

    ``one_step``: all calls inside it are one step, though no backward follows them.

    Examples
    --------
    >>> import memplan
    >>> with memplan.record() as r:
    ...     pass  # run a model compiled with backend="memplan" here
    >>> r.plans
    ()
    """
    recording = Recording(one_step)
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
        if not _active:
            return
        region = _region(graph.group)
        region.graphs.append(graph)
        for recording in _active:
            recording.add(graph, region)


def _region(group: int) -> Region:
    region = _regions.get(group)
    if region is None:
        region = _regions[group] = Region()
    return region


def counted(call: Callable[..., object], group: int, phase: Phase) -> Callable[..., object]:
    """The call, of which every recording that is active when it runs is told; the call itself where none is active."""
    if not listening():
        return call
    with _lock:
        region = _region(group)

    def run(args: list[object]) -> object:
        if _active:
            with _lock:
                for recording in _active:
                    for graph in region.graphs:
                        recording.add(graph, region)
                    recording.called(group, phase)
        return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
