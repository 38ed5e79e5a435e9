"""What AOTAutograd makes of a Dynamo graph, kept between processes: a warm start does not trace, cut and capture again.

An entry holds torch's own description of the result (what aliases, what is mutated, which wrappers go around it, the
guards on sizes) and the programs as memplan captured them; from those compiling goes on as ever, through the cache of
plans. torch's `AOTAutogradCache` describes the result, and on a hit puts the wrappers and the guards back. The key
(`memplan.trace_key`), where entries lie, and what of a compiled graph is in them, are memplan's: an entry is only ever
read, and unpickled, if `memplan.runtime.cache` trusts the file as it trusts the libraries that lie beside it.

The interface is not public. Where it is not as it is known here (torch 2.11 to 2.13), or an entry cannot be used for
any reason, the graph is traced.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .capture.joint import hint
from .capture.partition import Partitioned
from .communicating import group_of
from .ir.errors import CacheError, MemplanError
from .ir.program import Phase, Program, UserKernel
from .runtime.cache import Cache
from .trace_key import UntoldError

log = logging.getLogger("memplan.cache")

#: bytes of constants that are kept with a program
_MOST_CONSTANTS = 1 << 20
_MODULES = tuple(f"torch._functorch._aot_autograd.{name}" for name in ("autograd_cache", "graph_compile"))
#: what is replaced, with the names of its first parameters (or their number, where torch's versions name them apart)
_KNOWN: Mapping[str, int | tuple[str, ...]] = {
    "autograd_cache_key": 4,
    "AOTAutogradCache.make_entry": ("compiled_fw_func", "compiled_bw_func"),
    "AOTAutogradCache._lookup": ("key", "local", "remote", "args", "cache_info", "aot_config"),
    "AOTAutogradCache.save": ("key", "entry", "remote"),
    "AOTAutogradCache.evaluate_guards": ("guard_expr", "hints"),
    "AOTAutogradCache._filter_backed_symints": ("inputs",),
}
_CONFIG = {
    "force_autograd_cache": True,
    "bundled_autograd_cache": True,
    "strict_autograd_cache": False,
    "enable_remote_autograd_cache": False,
}
Call = Callable[..., object]


@dataclass(frozen=True)
class Step:
    """A region as it was captured: all that compiling it goes on from.

    ``lazy``: for each program the positions of inputs that are lazily conjugated or negated. ``partitioned`` without
    its graphs. ``together``: forward and backward were planned together.
    """

    programs: Mapping[Phase, Program]
    lazy: Mapping[Phase, tuple[int, ...]]
    partitioned: Partitioned
    together: bool


@dataclass
class KeptGraph:
    """A graph in torch's entry. torch asks it for the call once the entry is found, the forward before the backward.

    ``step``, of the first graph of an entry: the pickled `Step`. ``bind`` makes the calls, of an entry that is used.
    """

    phase: Phase
    step: bytes = b""
    bind: Callable[[Phase], Call] | None = None

    def load(self, example_inputs: Sequence[object]) -> KeptGraph:
        return self

    def post_compile(self, result: KeptGraph, fx_config: object) -> Call:
        assert self.bind is not None
        try:
            call = self.bind(self.phase)
        except Exception as error:  # torch takes it for a miss: the graph is traced, and fails there if it must
            level = logging.INFO if isinstance(error, MemplanError) else logging.WARNING
            log.log(level, "a kept trace cannot be used and is made again: %s", error)
            raise
        if self.phase is not Phase.BACKWARD:
            return call
        disable: Callable[..., Call] = torch._dynamo.disable
        return disable(call, reason="do not trace generated backwards pass")


@dataclass
class KeptBackward(KeptGraph):
    """A backward, with what torch wants to know of its inputs."""

    backward_state_indices: Sequence[int] = ()
    num_symints_saved_for_bw_: int = 0


@dataclass
class TraceCache:
    """Entries of one Dynamo graph.

    ``key`` makes the key of the graph, its inputs and torch's ``AOTConfig``; ``tell`` gives the region as it was
    captured, or why it is not kept; ``restore`` makes the calls of a kept one.
    """

    store: Cache
    key: Callable[[torch.fx.GraphModule, Sequence[object], object], str]
    tell: Callable[[], Step | str]
    restore: Callable[[Step], Callable[[Phase], Call]]

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, what this thread asks of AOTAutograd's cache is answered here. (Dynamo's lock is held meanwhile.)"""
        found = interface()
        if found is None:
            log.info("torch %s keeps traces in another way than memplan knows", torch.__version__)
            yield
            return
        torchs = found[0].AOTAutogradCache
        guards, make = _guard_count(), torchs.make_entry

        def key(module: Any, inputs: Sequence[object], config: object, *_: object) -> tuple[str, list[str]]:
            try:
                return self.key(module, inputs, config), []
            except (UntoldError, CacheError) as error:
                log.info("a graph is traced in every process: %s", error)
                raise found[0].BypassAOTAutogradCache(str(error)) from error

        def make_entry(compiled_fw_func: object, compiled_bw_func: object, *args: object, **kwargs: object) -> object:
            from torch._inductor.output_code import OutputCode  # what torch keeps; taken out again

            entry = make(OutputCode(), None if compiled_bw_func is None else OutputCode(), *args, **kwargs)
            told = self.tell() if _guard_count() == guards else "it hangs on which inputs are the same"
            return told if isinstance(told, str) else _filled(entry, told)

        def save(key: str, entry: Any, remote: bool) -> None:
            if isinstance(entry, str):
                log.info("a trace is not kept: %s", entry)
            else:
                self.write(key, entry)

        def look_up(key: str, local: bool, remote: bool, args: Sequence[object], *_: object) -> object | None:
            entry = self.read(key)
            if entry is None:
                return None
            # (the hints are in the key: the guards hold, if all is well)
            hints = [hint(s) for s in torchs._filter_backed_symints(args)]
            if entry.guards_expr and not torchs.evaluate_guards(entry.guards_expr, hints):
                return None
            with unset_fake_temporarily():
                bind = self.restore(pickle.loads(entry.compiled_fw.step))
            for graph in (entry.compiled_fw, entry.compiled_bw):
                if graph is not None:
                    graph.bind = bind
            return entry, b""

        with contextlib.ExitStack() as stack:
            stack.enter_context(functorch_config.patch(_CONFIG))
            ours: dict[str, Call] = {"make_entry": make_entry, "save": save, "_lookup": look_up}
            stack.enter_context(_replaced(torchs, ours))
            stack.enter_context(_replaced(found[0], {"autograd_cache_key": key}))
            for module in found:  # (else every call would go through one more object, which holds the entry)
                stack.enter_context(_replaced(module, {"SerializableCompiledFunction": lambda call, _: call}))
            yield

    def read(self, key: str) -> Any | None:
        """torch's entry under a key, its file verified; None if there is none that can be read."""
        data = self.store.get_bytes(key)
        if data is None:
            return None
        try:
            with unset_fake_temporarily():
                return pickle.loads(zlib.decompress(data))
        except Exception as error:  # a pickle of another state of the world raises anything
            log.warning("a kept trace cannot be read and is made again: %s", error)
            return None

    def write(self, key: str, entry: Any) -> None:
        """Keep torch's entry; what cannot be kept is made again next time."""
        try:
            with unset_fake_temporarily():
                self.store.put(key, zlib.compress(pickle.dumps(entry), 1), suffix=".trace")
        except Exception as error:  # anything may be in torch's description: sources, specs of subclasses
            log.info("a trace is not kept: %s", error)


def _filled(entry: Any, step: Step) -> Any:
    """torch's entry with what memplan keeps in the place of compiled graphs; why it is not kept, as text."""
    refusal = unkept(step)
    if refusal is not None:
        return refusal
    behind = entry.compiled_bw
    with unset_fake_temporarily():
        pickled = pickle.dumps(step)
    entry.compiled_fw = KeptGraph(Phase.INFERENCE if behind is None else Phase.FORWARD, pickled)
    if behind is not None:
        known = (tuple(behind.backward_state_indices), behind.num_symints_saved_for_bw_)
        entry.compiled_bw = KeptBackward(Phase.BACKWARD, b"", None, *known)
    return entry


def unkept(step: Step) -> str | None:
    """Why a captured region is not kept; None if it is."""
    for program in step.programs.values():
        if program.callables or any(isinstance(op, UserKernel) for op in program.operations):
            return "it calls what is no operator"
        if any(group_of(op) is not None for op in program.operations):
            return "what other ranks tell has a say in it"
        constants = program.constants.values()
        nbytes = sum(t.untyped_storage().nbytes() for t in constants)
        if any(t.device.type != "cpu" for t in constants) or nbytes > _MOST_CONSTANTS:
            return "its constants are large, or on a GPU"
    return None


def _guard_count() -> int:
    """Guards that AOTAutograd has left with Dynamo: on inputs that are one tensor, or overlap."""
    context = TracingContext.try_get()
    return len(context.guards_context.aotautograd_guards) if context is not None else 0


def interface() -> tuple[ModuleType, ...] | None:
    """The modules of torch's cache and of its users, if their parts are as memplan knows them."""
    try:
        found = tuple(import_module(name) for name in _MODULES)
        for name, expected in _KNOWN.items():
            parameters = tuple(inspect.signature(attrgetter(name)(found[0])).parameters)
            if len(parameters) != expected if isinstance(expected, int) else parameters[: len(expected)] != expected:
                return None
    except (ImportError, AttributeError):
        return None
    return found if all(hasattr(functorch_config, name) for name in _CONFIG) else None


@contextlib.contextmanager
def _replaced(owner: Any, functions: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    """A class or module with other functions, for this thread: an autograd thread may compile for another backend."""
    here = threading.get_ident()

    def split(ours: Callable[..., object], torchs: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            return (ours if threading.get_ident() == here else torchs)(*args, **kwargs)

        return call

    before = {name: owner.__dict__[name] for name in functions}
    for name, function in functions.items():
        dispatched = split(function, getattr(owner, name))
        setattr(owner, name, staticmethod(dispatched) if isinstance(owner, type) else dispatched)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
