"""Matrix-product templates against the ATen call with the kernel after it, paired, on a GPU.

    python3 -m benchmarks.templates [--json FILE] [--only TEXT]

For each shape and epilogue: microseconds of ATen's call and our kernel after it, of the fastest template, and what was
chosen. The answers of every fastest template are compared with ATen's. At the end: the part of the list that templates
win, the least ratio of what was chosen (timed once more, by itself), and the same for the shapes made for split-K.
``MEMPLAN_EARLY_LAUNCH=never`` launches all kernels in the ordinary way. Needs one NVIDIA GPU; about two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sympy
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
import memplan  # noqa: E402

if not any(Path(p) == ROOT for p in memplan.__path__):
    memplan.__path__.append(str(ROOT))  # memplan.codegen, where the package is not installed

from memplan.ir.config import Config, from_environment  # noqa: E402
from memplan.ir.early_launch import EarlyLaunch, early_template  # noqa: E402
from memplan.ir.loops import Call, Cast, Constant, Kernel, Load, Node, Range, Store, outer_symbol  # noqa: E402
from memplan.ir.program import (  # noqa: E402
    Buffer,
    BufferKind,
    Contract,
    Extern,
    KernelOp,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)
from memplan.passes.templates import Candidate, candidates  # noqa: E402
from memplan.runtime.triton_build import Target  # noqa: E402
from memplan.template_tuning import Measured, compare, measure_all  # noqa: E402

HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """``rows x inner`` times ``inner x columns``, ``batch`` of them; the second factor is a weight (transposed)."""

    name: str
    rows: int
    columns: int
    inner: int
    batch: int = 1
    epilogue: str = "none"
    split: bool = False


def _shapes() -> list[Shape]:
    models = [
        ("GPT-2 qkv", 16384, 2304, 768, "bias"), ("GPT-2 out", 16384, 768, 768, "bias residual"),
        ("GPT-2 up", 16384, 3072, 768, "bias gelu"), ("GPT-2 down", 16384, 768, 3072, "bias residual"),
        ("Llama q", 4096, 2048, 2048, "none"), ("Llama up", 4096, 5632, 2048, "silu mul"),
        ("Llama down", 4096, 2048, 5632, "residual"),
        ("ViT-L qkv", 12608, 3072, 1024, "bias"), ("ViT-L up", 12608, 4096, 1024, "bias gelu"),
        ("ViT-L down", 12608, 1024, 4096, "bias residual"),
        ("BERT-L up", 8192, 4096, 1024, "bias gelu"), ("BERT-L out", 8192, 1024, 1024, "bias residual"),
        ("gradient of a weight", 768, 3072, 16384, "cast"),
        ("ConvNeXt up", 3136, 2048, 512, "bias gelu"), ("ConvNeXt down", 3136, 512, 2048, "bias residual"),
    ]  # fmt: skip
    odd = [
        ("odd", 1000, 1000, 1000, "bias relu"), ("odd", 333, 520, 777, "relu"), ("odd", 2048, 328, 1160, "bias gelu"),
        ("odd", 197, 1024, 1024, "bias residual"), ("odd", 1, 4096, 4096, "bias"), ("odd", 640, 640, 640, "relu"),
        ("odd", 1536, 1536, 1536, "residual"), ("odd", 512, 512, 512, "bias relu"), ("odd", 128, 50264, 768, "none"),
    ]  # fmt: skip
    skinny = [
        ("split-K", 16, 4096, 4096, "none"), ("split-K", 32, 4096, 11008, "residual"),
        ("split-K", 64, 64, 16384, "none"), ("split-K", 128, 128, 8192, "relu"), ("split-K", 16, 1024, 8192, "bias"),
        ("split-K", 64, 256, 32768, "cast"), ("split-K", 256, 256, 16384, "none"),
        ("split-K", 96, 768, 12288, "residual"),
    ]  # fmt: skip
    found = [Shape(n, m, c, k, epilogue=e) for n, m, c, k, e in models + odd if m >= 16]
    found += [Shape(n, m, c, k, epilogue=e, split=True) for n, m, c, k, e in skinny]
    found += [
        Shape("bmm scores", 512, 512, 64, batch=192, epilogue="scale"),
        Shape("bmm values", 512, 64, 512, batch=192, epilogue="none"),
        Shape("bmm windows", 49, 49, 32, batch=1024, epilogue="scale"),
    ]
    return found


SHAPES = _shapes()


def candidate(shape: Shape) -> tuple[Candidate, Program]:
    """The program of one product and the kernel after it, and the candidate in it."""
    batch, m, n, k = shape.batch, shape.rows, shape.columns, shape.inner
    device = "cuda:0"
    buffers: dict[str, Buffer] = {}

    def buffer(name: str, count: int, kind: BufferKind, dtype: torch.dtype = HALF) -> str:
        buffers[name] = Buffer(name, count * dtype.itemsize, dtype, device, kind)
        return name

    stacked = batch > 1
    sizes = [(batch, m, k), (batch, k, n), (batch, m, n)] if stacked else [(m, k), (k, n), (m, n)]
    strides = [(m * k, k, 1), (k * n, 1, k), (m * n, n, 1)] if stacked else [(k, 1), (1, k), (n, 1)]
    a = View(buffer("a", batch * m * k, BufferKind.INPUT), HALF, sizes[0], strides[0])
    b = View(buffer("b", batch * k * n, BufferKind.PARAMETER), HALF, sizes[1], strides[1])
    plain = shape.epilogue in ("none", "bias")
    kind = BufferKind.OUTPUT if plain else BufferKind.TEMPORARY
    result = View(buffer("product", batch * m * n, kind), HALF, sizes[2], strides[2])
    args: tuple[View, ...] = (a, b)
    target = "aten.bmm.out" if stacked else "aten.mm.out"
    if "bias" in shape.epilogue:
        bias = View(buffer("bias", n, BufferKind.PARAMETER), HALF, (n,), (1,))
        args, target = (bias, a, b), "aten.addmm.out"
    operations: list[Operation] = [Extern("product", target, args, (), (result,), Contract.OUT, device)]
    if not plain:
        operations.append(_kernel(shape, batch * m * n, buffer))
    inputs = [View(x.name, HALF, (int(x.nbytes) // 2,), (1,)) for x in buffers.values() if x.kind is BufferKind.INPUT]
    inputs += [View(x.name, HALF, (int(x.nbytes) // 2,), (1,)) for x in buffers.values() if x.kind.value == "parameter"]
    out = "product" if plain else "out"
    output = View(out, buffers[out].dtype, (batch * m * n,), (1,))
    given = tuple(TensorInput(p, v) for p, v in enumerate(inputs))
    program = Program("bench", Phase.INFERENCE, buffers, tuple(operations), given, (output,), {}, {}, {})
    (found,) = candidates(program)
    return found, program


def _kernel(shape: Shape, count: int, buffer: object) -> KernelOp:
    """The pointwise kernel of an epilogue over the flat product."""
    x = outer_symbol(0)
    nodes: list[Node] = [Load("product", x, HALF)]
    out_type = torch.float32 if "cast" in shape.epilogue else HALF

    def call(op: str, *args: int) -> int:
        nodes.append(Call(op, args, HALF))
        return len(nodes) - 1

    def constant(value: float) -> int:
        nodes.append(Constant(value, HALF))
        return len(nodes) - 1

    def other(name: str) -> int:
        nodes.append(Load(buffer(name, count, BufferKind.INPUT), x, HALF))  # type: ignore[operator]
        return len(nodes) - 1

    value = 0
    words = shape.epilogue.split()
    if "gelu" in words:
        inner = call("erf", call("mul", value, constant(0.7071067811865476)))
        value = call("mul", call("mul", value, constant(0.5)), call("add", inner, constant(1.0)))
    if "relu" in words:
        value = call("relu", value)
    if "silu" in words:
        value = call("mul", call("mul", value, call("sigmoid", value)), other("gate"))
    if "scale" in words:
        value = call("mul", value, constant(0.125))
    if "residual" in words:
        value = call("add", value, other("residual"))
    if "cast" in words:
        nodes.append(Cast(value, torch.float32))
        value = len(nodes) - 1
    buffer("out", count, BufferKind.OUTPUT, out_type)  # type: ignore[operator]
    stores = (Store("out", sympy.sympify(x), value, out_type),)
    return KernelOp("epilogue", Kernel((Range(x, count),), (), tuple(nodes), stores), "cuda:0")


@dataclass(frozen=True)
class Row:
    shape: Shape
    measured: Measured
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """ATen's time over the template's."""
        return self.measured.aten / self.measured.best if self.measured.best else math.nan


def policy() -> EarlyLaunch:
    """What templates do about the kernels around them, by ``MEMPLAN_EARLY_LAUNCH`` and the GPU."""
    return early_template(from_environment(Config()).early_launch, Target.current().arch)


def run(shapes: Sequence[Shape]) -> list[Row]:
    rows = []
    early = policy()
    for shape in shapes:
        start = time.perf_counter()
        try:
            found, program = candidate(shape)
            (measured,) = measure_all({found.key: found}, program, limit=16 << 30, early=early).values()
            wrong = ""
            if measured.fastest is not None:
                wrong = compare(replace(found, product=replace(found.product, config=measured.fastest)), program)
            row = Row(shape, measured, wrong)
        except Exception as error:
            traceback.print_exc(limit=-3)
            row = Row(shape, Measured(None, math.nan, math.nan), f"{type(error).__name__}: {error}".splitlines()[0])
        rows.append(row)
        print(line(row, time.perf_counter() - start), flush=True)
    return rows


def line(row: Row, seconds: float) -> str:
    s, f = row.shape, row.measured.fastest
    sizes = f"{f'{s.batch}x' if s.batch > 1 else ''}{s.rows}x{s.columns}x{s.inner}"
    config = ""
    if f is not None:
        parts = f"p{f.parts}" + (f"/{f.bunch}" if f.bunch > 1 else "")
        config = f"{f.method.value} {f.rows}x{f.columns}x{f.inner} {parts} w{f.warps} s{f.stages}"
    chosen = "template" if row.measured.config is not None else "ATen"
    return (
        f"{s.name:<22} {sizes:<20} {s.epilogue:<14} {row.measured.aten:8.1f} {row.measured.best:8.1f} {row.ratio:6.3f} "
        f"{chosen:<9} {config:<36} {seconds:4.1f} s {row.wrong or row.measured.skipped}"
    )


def summary(rows: Sequence[Row]) -> str:
    good = [r for r in rows if not r.wrong]
    taken = [r for r in good if r.measured.config is not None]
    split = [r for r in good if r.shape.split]
    wrong = [r for r in rows if r.wrong]
    ratios = [max(r.ratio, 1.0) if r.measured.config is None else r.ratio for r in split]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    return "\n".join(
        [
            f"templates win {len(taken)} of {len(rows)} ({100 * len(taken) / max(1, len(rows)):.0f} %; wanted 30 %)",
            f"least ratio of what was chosen {min((r.ratio for r in taken), default=math.nan):.3f} (wanted 0.97)",
            f"split-K shapes: geometric mean {mean:.2f}, least {min(ratios, default=math.nan):.2f} (wanted 1.2)",
            f"wrong or failed: {len(wrong)} {', '.join(f'{r.shape.name} {r.wrong}' for r in wrong)}",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--only", default="", help="shapes whose name or epilogue contains this")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds: ATen with kernel, template, ratio")
    rows = run([s for s in SHAPES if given.only in f"{s.name} {s.epilogue}"])
    print(summary(rows))
    if given.json:
        given.json.write_text(
            json.dumps([{"shape": repr(r.shape), "aten": r.measured.aten, "best": r.measured.best} for r in rows])
        )
    return 1 if any(r.wrong for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
