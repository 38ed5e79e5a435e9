"""What library calls ask of the allocator beside their results.

On a CPU oneDNN reorders a convolution's operands, and half-precision factors of products, into blocked copies, and
attention packs keys and takes room for a block of scores for every thread. On a GPU the gradients of attention are
summed up in float32, and sorts and Fourier transforms have workspaces. How much is nowhere documented and depends on
the device and the versions. So each distinct call of a program is run on buffers of its own when the program is
compiled, and the allocator is listened to. What was heard is kept on disk with all that it depends on. (Of a GPU's
convolutions more has to be known: `memplan.convolutions`.)

It is listened to with torch's legacy profiler, in a thread of its own: that one keeps its state by thread, so that a
profiler of the user's sees neither the calls nor their bytes. On a GPU it runs in a pool of memory that goes back to
the device, and in one block of it that is larger than all of its requests, so that each is cut to size.

Where nothing is known (sizes that vary, plans that are made without computing anything) none is counted, and the
plan's notes say so; but for the backward of flash attention, whose float32 sums have a known shape.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import (  # type: ignore[attr-defined]
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)

from .ir.config import Config
from .ir.index import FloorDiv
from .ir.loops import Size
from .ir.program import Contract, Extern, Operation, Program, View
from .lowering.call_site import resolve
from .runtime.cache import cache_key
from .runtime.toolchain import cpu_identity
from .sampled_calls import is_static, keep, nbytes, plain, sample, stored

log = logging.getLogger(__name__)

_VERSION = 2
#: calls on a CPU that take scratch whatever their operands
_ALWAYS = frozenset(
    (
        "aten.convolution.default",
        "aten.convolution_backward.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    )
)
#: calls on a CPU that take none for float32 and float64
_PRODUCTS = frozenset(("aten.mm.out", "aten.addmm.out", "aten.bmm.out", "aten.baddbmm.out"))
_HALVES = (torch.float16, torch.bfloat16)
#: Calls on a GPU that take scratch, by the beginnings of their names: those that run with zeros for all their operands,
#: check nothing on the device that zeros fail, and draw nothing at random once ``dropout_p`` is zero.
_ON_GPUS = tuple(
    f"aten.{name}"
    for name in (
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention", "_fft_", "sort", "topk", "kthvalue", "median", "nanmedian", "mode",
        "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "embedding_dense_backward", "index_put", "_cdist",
        "_grouped_mm", "_scaled_mm", "grid_sampler", "col2im", "im2col",
    )
)  # fmt: skip
#: The backward of flash attention keeps the query's gradient in float32 beside its results, and a number for each row
#: of scores; rows come in blocks, and the size of a head is padded (torch's flash_api.cpp; cuDNN asks for as much on an
#: H200, and 256 bytes). What a plan counts where no such call can be run.
_SUMMED_IN_FLOAT32 = (
    "aten._scaled_dot_product_flash_attention_backward.default",
    "aten._scaled_dot_product_cudnn_attention_backward.default",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
)
_ROWS, _HEAD = 128, 32
#: a GPU's allocator rounds requests up to a multiple of this many bytes
_BLOCK = 512
#: what may be allocated beside the operands of the call that is run
_ALLOWANCE = 256 << 20

#: (device, key of a call) -> bytes
_known: dict[tuple[str, str], int] = {}
_lock = threading.Lock()


def watched(op: Operation) -> bool:
    """Whether the operation is a call whose scratch is looked at."""
    if not isinstance(op, Extern):
        return False
    if op.device == "cpu":
        halves = any(isinstance(a, View) and a.dtype in _HALVES for a in op.args)
        return op.target in _ALWAYS or (op.target in _PRODUCTS and halves)
    return op.device.startswith("cuda") and op.contract is Contract.FRESH and op.target.startswith(_ON_GPUS)


def decides(program: Program) -> tuple[str, ...]:
    """What has a say in the scratch of a program's calls beside the calls; nothing where none of them takes any."""
    kinds = sorted({op.device.partition(":")[0] for op in program.operations if isinstance(op, Extern)})
    return tuple(part for kind in kinds for part in _around(kind))


def count_scratch(
    program: Program, config: Config, find: Callable[[Extern, Config], int | None] | None = None
) -> Program:
    """The program with the scratch of its calls.

    Parameters
    ----------
    find:
        What says the bytes of a call; running it by default.
    """
    find = find or scratch_of
    operations: list[Operation] = []
    unknown: list[tuple[str, str]] = []
    for op in program.operations:
        if isinstance(op, Extern) and watched(op):
            heard = find(op, config) if is_static(op) else None
            found = _in_float32(op) if heard is None else heard
            if found is None:
                where = "the CPU" if op.device == "cpu" else op.device
                unknown.append((op.name, f"{op.target}: its scratch on {where} is not known and not counted"))
            else:
                op = replace(op, scratch=found)
        operations.append(op)
    program = program.with_operations(tuple(operations))
    return replace(program, notes=(*program.notes, *unknown)) if unknown else program


def _in_float32(op: Extern) -> Size | None:
    """What the gradients of flash attention are known to take on a GPU; None for other calls."""
    if op.device == "cpu" or op.target not in _SUMMED_IN_FLOAT32:
        return None
    query = op.args[1]
    assert isinstance(query, View)
    batch, heads, rows, head = query.sizes
    rows, head = (FloorDiv(n + step - 1, step) * step for n, step in ((rows, _ROWS), (head, _HEAD)))
    found = 4 * batch * heads * rows * (head + 1)
    return int(found) if found.is_Integer else found


def scratch_of(op: Extern, config: Config) -> int | None:
    """Bytes that are alive at once within a call beside its operands and results, as heard before or now; None where
    there is no room to run it, or nothing may be computed."""
    kind = op.device.partition(":")[0]
    if kind == "cuda" and (config.target is not None or not torch.cuda.is_available()):
        return None
    where = cpu_identity() if kind == "cpu" else torch.cuda.get_device_name(op.device)
    names = [n for n, _ in op.kwargs]
    arguments = [plain(op.args), names, plain(tuple(a for _, a in op.kwargs))]
    results = [None if v is None else [list(v.sizes), list(v.strides)] for v in op.results]
    about = json.dumps([op.target, arguments, results, *_around(kind)], separators=(",", ":"))
    with _lock:
        if (where, about) not in _known:
            key = cache_key("scratch", _VERSION, torch.__version__, where, about)
            found = stored(key, config)
            if not isinstance(found, int) or found < 0:
                found = _measured(op, config)
                if found is None:
                    return None
                keep(key, found, f"what {op.target} needs on this {kind.upper()}", config)
            _known[where, about] = found
        return _known[where, about]


def _around(kind: str) -> tuple[str, ...]:
    """What decides scratch beside the call, on this kind of device."""
    if kind == "cuda":
        cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        return (str(torch.version.cuda), str(cudnn), str(torch.are_deterministic_algorithms_enabled()))
    if kind != "cpu":
        return ()
    mkldnn = (torch._C._get_mkldnn_enabled(), torch._C._get_mkldnn_deterministic(), torch._C._get_nnpack_enabled())
    precision = [torch._C._get_fp32_precision_getter("mkldnn", name) for name in ("conv", "matmul")]
    return (str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability(), *map(str, (*mkldnn, *precision)))


def _measured(op: Extern, config: Config) -> int | None:
    """Run the call on buffers of its own and listen; None where plans alone are wanted, there is no room, or a stream
    is being recorded."""
    views = [v for v in (*op.args, *(a for _, a in op.kwargs), *op.results) if isinstance(v, View)]
    device = torch.device(op.device)
    on_gpu = device.type == "cuda"
    if config.plan_only or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return None
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else _free_memory()
    room = sum(map(nbytes, views)) + _ALLOWANCE
    if 2 * room > free:
        log.info("%s (%s) is not run: %d free bytes on %s are too few", op.target, op.name, free, device)
        return None
    found: list[int | RuntimeError] = []

    def listen() -> None:
        try:
            with _cut_to_size(device, room), torch.no_grad():
                found.append(_listen(op, device))
        except RuntimeError as error:  # no room after all, or a call that fails: the program's own will say so
            found.append(error)

    thread = threading.Thread(target=listen, name="memplan scratch")
    thread.start()
    thread.join()
    (heard,) = found
    if isinstance(heard, RuntimeError):
        log.warning("%s (%s) cannot be measured: %s", op.target, op.name, heard)
        return None
    return heard


@contextmanager
def _cut_to_size(device: torch.device, nbytes: int) -> Iterator[None]:
    """On a GPU a pool of memory of this thread's, which has so many bytes in one block; on a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    pool = torch.cuda.MemPool()
    with torch.cuda.device(device), torch.cuda.use_mem_pool(pool, device):
        torch.empty(nbytes, dtype=torch.uint8, device=device)  # freed at once: what is cut from it is not rounded up
        yield


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _listen(op: Extern, device: torch.device) -> int:
    """What the call has alive at its peak beside its results, the second time it runs."""
    call = resolve(op.target)
    assert call is not None
    names = [a.name for a in call._schema.arguments if not a.kwarg_only]
    args = [0.0 if n == "dropout_p" else sample(a, device) for n, a in zip(names, op.args, strict=False)]
    kwargs = {n: sample(a, device) for n, a in op.kwargs}
    if op.contract is Contract.OUT:
        outs = [a.name for a in call._schema.arguments if a.is_out]
        kwargs |= {n: sample(v, device) for n, v in zip(outs, op.results, strict=True) if v is not None}
    config = ProfilerConfig(
        ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    call(*args, **kwargs)
    _enable_profiler_legacy(config)
    try:
        results = call(*args, **kwargs)
    finally:
        records = _disable_profiler_legacy()
    usage = "cuda_memory_usage" if device.type == "cuda" else "cpu_memory_usage"
    moves = [getattr(r, usage)() for thread in records for r in thread if r.kind() == "memory_alloc"]  # type: ignore[comparison-overlap]  # the stub says int
    live = peak = 0
    for move in moves:
        live += move
        peak = max(peak, live)
    if op.contract is Contract.OUT:
        return peak
    flat = results if isinstance(results, tuple) else (results,)
    storages = [r.untyped_storage() for r in flat if isinstance(r, torch.Tensor) and r.device == device]
    step = _BLOCK if device.type == "cuda" else 1
    return max(0, peak - sum({s.data_ptr(): -(-s.nbytes() // step) * step for s in storages}.values()))
