"""What calls on a CPU ask of the allocator beside their results.

oneDNN reorders a convolution's operands, and half-precision factors of products, into blocked copies; attention packs
keys and takes room for a block of scores for every thread. How much is nowhere documented and depends on the
processor, the number of threads and the versions. So each distinct call of a program is run on buffers of its own when
the program is compiled, and the allocator is listened to. What was heard is kept on disk with all that it depends on.

It is listened to with torch's legacy profiler, in a thread of its own: that one keeps its state by thread, so that a
profiler of the user's sees neither the calls nor their bytes.

Where nothing is known (sizes that vary, plans that are made without computing anything) none is counted, and the
plan's notes say so.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
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
from .ir.program import Contract, Extern, Operation, Program, View
from .lowering.call_site import resolve
from .runtime.cache import cache_key
from .runtime.toolchain import cpu_identity
from .sampled_calls import is_static, keep, nbytes, plain, sample, stored

log = logging.getLogger(__name__)

_VERSION = 1
#: calls that take scratch whatever their operands
_ALWAYS = frozenset(
    (
        "aten.convolution.default",
        "aten.convolution_backward.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    )
)
#: calls that take none for float32 and float64
_PRODUCTS = frozenset(("aten.mm.out", "aten.addmm.out", "aten.bmm.out", "aten.baddbmm.out"))
_HALVES = (torch.float16, torch.bfloat16)
#: what may be allocated beside the operands of the call that is run
_ALLOWANCE = 256 << 20

#: key of a call -> bytes
_known: dict[str, int] = {}
_lock = threading.Lock()


def watched(op: Operation) -> bool:
    """Whether the operation is a call on a CPU whose scratch is looked at."""
    if not isinstance(op, Extern) or op.device != "cpu":
        return False
    halves = any(isinstance(a, View) and a.dtype in _HALVES for a in op.args)
    return op.target in _ALWAYS or (op.target in _PRODUCTS and halves)


def decides(program: Program) -> tuple[str, ...]:
    """What has a say in the scratch of a program's calls beside the calls; nothing where none of them takes any."""
    return _around() if any(isinstance(op, Extern) and op.device == "cpu" for op in program.operations) else ()


def count_cpu_scratch(
    program: Program, config: Config, find: Callable[[Extern, Config], int | None] | None = None
) -> Program:
    """The program with the scratch of its calls on a CPU.

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
            found = find(op, config) if is_static(op) else None
            if found is None:
                unknown.append((op.name, f"{op.target}: its scratch on the CPU is not known and not counted"))
            else:
                op = replace(op, scratch=found)
        operations.append(op)
    program = program.with_operations(tuple(operations))
    return replace(program, notes=(*program.notes, *unknown)) if unknown else program


def scratch_of(op: Extern, config: Config) -> int | None:
    """Bytes that are alive at once within a call beside its operands and results, as heard before or now; None where
    there is no room to run it, or nothing may be computed."""
    names = [n for n, _ in op.kwargs]
    arguments = [plain(op.args), names, plain(tuple(a for _, a in op.kwargs))]
    results = [None if v is None else [list(v.sizes), list(v.strides)] for v in op.results]
    about = json.dumps([op.target, arguments, results, *_around()], separators=(",", ":"))
    with _lock:
        if about not in _known:
            key = cache_key("cpu scratch", _VERSION, torch.__version__, cpu_identity(), about)
            found = stored(key, config)
            if not isinstance(found, int) or found < 0:
                found = _measured(op, config)
                if found is None:
                    return None
                keep(key, found, f"what {op.target} needs on this CPU", config)
            _known[about] = found
        return _known[about]


def _around() -> tuple[str, ...]:
    """What decides scratch beside the call."""
    mkldnn = (torch._C._get_mkldnn_enabled(), torch._C._get_mkldnn_deterministic(), torch._C._get_nnpack_enabled())
    precision = [torch._C._get_fp32_precision_getter("mkldnn", name) for name in ("conv", "matmul")]
    return (str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability(), *map(str, (*mkldnn, *precision)))


def _measured(op: Extern, config: Config) -> int | None:
    """Run the call on buffers of its own and listen; None where plans alone are wanted or there is no room."""
    views = [v for v in (*op.args, *(a for _, a in op.kwargs), *op.results) if isinstance(v, View)]
    free = _free_memory()
    if config.plan_only or 2 * sum(map(nbytes, views)) + _ALLOWANCE > free:
        log.info("%s (%s) is not run: plans alone are wanted, or %d free bytes are too few", op.target, op.name, free)
        return None
    found: list[int | RuntimeError] = []

    def listen() -> None:
        try:
            found.append(_listen(op))
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


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _listen(op: Extern) -> int:
    """What the call has alive at its peak beside its results, the second time it runs."""
    call, device = resolve(op.target), torch.device("cpu")
    assert call is not None
    args, kwargs = [sample(a, device) for a in op.args], {n: sample(a, device) for n, a in op.kwargs}
    if op.contract is Contract.OUT:
        names = [a.name for a in call._schema.arguments if a.is_out]
        kwargs |= {n: sample(v, device) for n, v in zip(names, op.results, strict=True) if v is not None}
    config = ProfilerConfig(
        ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    with torch.no_grad():
        call(*args, **kwargs)
        _enable_profiler_legacy(config)
        try:
            results = call(*args, **kwargs)
        finally:
            records = _disable_profiler_legacy()
    moves = [r.cpu_memory_usage() for thread in records for r in thread if r.kind() == "memory_alloc"]  # type: ignore[comparison-overlap]  # the stub says int
    live = peak = 0
    for move in moves:
        live += move
        peak = max(peak, live)
    if op.contract is Contract.OUT:
        return peak
    flat = results if isinstance(results, tuple) else (results,)
    storages = [r.untyped_storage() for r in flat if isinstance(r, torch.Tensor)]
    return max(0, peak - sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
