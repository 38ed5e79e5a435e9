"""A wide grid of template configurations for some shapes of `benchmarks.templates`: which ones contenders lack.

    python -m benchmarks.template_sweep [--only split-K] [--most 120] [--seconds 100]

For each shape: ATen's call with the kernel after it, and the ten fastest configurations of the grid, in microseconds
(medians, in turns). What is fastest is compared with ATen's answer. Needs one NVIDIA GPU; some twenty seconds a shape,
most of it building. ``--seconds`` starts no shape after so long. ``MEMPLAN_EARLY_LAUNCH`` is heeded.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import replace

import torch

from benchmarks.templates import SHAPES, Shape, candidate, policy
from memplan.codegen.triton_product import emit_launches
from memplan.ir.template import Method, Product, ProductConfig
from memplan.runtime.device_times import device_times
from memplan.template_tuning import _Held, launches, slice_of

_SHARED = 220 << 10


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
            found.append(replace(split, method=Method.STAGED, slice=slice_of(sized, processors)))
            found += [split] if parts < 12 else [replace(split, bunch=b) for b in (4, 8) if parts % b == 0]
    distinct = list(dict.fromkeys(found))
    return distinct[:: -(-len(distinct) // most)] if distinct else []


def sweep(shape: Shape, most: int) -> None:
    begin = time.perf_counter()
    found, program = candidate(shape)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    key, early = found.key, policy()
    configs = grid(key, processors, most)
    kernels = [emit_launches(replace(key, config=c), name="product", early=early) for c in configs]
    held = _Held(found, program, early)
    pairs = zip(configs, launches(kernels), strict=True)
    usable = [(c, held.template(c, launch)) for c, launch in pairs if launch is not None]
    times = device_times([held.aten(), *(run for _, run in usable)])
    best = sorted(range(len(usable)), key=lambda k: times[k + 1])[:10]
    again = [held.aten(), *(usable[k][1] for k in best)]
    aten, *rest = device_times(again)
    name = f"{shape.name} {shape.rows}x{shape.columns}x{shape.inner} {shape.epilogue}"
    print(f"{name}: ATen {aten:.1f} us, {len(usable)} configurations, {time.perf_counter() - begin:.0f} s")
    for k, took in zip(best, rest, strict=True):
        print(f"   {took:7.1f} {aten / took:6.3f}  {named(usable[k][0])}")
    least = min(range(len(rest)), key=rest.__getitem__)
    print(f"   fastest against ATen's answer: {held.difference(again[0], again[least + 1]) or 'right'}", flush=True)


def named(c: ProductConfig) -> str:
    parts = f"p{c.parts}" + (f"/{c.bunch}" if c.bunch > 1 else "")
    return f"{c.method.value} {c.rows}x{c.columns}x{c.inner} {parts} w{c.warps} s{c.stages}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="split-K", help="shapes whose name or epilogue contains this")
    parser.add_argument("--most", type=int, default=120, help="configurations for each shape")
    parser.add_argument("--skip", type=int, nargs="*", default=(), help="positions of shapes to leave out")
    parser.add_argument("--seconds", type=float, default=3600, help="start no shape after so long")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    begin = time.perf_counter()
    for k, shape in enumerate(s for s in SHAPES if given.only in f"{s.name} {s.epilogue}"):
        if k not in given.skip and time.perf_counter() - begin < given.seconds:
            sweep(shape, given.most)
    return 0


if __name__ == "__main__":
    sys.exit(main())
