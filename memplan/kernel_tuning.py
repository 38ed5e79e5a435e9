"""Block sizes of ordinary kernels chosen by timing, with ``max_autotune``: runs the tuning block of a program.

The block (`memplan.codegen.tuning_block`) is printed from the same lines as the wrapper. Here is what it calls: the
arena that it runs on, made for it and freed after it, and the choice. A kernel's first configuration stays unless
another is shown to be faster; what was found is kept in the cache for each device and version.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .codegen.triton_kernel import TritonKernel
from .codegen.tuning_block import TuningBlock, print_tuning
from .codegen.wrapper_lines import WrapperProgram
from .ir.canonical import CanonicalKernel
from .ir.config import Config
from .ir.errors import CacheError
from .ir.program import evaluate
from .runtime.cache import Cache, cache_key
from .runtime.device_times import device_times
from .runtime.triton_build import Build, Compiled, Target, compile_builds
from .runtime.triton_launch import make_launcher

_log = logging.getLogger("memplan.triton")
#: version of what is kept in the cache; a change of the configurations' meaning or of the measurement is a new one
_VERSION = 1
#: another configuration is taken if its time is at most this part of the first one's: less may be noise
_MARGIN = 0.97
#: bytes that a measurement may take above what the program itself needs
ALLOWANCE = 32 << 20

#: Chooses among configurations of kernels by name: their position, 0 where nothing is said.
Choices = Mapping[str, int]
#: Microseconds of each of several runs.
Timer = Callable[[Sequence[Callable[[], None]]], list[float]]


def tuning_wanted(config: Config) -> bool:
    """Whether anything is timed: every rank would do it for itself, and ranks have to run the same."""
    wanted = config.max_autotune and not config.plan_only and torch.cuda.is_available()
    if wanted and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() == 1
    return wanted


def tuned(
    lines: WrapperProgram,
    kernels: Mapping[str, CanonicalKernel],
    emitted: Mapping[str, TritonKernel],
    config: Config,
    on_block: Callable[[str], None] = lambda source: None,
) -> Choices:
    """Which configuration each kernel is to be built in, by name.

    Parameters
    ----------
    lines:
        The wrapper's.
    kernels, emitted:
        By the name that a launch calls them by.
    on_block:
        Is shown the tuning block's text.
    """
    plan = lines.plan
    store = Cache(config.cache_dir) if config.cache_dir else Cache()
    several = {n: k for n, k in emitted.items() if n in kernels and len(k.configs) > 1}
    keys = {n: _cache_key(kernels[n], emitted[n], lines, config) for n in several}
    kept = {n: json.loads(data)["number"] for n, key in keys.items() if (data := store.get_bytes(key)) is not None}
    missing = {n: k for n, k in several.items() if n not in kept}
    if not missing:
        return kept
    limit = max(plan.timeline, default=0) + ALLOWANCE
    block = print_tuning(lines, {n: kernels[n] for n in missing}, emitted, limit)
    on_block(block.source)
    bench = Bench({n: emitted[n] for n in block.kernels})
    with torch.no_grad(), _disable_current_modes():
        run_block(block, bench)
    for name, chosen in bench.chosen.items():
        keep(store, keys[name], json.dumps({"number": chosen.number, "times": chosen.times}).encode())
    return {**kept, **{n: c.number for n, c in bench.chosen.items()}}


def keep(store: Cache, key: str, data: bytes) -> None:
    """Put a measurement into the cache; without one it is made again next time."""
    try:
        store.put(key, data)
    except CacheError as error:
        _log.warning("a measurement is not kept: %s", error)


def run_block(block: TuningBlock, bench: Bench) -> None:
    """Run the block's text; its arena is freed afterwards, whatever happens."""
    names: dict[str, object] = {}
    exec(compile(block.source, "<memplan tuning>", "exec"), names)
    tune = names["tune"]
    assert callable(tune)
    try:
        tune(bench)
    except torch.OutOfMemoryError as error:
        _log.warning("kernels that are not timed yet keep their first configuration: %s", str(error).splitlines()[0])
    finally:
        bench.release()


def _cache_key(kernel: CanonicalKernel, emitted: TritonKernel, lines: WrapperProgram, config: Config) -> str:
    import triton

    hints = lines.plan.program.hints
    sizes = [(s.name, evaluate(s, hints)) for s in emitted.symbols]
    device = torch.cuda.get_device_name()
    versions = (str(torch.__version__), str(triton.__version__), str(torch.version.cuda), str(_VERSION))
    what = (kernel.kernel, kernel.offsets, sizes, emitted.configs, config.early_launch)
    return cache_key("kernel tuning", device, *versions, repr(what))


@dataclass(frozen=True)
class Chosen:
    """The configuration of a kernel, and the microseconds of all (infinite where one does not build or run)."""

    number: int
    times: tuple[float, ...]


@dataclass
class Bench:
    """What a tuning block calls.

    Attributes
    ----------
    kernels:
        By name; all configurations are built at the first one that is timed, in parallel.
    timer:
        Times runs.
    """

    kernels: Mapping[str, TritonKernel]
    timer: Timer = device_times
    chosen: dict[str, Chosen] = field(default_factory=dict)
    arena: torch.Tensor | None = None
    index: int = 0
    generator: torch.Generator | None = None
    built: dict[Build, Compiled] = field(default_factory=dict)

    def reserve(self, device: str, nbytes: int) -> None:
        """The bytes that the following buffers lie in."""
        self.release()
        self.arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.index = int(device.partition(":")[2] or 0)
        self.generator = torch.Generator(device).manual_seed(0)

    def release(self) -> None:
        """Give the bytes back, to the device too."""
        if self.arena is not None and self.arena.is_cuda:
            torch.cuda.synchronize(self.arena.device)
            self.arena = None
            torch.cuda.empty_cache()
        self.arena = None

    def buffer(self, offset: int, nbytes: int, dtype: str, below: int = 0) -> torch.Tensor:
        """A buffer in the arena: random numbers, zeros where they are no floats, indices from 0 to ``below``."""
        assert self.arena is not None
        kind: torch.dtype = getattr(torch, dtype)
        whole = self.arena[offset : offset + nbytes // kind.itemsize * kind.itemsize].view(kind)
        if kind.is_floating_point and kind.itemsize > 1:
            return whole.normal_(generator=self.generator)
        if below:
            return whole.random_(0, min(below, torch.iinfo(kind).max), generator=self.generator)
        self.arena[offset : offset + nbytes].zero_()
        return whole

    def choose(
        self,
        name: str,
        buffers: Sequence[torch.Tensor],
        offsets: Sequence[int] = (),
        sizes: Mapping[str, int] | None = None,
        restored: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """Time a kernel in each of its configurations.

        Parameters
        ----------
        buffers, offsets, sizes:
            Its arguments, in their order.
        restored:
            Buffers that it reads and changes, and room for a copy: every run starts from the same values.
        """
        kernel = self.kernels[name]
        assert self.arena is not None
        self._build()
        on_gpu = torch.cuda.device(self.arena.device) if self.arena.is_cuda else nullcontext()
        stream = _current_stream if self.arena.is_cuda else _no_stream
        pairs = zip(buffers, offsets or (0,) * len(buffers), strict=True)
        arguments = [b.data_ptr() + o for b, o in pairs] + list((sizes or {}).values())
        saved = [(changed.view(torch.uint8), room[: changed.nbytes]) for changed, room in restored]
        for changed, room in saved:
            room.copy_(changed)
        runs: list[Callable[[], None]] = []
        numbers: list[int] = []
        for number, config in enumerate(kernel.configs):
            found = self.built.get(Build.of(kernel, config))
            if found is None or found.scratch_bytes:
                continue
            runs.append(_run(make_launcher(kernel, found, self.index), stream, arguments, saved))
            numbers.append(number)
        if not numbers or numbers[0] != 0:
            return  # the first one does not build: whoever builds the kernels says so
        with on_gpu:
            times = self.timer(runs)
            best = min(range(len(times)), key=times.__getitem__)
            if best and times[best] <= _MARGIN * times[0]:
                # once more by themselves: the least of several is flattered by noise
                first, again = self.timer([runs[0], runs[best]])
                best = best if again <= _MARGIN * first else 0
            else:
                best = 0
        all_times = tuple(times[numbers.index(k)] if k in numbers else float("inf") for k in range(len(kernel.configs)))
        self.chosen[name] = Chosen(numbers[best], all_times)
        _log.info("%s: configuration %d of %s us", name, numbers[best], [round(t, 1) for t in all_times])

    def _build(self) -> None:
        """All configurations of all kernels; those that do not build are left out."""
        if self.built or not self.kernels:
            return
        builds = [Build.of(k, c) for k in self.kernels.values() for c in k.configs]
        for build, found in zip(builds, compile_builds(builds, Target.current()), strict=True):
            if isinstance(found, Compiled):
                self.built[build] = found


def _run(
    launch: Callable[..., None],
    stream: Callable[[], int],
    arguments: Sequence[int],
    saved: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], None]:
    def run() -> None:
        for changed, room in saved:
            changed.copy_(room)
        launch(stream(), *arguments)

    return run


def _current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _no_stream() -> int:
    return 0


__all__ = ["Bench", "Choices", "Chosen", "run_block", "tuned", "tuning_wanted"]
