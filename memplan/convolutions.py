"""What convolutions do with a GPU's memory: whether they can write into a planned buffer, and their scratch.

cuDNN's scratch is nowhere documented: it depends on the algorithm, which its heuristics choose. So each distinct
convolution of a program is run on buffers of its own when the program is compiled, once to have its algorithm chosen
and then between two readings of the allocator's counters, in a pool of memory that goes back to the device afterwards.
The counters are cumulative, so the statistics that a user reads (peaks) are touched as any allocation touches them and
never reset. What was measured is kept on disk for the kind of device, the versions and the settings; where algorithms
are chosen by timing them (``torch.backends.cudnn.benchmark``) only for this process.

Where nothing is known (no such GPU here, plans of fake tensors on another machine) a convolution allocates its result
and no scratch is counted, and the plan's notes say so.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.distributed
from torch.utils._python_dispatch import _disable_current_modes

from .ir.config import Config
from .ir.program import Contract, Extern, Operation, Program, View
from .runtime.cache import cache_key
from .runtime.convolution import cudnn_flags
from .sampled_calls import is_static, keep, nbytes, plain, sample, stored

log = logging.getLogger(__name__)

FORWARD, BACKWARD = "aten.convolution.default", "aten.convolution_backward.default"
OUT = "memplan.convolution.out"
CUDNN = "Cudnn"
_VERSION = 1
#: an allocation's size is a multiple of this many bytes
_ROUNDING = 512
#: what may be allocated beside the buffers of the convolution that is measured
_ALLOWANCE = 64 << 20
#: backends whose allocations are their result, copies in another layout, and one workspace
_SUMMED = frozenset({CUDNN, "CudnnTranspose", "CudaDepthwise2d", "CudaDepthwise3d"})


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one convolution: torch's backend for it, the bytes that it takes and gives back beside its results, and
    whether its result is laid out as cuDNN would lay it out (so that it can be written in place)."""

    backend: str
    scratch: int
    as_planned: bool


#: (name of the device, key of the convolution) -> what is known of it
_known: dict[tuple[str, str], Facts] = {}
_lock = threading.Lock()


def plan_convolutions(
    program: Program, config: Config, find: Callable[[Extern, Config], Facts | None] | None = None
) -> Program:
    """The program with each convolution of a GPU writing into a planned buffer where it can, and with its scratch.

    Parameters
    ----------
    find:
        What says the facts of a call; the device by default.
    """
    find = find or facts_of
    operations: list[Operation] = []
    unknown: list[tuple[str, str]] = []
    for op in program.operations:
        if isinstance(op, Extern) and op.target in (FORWARD, BACKWARD) and op.device.startswith("cuda"):
            facts = find(op, config) if is_static(op) and not op.kwargs else None
            if facts is None:
                unknown.append((op.name, f"{op.target}: its scratch on {op.device} is not known and not counted"))
            else:
                op = replace(op, scratch=facts.scratch)
                if facts.backend == CUDNN and facts.as_planned and _writable(op):
                    op = replace(op, target=OUT, contract=Contract.OUT)
        operations.append(op)
    program = program.with_operations(tuple(operations))
    return replace(program, notes=(*program.notes, *unknown)) if unknown else program


def _writable(op: Extern) -> bool:
    """Whether the call is one that `memplan.runtime.convolution` knows to make with eager's bits."""
    # from torch 2.14 on eager may leave the bias to cuDNN as well, which rounds once less
    bias = isinstance(op.args[2], View)
    return op.target == FORWARD and not (bias and _torch_version() >= (2, 14))


def _torch_version() -> tuple[int, ...]:
    return tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])


# -- what is known ---------------------------------------------------------------------------------------------------


def facts_of(op: Extern, config: Config) -> Facts | None:
    """Stored facts of a convolution, else measured ones; None where there is no such device or no room for it."""
    if config.target is not None or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(op.device)
    results = [None if v is None else [list(v.sizes), list(v.strides)] for v in op.results]
    flags = (torch._C._get_cudnn_enabled(), *cudnn_flags())
    about = json.dumps([op.target, plain(op.args), results, flags], separators=(",", ":"))
    with _lock:
        key = (name, about)
        if key not in _known:
            found = None if flags[1] else _stored(name, about, config)
            if found is None:
                found = _measured(op, config)
                if found is None:
                    return None
                if not flags[1]:
                    _keep(name, about, found, config)
            _known[key] = found
        return _known[key]


def _key(name: str, about: str) -> str:
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    versions = (torch.__version__, str(torch.version.cuda), str(cudnn))
    return cache_key("convolution", _VERSION, name, *versions, about)


def _stored(name: str, about: str, config: Config) -> Facts | None:
    content = stored(_key(name, about), config)
    if not isinstance(content, dict):
        return None
    backend, scratch, as_planned = (content.get(n) for n in ("backend", "scratch", "as_planned"))
    if not (isinstance(backend, str) and isinstance(scratch, int) and scratch >= 0 and isinstance(as_planned, bool)):
        return None
    return Facts(backend, scratch, as_planned)


def _keep(name: str, about: str, facts: Facts, config: Config) -> None:
    keep(_key(name, about), asdict(facts), f"what a convolution needs on {name}", config)


# -- measuring -------------------------------------------------------------------------------------------------------


def _measured(op: Extern, config: Config) -> Facts | None:
    """Run the call on buffers of its own. None where plans alone are wanted, ranks plan together by timings that may
    differ, a stream is being recorded, or the device has no room."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    timed = torch._C._get_cudnn_benchmark()
    if config.plan_only or (together and timed) or torch.cuda.is_current_stream_capturing():
        return None
    device = torch.device(op.device)
    free, _ = torch.cuda.mem_get_info(device)
    views = [v for v in (*op.args, *op.results) if isinstance(v, View)]
    if 2 * sum(map(nbytes, views)) + _ALLOWANCE > free:
        log.info("%s (%s) is not measured: %s has %d bytes left", op.target, op.name, op.device, free)
        return None
    with torch.no_grad(), _disable_current_modes(), torch._C._DisableAutocast(), torch.cuda.device(device):
        pool = torch.cuda.MemPool()
        try:
            with torch.cuda.use_mem_pool(pool, device):
                return _run(op, device)
        except RuntimeError as error:  # no room after all, or a call that fails: the program's own will say so
            log.warning("%s (%s) cannot be measured on %s: %s", op.target, op.name, op.device, error)
            return None


def _run(op: Extern, device: torch.device) -> Facts:
    args = [sample(a, device) for a in op.args]
    backend = _backend(args, op.target == BACKWARD)
    summed = backend in _SUMMED
    if op.target == FORWARD:
        forward = torch.ops.aten.convolution.default
        scratch = _scratch(lambda: (forward(*args),), device) if summed else 0
        return Facts(backend, scratch, _as_planned(forward(*args), op.results[0]))
    backward, mask = torch.ops.aten.convolution_backward.default, args[-1]
    assert isinstance(mask, list)
    # the gradients are found one after the other, each with a workspace of its own
    parts = [[k == one for k in range(3)] for one in range(3) if mask[one] and summed]
    return Facts(backend, max((_scratch(partial(backward, *args[:-1], p), device) for p in parts), default=0), False)


def _as_planned(result: torch.Tensor, view: View | None) -> bool:
    laid_out = None if view is None else (tuple(view.sizes), tuple(view.strides), view.offset)
    return laid_out == (tuple(result.shape), result.stride(), 0)


def _backend(args: Sequence[object], backward: bool) -> str:
    """Which of torch's implementations a convolution gets."""
    if backward:
        _, source, weight, bias_sizes, *settings = args
        return str(torch._C._select_conv_backend(source, weight, None, *settings[:6], bias_sizes).name)
    source, weight, bias, *settings = args
    return str(torch._C._select_conv_backend(source, weight, bias, *settings[:6]).name)


def _scratch(call: Callable[[], tuple[torch.Tensor | None, ...]], device: torch.device) -> int:
    """Bytes that a call asks the allocator for beside its results.

    The first call finds the algorithm, which may take scratch that later ones do not; the least of two counts, since
    another thread's allocations are counted too.
    """
    call()
    found = []
    for _ in range(2):
        before = _asked(device)
        results = call()
        asked = _asked(device) - before
        storages = {r.untyped_storage().data_ptr(): r.untyped_storage().nbytes() for r in results if r is not None}
        found.append(max(0, asked - sum(storages.values())))
        del results
    return -(-min(found) // _ROUNDING) * _ROUNDING


def _asked(device: torch.device) -> int:
    """All bytes that were ever asked of the device's caching allocator."""
    return int(torch.cuda.memory_stats(device).get("requested_bytes.all.allocated", 0))
