"""The figures of a device: stored ones, else those of known devices; and how they are measured, once per device.

Measuring takes about a second and half a gigabyte of a GPU, and is done where it is asked for (`calibrate`, a budget
on a device that nothing is known of). Where several ranks make one plan together they use the
known figures: what one of them measured would give it another plan.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .ir.config import Config
from .ir.device import DEFAULTS, VERSION, DeviceFigures, default_figures, figures_from
from .ir.errors import CacheError
from .runtime.cache import Cache, cache_key

log = logging.getLogger(__name__)
_lock = threading.Lock()
_known: dict[tuple[str, str], DeviceFigures] = {}
_REPEATS, _MOST_REPEATS, _SECONDS = 5, 50, 0.2


def figures_for(device: str, config: Config, *, measure: bool = False) -> DeviceFigures:
    """The figures of ``"cpu"``, ``"cuda:0"``.

    Parameters
    ----------
    measure:
        Measure them if they are not stored and the device is not one of `memplan.ir.device.DEFAULTS` (a CPU is each
        time another).
    """
    if config.target is not None and device.startswith("cuda"):
        return default_figures(config.target)
    name = name_of(device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return default_figures(name)
    with _lock:
        key = (name, str(config.cache_dir))
        if key not in _known:
            stored = _stored(name, config)
            if stored is None and measure and not any(n in name for n in DEFAULTS if n != "cpu"):
                stored = _measured(device, config)
            if stored is None:
                return default_figures(name)
            _known[key] = stored
        return _known[key]


def copy_figures(device: str, config: Config) -> DeviceFigures:
    """`figures_for`, with the bandwidth of copies to pinned memory of the host as measured here, once, and stored.

    It depends on the machine more than on the device. Where nothing can be measured (no GPU; several ranks plan
    together) the known figure holds; what stands for a GPU on a CPU copies at half its memory's bandwidth.
    """
    figures = figures_for(device, config)
    gpu = device.startswith("cuda")
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not gpu or not torch.cuda.is_available() or together or config.target is not None:
        return figures if figures.host_bandwidth > 0 else replace(figures, host_bandwidth=figures.bandwidth / 2)
    name = f"{name_of(device)} {os.uname().nodename}"
    with _lock:
        key = (f"host {name}", str(config.cache_dir))
        if key not in _bandwidths:
            stored = _stored_bandwidth(name, config)
            _bandwidths[key] = stored or _measured_bandwidth(device, name, config)
        return replace(figures, host_bandwidth=_bandwidths[key])


_bandwidths: dict[tuple[str, str], float] = {}


def _bandwidth_key(name: str) -> str:
    return cache_key("bandwidth to pinned memory", VERSION, name)


def _stored_bandwidth(name: str, config: Config) -> float | None:
    data = _store(config).get_bytes(_bandwidth_key(name))
    try:
        found = float(data) if data is not None else 0.0
    except ValueError:
        return None
    return found if 0 < found < float("inf") else None


def _measured_bandwidth(device: str, name: str, config: Config) -> float:
    """Bytes per microsecond of the slower of the two directions."""
    # (a budget is searched while AOTAutograd traces with fake tensors, whose copies take no time)
    with unset_fake_temporarily(), torch.no_grad(), torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        on_device = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
        on_host = torch.zeros(1 << 26, dtype=torch.uint8, pin_memory=True)
        out = partial(on_host.copy_, on_device, non_blocking=True)
        back = partial(on_device.copy_, on_host, non_blocking=True)
        found = min(on_host.numel() / _seconds(run, device) / 1e6 for run in (out, back))
    try:
        _store(config).put(_bandwidth_key(name), repr(found).encode(), suffix=".txt")
    except CacheError as error:
        log.warning("the host bandwidth of %s cannot be stored, and will be measured again: %s", name, error)
    log.info("measured %s: %.1f GB/s to and from pinned memory", name, found / 1e3)
    return found


def calibrate(device: str, config: Config) -> DeviceFigures:
    """Measure a device's figures and store them for every later compilation."""
    with _lock:
        found = _measured(device, config)
        _known[name_of(device), str(config.cache_dir)] = found
    return found


def name_of(device: str) -> str:
    """The name by which a device's figures are stored."""
    if not device.startswith("cuda"):
        return "cpu"
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cuda"


def _key(name: str) -> str:
    return cache_key("device figures", VERSION, name, torch.get_num_threads() if name == "cpu" else 0)


def _store(config: Config) -> Cache:
    return Cache(config.cache_dir) if config.cache_dir else Cache()


def _stored(name: str, config: Config) -> DeviceFigures | None:
    data = _store(config).get_bytes(_key(name))
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError:
        return None
    return figures_from(content) if isinstance(content, dict) else None


def _measured(device: str, config: Config) -> DeviceFigures:
    name = name_of(device)
    found = measure_figures(device, default_figures(name))
    try:
        _store(config).put(_key(name), json.dumps(found.as_dict()).encode(), suffix=".json")
    except CacheError as error:
        log.warning("the figures of %s cannot be stored, and will be measured again: %s", name, error)
    log.info("measured %s: %s", name, found)
    return found


def measure_figures(device: str, like: DeviceFigures) -> DeviceFigures:
    """The figures as measured now; what is not measured is ``like``'s."""
    gpu = device.startswith("cuda")
    # in a pool of its own, whose memory goes back to the device and not to the allocator that the user watches
    pool = torch.cuda.use_mem_pool(torch.cuda.MemPool()) if gpu else nullcontext()
    with torch.no_grad(), pool:
        return replace(
            like,
            name=name_of(device),
            bandwidth=_bandwidth(device, 1 << 26 if gpu else 1 << 22),
            launch=_launch(device),
            half=_product_rate(device, torch.bfloat16, 4096 if gpu else 256),
            single=_product_rate(device, torch.float32, 2048 if gpu else 256),
            double=_product_rate(device, torch.float64, 2048 if gpu else 256),
        )


def _bandwidth(device: str, elements: int) -> float:
    """Bytes per microsecond of a pointwise kernel over tensors beyond the caches."""
    source = torch.zeros(elements, device=device)
    target = torch.zeros_like(source)
    return 8 * elements / _seconds(partial(torch.add, source, 1.0, out=target), device) / 1e6


def _launch(device: str) -> float:
    """Microseconds from one small kernel to the next."""
    small = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1.0)

    return _seconds(many, device) / _LAUNCHES * 1e6


def _product_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """Operations per microsecond of a square product."""
    x, y = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(partial(torch.mm, x, y, out=torch.empty_like(x)), device) / 1e6


_LAUNCHES = 50


def _seconds(run: Callable[[], object], device: str) -> float:
    """The least of some timed runs, after one that is not: what else the machine does only makes runs longer."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _REPEATS or (len(times) < _MOST_REPEATS and time.perf_counter() - started < _SECONDS):
        if device.startswith("cuda"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return max(min(times), 1e-9)
