"""A wide grid of template configurations for some shapes of `benchmarks.templates`: which ones contenders lack.

    python -m benchmarks.template_sweep [--only split-K] [--most 120] [--two] [--seconds 100]

For each shape: ATen's call with the kernel after it, and the ten fastest configurations of the grid, in microseconds
(medians, in turns). With ``--two`` splits are timed in two launches as well, the second of which adds the parts up on
all of the GPU. What is fastest is compared with ATen's answer. Needs one NVIDIA GPU; some twenty seconds a shape, most
of it building. ``--seconds`` starts no shape after so long. ``MEMPLAN_EARLY_LAUNCH`` is heeded.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.templates import SHAPES, Shape, candidate, policy
from memplan.codegen.triton_kernel import TritonKernel
from memplan.codegen.triton_product import emit_finish, emit_parts, emit_product
from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.template import Method, Product, ProductConfig
from memplan.runtime.device_times import device_times
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds
from memplan.runtime.triton_launch import Launcher, make_launcher
from memplan.template_tuning import _Held

_SHARED = 220 << 10
Entry = tuple[ProductConfig, TritonKernel]
Kernels = tuple[Launcher, Launcher]


def grid(product: Product, processors: int, most: int) -> list[ProductConfig]:
    """Configurations that fill the GPU one to three times over; at most so many, evenly picked."""
    _, rows, columns, _ = product.sizes
    high, wide = (max(16, 1 << (n - 1).bit_length()) for n in (rows, columns))
    found: list[ProductConfig] = []
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 5, 6))
    for bm, bn, bk, warps, stages in sizes:
        if bm > high or bn > wide or bm * 4 < min(high, 128) or (bm + bn) * bk * 2 * stages > _SHARED:
            continue
        if bm * bn < 64 * 64 and warps == 8:
            continue
        plain = ProductConfig(bm, bn, bk, warps=warps, stages=stages)
        sized = replace(product, config=plain)
        for waves in (1, 2, 3):
            parts = waves * processors // sized.tiles
            parts = parts // 8 * 8 if parts > 16 else parts
            if parts > 128 or parts < 1 or sized.steps < 2 * parts:
                continue
            if parts == 1:
                found.append(plain)
                continue
            split = replace(plain, method=Method.SPLIT, parts=parts)
            found += [split] if parts < 12 else [replace(split, bunch=b) for b in (4, 8) if parts % b == 0]
    distinct = list(dict.fromkeys(found))
    return distinct[:: -(-len(distinct) // most)] if distinct else []


def built(product: Product, entries: Sequence[Entry]) -> list[tuple[ProductConfig, TritonKernel, Compiled]]:
    builds = [Build.of(k, k.configs[0]) for _, k in entries]
    done = compile_builds(builds, Target.current())
    return [(c, k, b) for (c, k), b in zip(entries, done, strict=True) if isinstance(b, Compiled)]


def in_two(
    product: Product, entries: Sequence[Entry], processors: int, early: EarlyLaunch
) -> list[tuple[ProductConfig, Kernels]]:
    """The splits among them in two launches, built."""
    _, rows, columns, _ = product.sizes
    share = max(64, 1 << max(0, rows * columns // processors).bit_length() - 1)
    made = []
    for c in dict.fromkeys(replace(c, bunch=1) for c, _ in entries if c.method is Method.SPLIT):
        sized = replace(product, config=c)
        height = min(c.rows, max(1, share // c.columns))
        warps = max(1, min(4, height * c.columns // 128))
        finish = emit_finish(sized, name="finish", rows=height, warps=warps, early=early)
        made.append((c, emit_parts(sized, name="product", early=early), finish))
    builds = [Build.of(k, k.configs[0]) for _, *ks in made for k in ks]
    done = compile_builds(builds, Target.current())
    found: list[tuple[ProductConfig, Kernels]] = []
    for (c, first, last), a, b in zip(made, done[::2], done[1::2], strict=True):
        if isinstance(a, Compiled) and isinstance(b, Compiled):
            found.append((c, (make_launcher(first, a), make_launcher(last, b))))
    return found


def two_launches(held: _Held, config: ProductConfig, kernels: Kernels) -> Callable[[], None]:
    first, last = (held.template(config, k, spaces=("partials",)) for k in kernels)

    def run() -> None:
        first()
        last()

    return run


def sweep(shape: Shape, most: int, two: bool) -> None:
    begin = time.perf_counter()
    found, program = candidate(shape)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    key, early = found.key, policy()
    entries = [
        (c, emit_product(replace(key, config=c), name="product", early=early)) for c in grid(key, processors, most)
    ]
    usable = built(key, entries)
    held = _Held(found, program, early)

    def runs(of: Sequence[tuple[ProductConfig, TritonKernel, Compiled]]) -> list[Callable[[], None]]:
        return [held.aten(), *(held.template(c, make_launcher(k, b)) for c, k, b in of)]

    pairs = in_two(key, entries, processors, early) if two else []
    if pairs:
        both = [two_launches(held, c, ks) for c, ks in pairs]
        aten, *spent = device_times([held.aten(), *both])
        order = sorted(range(len(pairs)), key=spent.__getitem__)[:5]
        print(f"{shape.name} {shape.rows}x{shape.columns}x{shape.inner} in two launches: ATen {aten:.1f} us")
        for k in order:
            print(f"   {spent[k]:7.1f} {aten / spent[k]:6.3f}  {named(pairs[k][0])}")
        wrong = held.difference(held.aten(), both[order[0]])
        print(f"   fastest against ATen's answer: {wrong or 'right'}", flush=True)
    times = device_times(runs(usable))
    order = sorted(range(len(usable)), key=lambda k: times[k + 1])[:10]
    best = [usable[k] for k in order]
    again = runs(best)
    aten, *rest = device_times(again)
    name = f"{shape.name} {shape.rows}x{shape.columns}x{shape.inner} {shape.epilogue}"
    print(f"{name}: ATen {aten:.1f} us, {len(usable)} configurations, {time.perf_counter() - begin:.0f} s")
    for (c, *_), took in zip(best, rest, strict=True):
        print(f"   {took:7.1f} {aten / took:6.3f}  {named(c)}")
    least = min(range(len(rest)), key=rest.__getitem__)
    print(f"   fastest against ATen's answer: {held.difference(again[0], again[least + 1]) or 'right'}", flush=True)


def named(c: ProductConfig) -> str:
    parts = f"p{c.parts}" + (f"/{c.bunch}" if c.bunch > 1 else "")
    return f"{c.method.value} {c.rows}x{c.columns}x{c.inner} {parts} w{c.warps} s{c.stages}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="split-K", help="shapes whose name or epilogue contains this")
    parser.add_argument("--most", type=int, default=120, help="configurations for each shape")
    parser.add_argument("--two", action="store_true", help="splits in two launches as well")
    parser.add_argument("--skip", type=int, nargs="*", default=(), help="positions of shapes to leave out")
    parser.add_argument("--seconds", type=float, default=3600, help="start no shape after so long")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    begin = time.perf_counter()
    for k, shape in enumerate(s for s in SHAPES if given.only in f"{s.name} {s.epilogue}"):
        if k not in given.skip and time.perf_counter() - begin < given.seconds:
            sweep(shape, given.most, given.two)
    return 0


if __name__ == "__main__":
    sys.exit(main())
