"""Which products become templates: measured on the device, against the ATen call with the kernel after it.

With ``max_autotune`` every candidate is timed once for each device and version; what was found is kept in the cache
and is from then on an input of the plan like any other. The ATen call stays unless a template is shown to be faster.
Without ``max_autotune`` nothing is measured and no product becomes a template.

The buffers of a measurement are made for it and freed after it, workspaces included, which all contenders share; what
would need more than the program itself is left to ATen. Times are those of the device: each contender is recorded as a
CUDA graph of several runs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .codegen.triton_kernel import TritonKernel, emit_triton
from .codegen.triton_product import emit_launches
from .ir.canonical import canonicalize, hoist_offsets
from .ir.config import Config
from .ir.early_launch import EarlyLaunch, early_template
from .ir.errors import CompilerError, LoweringError
from .ir.program import Program, View, evaluate
from .ir.template import Method, Product, ProductConfig, Workspace, canonical_product
from .ir.verify_access import in_place_hazard
from .kernel_tuning import keep, tuning_wanted
from .lowering.lower import Kept
from .passes.templates import Candidate, Choose, least_peak
from .runtime.cache import Cache, cache_key
from .runtime.device_times import device_times
from .runtime.python_runtime import find_operator, reinterpret_as
from .runtime.triton_build import Build, Compiled, Target, compile_builds
from .runtime.triton_launch import make_launcher

_log = logging.getLogger("memplan.triton")
#: version of what is kept in the cache; a change of the templates or of the measurement is a new one
_VERSION = 4
#: a template is taken if its time is at most this part of ATen's: less may be noise
_MARGIN = 0.97
#: bytes that a measurement may take above what the program itself needs; the library's own workspace (32 MiB on an
#: H100, which a program of templates alone does without) and the comparison's slices come on top, in all within 64 MiB
ALLOWANCE = 24 << 20


@dataclass(frozen=True)
class Measured:
    """Microseconds of the ATen call with its kernel, and of the best template; ``config`` None where ATen stays."""

    config: ProductConfig | None
    aten: float
    best: float
    fastest: ProductConfig | None = None
    skipped: str = ""  # why nothing was measured, or what was found wrong
    kept: bool = True  # False where it says nothing of another program with this product


def chooser(config: Config, kept: Kept) -> Choose:
    """What the pass `templates` asks: measurements where they are wanted and possible, else no template at all."""
    if not tuning_wanted(config) or not config.enabled("templates") or "cuda" in kept.devices:
        return lambda candidates, program: {}
    return partial(measured_choices, config=config)


def measured_choices(
    candidates: Sequence[Candidate], program: Program, config: Config
) -> Mapping[Product, ProductConfig]:
    """The configurations of those candidates that are faster than ATen; measured now where the cache has nothing."""
    store = Cache(config.cache_dir) if config.cache_dir else Cache()
    early = early_template(config.early_launch, Target.current().arch)
    distinct = {c.key: c for c in candidates}
    found: dict[Product, ProductConfig] = {}
    missing: dict[Product, Candidate] = {}
    for key, candidate in distinct.items():
        data = store.get_bytes(_cache_key(key, early))
        if data is None:
            missing[key] = candidate
        elif (chosen := decode(data)) is not None:
            found[key] = chosen
    for key, measured in _without_modes(missing, program, early).items():
        if measured.kept:
            keep(store, _cache_key(key, early), encode(measured))
        if measured.config is not None:
            found[key] = measured.config
    return found


def _without_modes(
    missing: Mapping[Product, Candidate], program: Program, early: EarlyLaunch
) -> dict[Product, Measured]:
    """`measure_all` outside of what traces: real tensors are made, on the candidates' own device."""
    out: dict[Product, Measured] = {}
    with torch.no_grad(), _disable_current_modes():
        for device in sorted({c.call.device for c in missing.values()}):
            with torch.cuda.device(device):
                here = {k: c for k, c in missing.items() if c.call.device == device}
                out.update(measure_all(here, program, early=early))
                torch.cuda.empty_cache()  # the buffers of measurements are not to stay reserved
    return out


def _cache_key(key: Product, early: EarlyLaunch) -> str:
    import triton

    device = torch.cuda.get_device_name()
    versions = (str(torch.__version__), str(triton.__version__), str(torch.version.cuda), str(_VERSION))
    return cache_key("template", device, *versions, repr((key, early.value)))


def encode(measured: Measured) -> bytes:
    """A measurement as the cache keeps it."""
    config = None if measured.config is None else {**asdict(measured.config), "method": measured.config.method.value}
    return json.dumps({"config": config, "aten": measured.aten, "best": measured.best}).encode()


def decode(data: bytes) -> ProductConfig | None:
    """The configuration in a kept measurement; None where ATen is to stay."""
    config = json.loads(data)["config"]
    return None if config is None else ProductConfig(**{**config, "method": Method(config["method"])})


#: rows, columns and terms of a tile, warps, stages; tuned for one instance a tile
_TILES = (
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4), (128, 128, 64, 4, 3), (32, 64, 128, 4, 4), (64, 32, 128, 4, 4), (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 3), (32, 32, 128, 4, 4), (64, 256, 64, 8, 3),
    (128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 3), (32, 32, 32, 4, 3),
    (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (32, 64, 128, 4, 6), (64, 64, 128, 4, 4),
    (16, 64, 256, 4, 3), (64, 32, 128, 4, 6),
)  # fmt: skip
#: the fastest of a wide grid for long sums (`benchmarks.template_sweep` on an H100), for parts of tiles only
_SPLIT_TILES = (
    (16, 32, 64, 4, 5), (16, 32, 128, 4, 3), (16, 64, 64, 4, 5), (16, 128, 64, 4, 6), (16, 128, 128, 4, 5),
    (32, 32, 64, 4, 3), (32, 32, 128, 4, 5), (32, 64, 128, 4, 5), (32, 64, 256, 4, 3), (32, 128, 128, 4, 3),
    (64, 64, 64, 4, 6), (64, 64, 64, 8, 3), (64, 64, 128, 8, 4), (64, 64, 256, 4, 3), (128, 32, 64, 8, 5),
    (128, 32, 64, 4, 4),
)  # fmt: skip


#: with fewer parts the last instance of a tile adds them up as fast as a second launch does
_STAGED_PARTS = 8


def contenders(product: Product, processors: int) -> list[ProductConfig]:
    """Configurations worth timing for a product of this shape on a GPU with so many multiprocessors."""
    _, rows, columns, inner = product.sizes
    high, wide = (max(16, 1 << (n - 1).bit_length()) for n in (rows, columns))
    found: list[ProductConfig] = []
    for bm, bn, bk, warps, stages in (*_TILES, *_SPLIT_TILES):
        whole = (bm, bn, bk, warps, stages) in _TILES
        if bm > high or bn > wide or bk > max(16, 1 << (inner - 1).bit_length()):
            continue
        if bk < 64 and inner > 256:
            continue  # short steps are for short sums
        if bm * 4 < min(high, 128) or bn * 4 < min(wide, 128):
            continue  # far smaller than the matrix: others are at least as good
        plain = ProductConfig(bm, bn, bk, warps=warps, stages=stages)
        sized = replace(product, config=plain)
        waves = sized.tiles / processors
        if whole:
            found.append(plain)
        found += _splits(sized, processors)
        uneven = math.ceil(waves) / waves
        large = whole and bm * bn >= 64 * 128
        if large and 0.5 < waves < 6 and uneven > 1.1 and sized.tiles * sized.steps >= 4 * processors:
            found.append(replace(plain, method=Method.STREAM, parts=processors))
    return found


def _splits(sized: Product, processors: int) -> list[ProductConfig]:
    """As many parts as fill the GPU once and twice, and a few less, of a product with fewer tiles than that."""
    once, twice = processors // sized.tiles, 2 * processors // sized.tiles
    if not once:
        return []
    counts = {n // 8 * 8 if n > 16 else n for n in (*([once * 3 // 4] if once < 12 else []), once, twice)}
    found = []
    for parts in sorted(counts):
        if not 2 <= parts <= 64 or sized.steps < 2 * parts:
            continue
        # what has many parts and adds them up at once waits for its last instance
        bunches = [1] if parts < 12 else [b for b in (4, 8) if parts % b == 0 and b * b <= 2 * parts <= 4 * b * b]
        found += [replace(sized.config, method=Method.SPLIT, parts=parts, bunch=b) for b in bunches or [1]]
        if _STAGED_PARTS <= parts <= once:  # in two launches as many as fill it once
            found.append(replace(sized.config, method=Method.STAGED, parts=parts, slice=slice_of(sized, processors)))
    return found


def slice_of(sized: Product, processors: int) -> int:
    """Rows of a tile for an instance of a second launch that is to fill the GPU, with 64 elements of it at least."""
    _, rows, columns, _ = sized.sizes
    share = max(64, 1 << max(1, rows * columns // processors).bit_length() - 1)
    return min(sized.config.rows, max(1, share // sized.config.columns))


def measure_all(
    missing: Mapping[Product, Candidate],
    program: Program,
    limit: int | None = None,
    *,
    early: EarlyLaunch = EarlyLaunch.NEVER,
) -> dict[Product, Measured]:
    """Each candidate measured; all that is to be timed is built first, in parallel.

    ``limit``: most bytes that one measurement may take; None for what the program itself needs, and `ALLOWANCE`.
    ``early``: what our kernels do about those around them.
    """
    if not missing:
        return {}
    limit = least_peak(missing.values(), program) + ALLOWANCE if limit is None else limit
    out: dict[Product, Measured] = {}
    kernels: dict[Product, list[tuple[ProductConfig, tuple[TritonKernel, ...]]]] = {}
    for key, candidate in missing.items():
        needed = held_bytes(candidate, program)
        if needed <= limit:
            kernels[key] = _emitted(key, limit - needed, early)
            continue
        reason = f"it would take {needed} bytes to time it, of {limit}"
        _log.info("%s stays ATen's call: %s", candidate.call.name, reason)
        out[key] = Measured(None, 0.0, math.inf, skipped=reason, kept=False)
    made = iter(launches([ks for contending in kernels.values() for _, ks in contending]))
    for key, contending in kernels.items():
        usable = [(config, launch) for config, _ in contending if (launch := next(made)) is not None]
        if usable:
            out[key] = measure(missing[key], program, usable, early)
        else:
            _log.info("%s stays ATen's call: no template fits or builds", missing[key].call.name)
            out[key] = Measured(None, 0.0, math.inf, skipped="no template fits or builds")
    return out


def launches(products: Sequence[tuple[TritonKernel, ...]]) -> list[Callable[..., None] | None]:
    """For the kernels of each product what launches them one after the other; all are built first, in parallel.

    None where one does not build, or needs scratch memory.
    """
    builds = [Build.of(k, k.configs[0]) for kernels in products for k in kernels]
    built = dict(zip(builds, compile_builds(builds, Target.current()), strict=True))
    return [_launch(kernels, [built[Build.of(k, k.configs[0])] for k in kernels]) for kernels in products]


def _launch(kernels: Sequence[TritonKernel], built: Sequence[Compiled | CompilerError]) -> Callable[..., None] | None:
    launchers = []
    for kernel, found in zip(kernels, built, strict=True):
        if isinstance(found, CompilerError) or found.scratch_bytes:
            _log.info("no template: %s", found if isinstance(found, CompilerError) else "it needs scratch memory")
            return None
        launchers.append(make_launcher(kernel, found))

    def launch(stream: int, *arguments: int) -> None:
        for launcher in launchers:
            launcher(stream, *arguments)

    return launch


def _emitted(key: Product, room: int, early: EarlyLaunch) -> list[tuple[ProductConfig, tuple[TritonKernel, ...]]]:
    """What contends for a product, as text; ``room``: most bytes for workspaces."""
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    found = []
    for config in contenders(key, processors):
        sized = replace(key, config=config)
        if sum(w.count for w in sized.workspaces()) > room:
            continue
        try:
            found.append((config, emit_launches(sized, name="product", early=early)))
        except LoweringError as error:
            _log.info("no template: %s", error)
            break
    return found


def held_bytes(candidate: Candidate, program: Program) -> int:
    """Bytes of the buffers of a measurement, without the templates' workspaces."""
    names = set(_buffers(candidate)) - set(reused(candidate, program))
    return sum(program.nbytes(n) for n in names)


def _buffers(candidate: Candidate) -> list[str]:
    call, kernel = candidate.call, candidate.kernel
    return list(
        dict.fromkeys([*call.reads, *call.writes, *(() if kernel is None else (*kernel.reads, *kernel.writes))])
    )


def reused(candidate: Candidate, program: Program) -> dict[str, str]:
    """{what the kernel after the product writes: the product}, where it writes in its place, as it does in the plan."""
    result = candidate.call.results[0]
    if candidate.kernel is None or result is None or result.buffer in candidate.product.epilogue.written_buffers:
        return {}
    kernel, old = candidate.kernel.kernel, result.buffer
    for new in kernel.written_buffers:
        if program.nbytes(new) == program.nbytes(old) and not in_place_hazard(kernel, old, new):
            return {new: old}
    return {}


def measure(
    candidate: Candidate,
    program: Program,
    usable: Sequence[tuple[ProductConfig, Callable[..., None]]],
    early: EarlyLaunch = EarlyLaunch.NEVER,
) -> Measured:
    """Time ATen with its kernel and every template on the same buffers, which are freed afterwards.

    A template is taken only if what it computes is what ATen with its kernel does (`_Held.difference`).
    """
    held = _Held(candidate, program, early)
    runs: list[Callable[[], None]] = [held.aten()]
    configs: list[ProductConfig] = []
    for config, launch in usable:
        runs.append(held.template(config, launch))
        configs.append(config)
    times = device_times(runs)
    best = min(range(len(configs)), key=lambda k: times[k + 1])
    aten, fastest = times[0], times[best + 1]
    if fastest <= _MARGIN * aten:
        # once more by themselves: the least of many is flattered by noise
        aten, fastest = device_times([runs[0], runs[best + 1]])
    if fastest > _MARGIN * aten:
        return Measured(None, aten, fastest, configs[best])
    wrong = held.difference(runs[0], runs[best + 1])
    if wrong:
        _log.warning("%s stays ATen's call: the template's %s (%s)", candidate.call.name, wrong, configs[best])
    return Measured(None if wrong else configs[best], aten, fastest, configs[best], skipped=wrong)


def compare(candidate: Candidate, program: Program) -> str:
    """Empty, or how the template of the candidate's configuration differs from ATen with its kernel."""
    config = candidate.product.config
    key = canonical_product(candidate.product).product
    (launch,) = launches([emit_launches(key, name="product")])
    if launch is None:
        return "it does not build"
    held = _Held(candidate, program)
    return held.difference(held.aten(), held.template(config, launch))


#: elements that are compared at once
_SLICE = 1 << 18
#: how far a result may be from ATen's: this part of the mean, and so many units in the last place
_OF_MEAN, _LAST_PLACES = 0.1, 2.0
#: part of truth values and integers that may differ, where what they were decided by was rounded
_OTHER_DECISIONS = 1e-3


def beyond_rounding(found: torch.Tensor, wanted: torch.Tensor, mean: float, half: torch.dtype) -> float:
    """The largest difference as a part of what rounding explains; above 1 (or NaN) it is a wrong answer.

    ATen rounds the product to ``half`` before the kernel after it reads it, a template does not: the results are a
    unit in the last place apart now and then, which for the largest of millions is much more than a part of the mean
    (SwiGLU: 4.0 at 580, 0.28 of a mean of 14.4, where the template is the nearer to the exact result).
    """
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if not found.dtype.is_floating_point:
        return float((~same).float().mean()) / _OTHER_DECISIONS
    a, b = found.float(), wanted.float()
    allowed = _OF_MEAN * mean + _LAST_PLACES * torch.finfo(half).eps * b.abs() + 1e-7
    return float(torch.where(same, 0.0, (a - b).abs() / allowed).max())


class _Held:
    """The buffers of one measurement: random numbers, and zeros where they may be indices.

    Contenders run one after another, and what a workspace holds before a run means nothing, but for counters, which
    each has for itself: one that left them other than zero would spoil the next.
    """

    def __init__(self, candidate: Candidate, program: Program, early: EarlyLaunch = EarlyLaunch.NEVER) -> None:
        self.candidate, self.program, self.early = candidate, program, early
        self.tensors: dict[str, torch.Tensor] = {}
        call = candidate.call
        generator = torch.Generator(call.device).manual_seed(0)
        taken = reused(candidate, program)
        for name in _buffers(candidate):
            b = program.buffers[name]
            if name in taken:
                continue
            count = -(-program.nbytes(name) // b.dtype.itemsize)
            random = b.dtype.is_floating_point and b.dtype.itemsize > 1
            made = torch.zeros(count, dtype=b.dtype, device=call.device)
            self.tensors[name] = made.normal_(generator=generator) if random else made
        for new, old in taken.items():
            self.tensors[new] = self.tensors[old].view(program.buffers[new].dtype)
        self.scratch: dict[str, torch.Tensor] = {}  # workspaces by role, as large as the largest contender's
        self.epilogue = self._epilogue()

    def _epilogue(self) -> Callable[[], None] | None:
        kernel = self.candidate.kernel
        if kernel is None:
            return None
        canonical = hoist_offsets(canonicalize(kernel.kernel))
        emitted = emit_triton(canonical, name="epilogue", hints=self.program.hints, early=self.early)
        built = compile_builds([Build.of(emitted, emitted.configs[0])], Target.current())[0]
        if isinstance(built, CompilerError):
            raise built
        launch = make_launcher(emitted, built)
        offsets = canonical.offsets or (0,) * len(canonical.buffers)
        addresses = [self.tensors[b].data_ptr() + o for b, o in zip(canonical.buffers, offsets, strict=True)]
        sizes = [self.program.hints[s] for s in canonical.symbols]
        return lambda: launch(_stream(), *addresses, *sizes)

    def aten(self) -> Callable[[], None]:
        call = self.candidate.call
        operator = find_operator(call.target, {})
        args = [self.view(a) if isinstance(a, View) else a for a in call.args]
        result = call.results[0]
        assert result is not None
        out, epilogue = self.view(result), self.epilogue

        def run() -> None:
            operator(*args, out=out)
            if epilogue is not None:
                epilogue()

        return run

    def difference(self, aten: Callable[[], None], template: Callable[[], None]) -> str:
        """Empty, or which result of the template is wrong, and by how much.

        ATen's results wait in the host's memory, and come back slice by slice, so that nothing is held twice here.
        """
        half = self.candidate.product.a.dtype
        aten()
        wanted = {n: self.tensors[n].cpu() for n in dict.fromkeys(self.candidate.product.epilogue.written_buffers)}
        for n in wanted:
            self.tensors[n].fill_(math.nan if self.tensors[n].dtype.is_floating_point else 0)
        for _ in range(3):  # the counters must be zero again for the second
            template()
        for n, tensor in wanted.items():
            device = self.tensors[n].device
            pairs = list(zip(torch.split(self.tensors[n], _SLICE), torch.split(tensor, _SLICE), strict=True))
            mean = sum(float(b.to(device).float().abs().nansum()) for _, b in pairs) / max(1, tensor.numel())
            for a, b in pairs:
                worst = beyond_rounding(a, b.to(device), mean, half)
                if not worst <= 1:  # NaN as well
                    return f"{n} differs by {worst:.3g} times what rounding explains"
        return ""

    def view(self, view: View) -> torch.Tensor:
        hints = self.program.hints
        sizes, strides = ([evaluate(s, hints) for s in values] for values in (view.sizes, view.strides))
        offset = evaluate(view.offset, hints) * view.dtype.itemsize
        return reinterpret_as(self.tensors[view.buffer], view.dtype, sizes, strides, offset)

    def template(self, config: ProductConfig, launcher: Callable[..., None]) -> Callable[[], None]:
        canonical = canonical_product(replace(self.candidate.product, config=config))
        pairs = zip(canonical.buffers, canonical.offsets, strict=True)
        addresses = [self.tensors[b].data_ptr() + o for b, o in pairs]
        made_for = canonical.product.workspaces()
        own = {w.role: self._space(w) for w in made_for if w.zero_fill}
        for w in made_for:
            if not w.zero_fill and (w.role not in self.scratch or self.scratch[w.role].nbytes < w.count):
                self.scratch.pop(w.role, None)  # given back before more is asked for
                self.scratch[w.role] = self._space(w)

        def run() -> None:
            made = ((own if w.zero_fill else self.scratch)[w.role] for w in made_for)
            launcher(_stream(), *addresses, *(space.data_ptr() for space in made))

        return run

    def _space(self, workspace: Workspace) -> torch.Tensor:
        make = torch.zeros if workspace.zero_fill else torch.empty
        return make(workspace.count, dtype=torch.uint8, device=self.candidate.call.device)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


__all__ = ["Measured", "chooser", "compare", "contenders", "decode", "encode", "measure_all", "measured_choices"]
