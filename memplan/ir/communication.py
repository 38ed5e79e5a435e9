"""Words and facts about communication: which calls start it, what is in flight meanwhile, which memory it wants.

A collective is *in flight* from its call until a wait on one of its results. Meanwhile other processes (or a stream
of the library's own) read and write its buffers, whatever this process's steps do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Memory(Enum):
    """Where the bytes of a buffer have to come from, beside what kind of buffer it is."""

    PLAIN = "plain"  # any allocation of its device
    PINNED = "pinned"  # page-locked memory of the host: in no count of the device's bytes
    SYMMETRIC = "symmetric"  # the same allocation and offset on every rank of a group, which its peers read and write
    REGISTERED = "registered"  # the same, for the kernels of the group's library: they work in it, not in copies


#: Communication memory: arenas that stay from call to call, in no count of a program's bytes.
ARENA_MEMORY = (Memory.SYMMETRIC, Memory.REGISTERED)


@dataclass(frozen=True, slots=True)
class CollectiveForm:
    """A call that starts a collective.

    Attributes
    ----------
    kind:
        What it does, for people and for comparing: ``"all_reduce"``.
    copies:
        Whether it works on copies of its arguments that it makes itself: they are free when it returns.
    uneven:
        Whether ranks may rightly give and take different numbers of elements.
    """

    kind: str
    copies: bool = False
    uneven: bool = False


_GATHER = CollectiveForm("all_gather")
_SCATTER = CollectiveForm("reduce_scatter")
#: by the operator's name without namespace and overload
_FORMS: Mapping[str, CollectiveForm] = {
    "all_reduce": CollectiveForm("all_reduce", copies=True),
    "all_reduce_": CollectiveForm("all_reduce"),
    "all_reduce_coalesced": CollectiveForm("all_reduce", copies=True),
    "all_reduce_coalesced_": CollectiveForm("all_reduce"),
    "all_gather_into_tensor": _GATHER,
    "all_gather_into_tensor_out": _GATHER,
    "all_gather_into_tensor_coalesced": _GATHER,
    "reduce_scatter_tensor": _SCATTER,
    "reduce_scatter_tensor_out": _SCATTER,
    "reduce_scatter_tensor_coalesced": _SCATTER,
    "all_to_all_single": CollectiveForm("all_to_all", uneven=True),
    "broadcast": CollectiveForm("broadcast", copies=True),
    "broadcast_": CollectiveForm("broadcast"),
    "isend": CollectiveForm("send", uneven=True),
    "irecv": CollectiveForm("receive", uneven=True),
    "batch_p2p_ops": CollectiveForm("send and receive", uneven=True),
}
_FUNCTIONAL = ("_c10d_functional", "_c10d_functional_autograd")
#: of other namespaces what needs a wait, too
_ELSEWHERE: Mapping[str, CollectiveForm] = {
    "_dtensor.shard_dim_alltoall": CollectiveForm("all_to_all"),
    "memplan.library_all_to_all": CollectiveForm("all_to_all"),
    "symm_mem._low_contention_all_gather": _GATHER,
    "symm_mem._low_contention_reduce_scatter": _SCATTER,
}


def collective_form(target: str) -> CollectiveForm | None:
    """What an operator (``namespace.name.overload``) starts, or None if it is no collective that returns at once.

    An operator among functional collectives that is not known here (of a newer torch) is taken for one that reads its
    arguments until it is waited for.
    """
    namespace, _, rest = target.partition(".")
    name = rest.partition(".")[0]
    if namespace not in _FUNCTIONAL:
        return _ELSEWHERE.get(f"{namespace}.{name}")
    known = _FORMS.get(name)
    return CollectiveForm(name, uneven=True) if known is None and name != "wait_tensor" and name[0] != "_" else known


def is_wait(target: str) -> bool:
    """Whether an operator waits for what is in flight to its argument, and returns the argument itself."""
    return target.startswith(("_c10d_functional.wait_tensor.", "_c10d_functional_autograd.wait_tensor."))


@dataclass(frozen=True, slots=True)
class SymmetricForm:
    """An operation on symmetric memory that runs whole on the current stream: nothing is in flight after it.

    Attributes
    ----------
    argument:
        Position of the argument that must lie in symmetric memory; None: the result must, which peers write.
    barrier_before:
        No rank touches a peer's memory before every rank has reached the call on its stream: what was written before
        it is what the peers read.
    barrier_after:
        No rank goes on before every peer has done with its memory: it may be overwritten at once. Without it, only
        after another operation of the group with ``barrier_before``.
    """

    kind: str
    argument: int | None = 0
    barrier_before: bool = True
    barrier_after: bool = True


#: Read off torch's ``CUDASymmetricMemoryOps.cu`` (2.5 to 2.13): each kernel synchronises its blocks with the blocks of
#: the same number on all ranks when it starts and before it ends, and all ranks launch equally many. Reduce-scatter
#: leaves its argument as it is, whatever its schema says. Those of `memplan.runtime.peers` begin and end with barriers.
#: Through multicast (``multimem``) a rank reads the sum of what all have at a place, or writes to all of them; between
#: the barriers of one-shot all-reduce nothing is written, and what all-gather writes is fenced by the last one.
SYMMETRIC_FORMS: Mapping[str, SymmetricForm] = {
    "symm_mem.one_shot_all_reduce_out.default": SymmetricForm("all_reduce"),
    "symm_mem.two_shot_all_reduce_.default": SymmetricForm("all_reduce"),
    "symm_mem.two_shot_all_reduce_out.default": SymmetricForm("all_reduce"),
    "symm_mem.reduce_scatter_out.default": SymmetricForm("reduce_scatter"),
    "symm_mem.multimem_one_shot_all_reduce_out.default": SymmetricForm("all_reduce"),
    "symm_mem.multimem_all_reduce_.default": SymmetricForm("all_reduce"),
    "symm_mem.multimem_all_gather_out.default": SymmetricForm("all_gather", argument=None),
    "memplan.peer_all_gather.out": SymmetricForm("all_gather"),
    "memplan.peer_all_to_all.out": SymmetricForm("all_to_all"),
    "memplan.peer_broadcast.out": SymmetricForm("broadcast"),
    "memplan.peer_broadcast_.default": SymmetricForm("broadcast"),
}


#: What torch's kernels of `SYMMETRIC_FORMS` add up.
SYMMETRIC_DTYPES = frozenset({"torch.float32", "torch.bfloat16"})


#: Ranks for which torch has built the kernels that add up and write elsewhere.
BUILT_SIZES = (2, 4, 8)


#: Kinds that registered memory makes faster: what moves values. What adds them up takes as long as in plain memory.
REGISTERED_KINDS = ("all_gather", "all_to_all")


#: Kinds that have a form through multicast.
MULTICAST_KINDS = ("all_reduce", "all_gather")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From and up to how many bytes of a message which way is the fastest; everywhere else the library.

    A message is what all ranks give together, or take: an all-gather's result, a reduce-scatter's argument. An
    all-reduce runs one-shot up to ``one_shot_bytes``, and two-shot from there up to ``two_shot_bytes``. What is left to
    the library is faster in registered memory from ``..._registered`` bytes on; 0: not that one knew.
    """

    one_shot_bytes: int
    two_shot_bytes: int
    reduce_scatter_least: int = 0
    reduce_scatter_bytes: int = 0
    all_gather_least: int = 0
    all_gather_bytes: int = 0
    broadcast_least: int = 0
    broadcast_bytes: int = 0
    all_gather_registered: int = 0
    all_to_all_registered: int = 0

    def on_symmetric(self, kind: str, nbytes: int) -> bool:
        """Whether a collective of a kind with one form on symmetric memory is faster there than by the library."""
        return int(getattr(self, f"{kind}_least")) <= nbytes <= int(getattr(self, f"{kind}_bytes"))

    def on_registered(self, kind: str, nbytes: int) -> bool:
        """Whether the library's collective of this kind is known to be faster in memory registered with it."""
        return kind in REGISTERED_KINDS and 0 < int(getattr(self, f"{kind}_registered")) <= nbytes

    @property
    def any_registered(self) -> bool:
        """Whether registered memory is known to be faster for anything."""
        return any(getattr(self, f"{kind}_registered") for kind in REGISTERED_KINDS)


def default_thresholds(size: int) -> Thresholds:
    """For a group of ``size`` ranks joined by NVLink.

    Two ranks: measured on two H200s (``benchmarks/results/collectives.md``). More ranks: of all-reduce those of torch's
    own ``IntraNodeComm``; of the others nothing is known, and the library is taken.
    """
    return TWO_RANKS if size == 2 else Thresholds(256 * 2**10, 10 * 2**20)


#: Two-shot and reduce-scatter were faster than the library at every size, and registered memory from 8 MiB on.
TWO_RANKS = Thresholds(
    0, 256 * 2**20, reduce_scatter_bytes=256 * 2**20, all_gather_registered=8 * 2**20, all_to_all_registered=8 * 2**20
)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What a plan has to know of a process group: equal on all its ranks.

    Attributes
    ----------
    device:
        Its type.
    obstacle, unregistered, no_multicast:
        Why the group has no symmetric memory there, its library no registered memory, and symmetric memory no
        multicast; "" where there is.
    """

    name: str
    size: int
    device: str
    obstacle: str
    thresholds: Thresholds
    unregistered: str = "the options do not ask for it"
    no_multicast: str = "the options do not ask for it"
