"""Emitted Triton kernels on a GPU: right answers, and speed beside Inductor's for the same functions.

    python3 tests/gpu/check_kernels.py [--no-inductor]

Needs one NVIDIA GPU; 60 to 90 seconds. Prints a table of correctness (every configuration of every kernel against the
reference evaluator, every pointwise function on every kind of number), then GB/s of memory moved.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "codegen_triton")]
import memplan  # noqa: E402

if not any(Path(p) == ROOT for p in memplan.__path__):
    memplan.__path__.append(str(ROOT))  # memplan.codegen, where the package is not installed

import operation_kernels  # noqa: E402
import sample_kernels as s  # noqa: E402
from reference_kernel import run_reference  # noqa: E402
from small_kernels import SMALL, norm_buffers, norm_gradients, only  # noqa: E402

from memplan.codegen.triton_kernel import TritonKernel, emit_triton  # noqa: E402
from memplan.ir.canonical import CanonicalKernel, canonicalize  # noqa: E402
from memplan.ir.errors import CompilerError  # noqa: E402
from memplan.ir.loops import Kernel  # noqa: E402
from memplan.ir.program import KernelOp  # noqa: E402
from memplan.passes.split_reductions import split  # noqa: E402
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds  # noqa: E402
from memplan.runtime.triton_launch import make_launcher, tune  # noqa: E402

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
Buffers = dict[str, torch.Tensor]


def build_all(kernels: list[TritonKernel]) -> dict[Build, Compiled]:
    builds = [Build.of(k, c) for k in kernels for c in k.configs]
    begin = time.perf_counter()
    found = compile_builds(builds, Target.current())
    print(f"built {len(set(builds))} kernels in {time.perf_counter() - begin:.1f} s")
    for f in found:
        if isinstance(f, CompilerError):
            raise f
    return {b: f for b, f in zip(builds, found, strict=True) if isinstance(f, Compiled)}


def launch(kernel: TritonKernel, compiled: Compiled, buffers: list[torch.Tensor], sizes: tuple[int, ...] = ()) -> None:
    make_launcher(kernel, compiled)(torch.cuda.current_stream().cuda_stream, *(b.data_ptr() for b in buffers), *sizes)


def correctness() -> int:
    cases: list[tuple[str, Kernel, Buffers]] = [(n, k, b) for n, (k, b) in SMALL.items()]
    for rows, columns in ((37, 768), (5, 1000), (3, 20_003)):
        for make in (s.layer_norm, s.layer_norm_backward):
            kernel = make(rows, columns, F32)
            cases.append((f"{make.__name__} {rows}x{columns}", kernel, only(kernel, norm_buffers(rows, columns, F32))))
        a = torch.randn(rows * columns) * 3
        kernel = s.softmax(rows, columns, F32)
        cases.append((f"softmax {rows}x{columns}", kernel, {"a": a, "out": torch.zeros(rows * columns)}))
        kernel = s.argmax(rows, columns)
        cases.append((f"argmax {rows}x{columns}", kernel, {"a": a.round(), "out": torch.zeros(rows, dtype=I64)}))
        kernel = s.column_sum(columns, rows, F32)
        cases.append((f"column_sum {columns}x{rows}", kernel, {"a": a, "out": torch.zeros(rows)}))
    for rows, columns, together in ((1000, 768, 24), (37, 1000, 8), (4096, 128, 48), (301, 4096, 7)):
        cases.append((f"norm_gradients {rows}x{columns}, {together}", *norm_gradients(rows, columns, together)))
    operations = operation_kernels.cases()
    canonical = [canonicalize(k) for _, k, _ in (*cases, *operations)]
    emitted = [
        # the samples in every configuration, the single functions in one
        emit_triton(c, name="kernel", hints={}, deterministic=i >= len(cases))
        for i, c in enumerate(canonical)
    ]
    cases += operations
    built = build_all(emitted)
    failures = 0
    for (name, kernel, buffers), c, e in zip(cases, canonical, emitted, strict=True):
        expected = {k: v.clone() for k, v in buffers.items()}
        run_reference(kernel, expected)
        for config in e.configs:
            found = [buffers[b].cuda() for b in c.buffers]
            launch(e, built[Build.of(e, config)], found)
            for b, got in zip(c.buffers, found, strict=True):
                try:
                    if b == "out" and name.startswith("column_sum"):
                        check_column_sum(got.cpu(), buffers["a"])
                        continue
                    tolerance = operation_kernels.tolerance(name, got.dtype)
                    torch.testing.assert_close(got.cpu(), expected[b], equal_nan=True, **tolerance)
                except AssertionError as error:
                    failures += 1
                    print(f"WRONG {name} {config} buffer {b}: {' '.join(str(error).split())[:300]}")
    print(f"correctness: {len(cases)} kernels, {sum(len(e.configs) for e in emitted)} builds, {failures} wrong")
    return failures


def check_column_sum(found: torch.Tensor, terms: torch.Tensor) -> None:
    """Against float64, within what rounding of so many terms may give: sqrt(n) units of the sum of their magnitudes.

    In the worst case the error is n units (N. J. Higham, "The accuracy of floating point summation", 1993), and by
    chance it grows with the square root.
    """
    wide = terms.double().reshape(-1, found.numel())
    bound = len(wide) ** 0.5 * torch.finfo(found.dtype).eps * wide.abs().sum(0)
    error = (found.double() - wide.sum(0)).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.2f} of the bound from float64"


def randn(n: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(n, device="cuda").to(dtype)


def moved(kernel: CanonicalKernel, buffers: Buffers) -> int:
    """Bytes: every buffer once; read and written ones twice; indirectly read ones as much as is written."""
    body, total = kernel.kernel, 0
    written = {kernel.buffers[int(b[1:])] for b in body.written_buffers}
    read = {kernel.buffers[int(b[1:])] for b in body.read_buffers}
    largest = max(buffers[b].nbytes for b in written) if written else 0
    for name in read | written:
        nbytes = min(buffers[name].nbytes, largest) if name in ("table", "grad") else buffers[name].nbytes
        total += nbytes * ((name in read) + (name in written))
    return total


Case = tuple[str, Kernel, Buffers, Callable[[Buffers], object]]


def speed_cases() -> list[Case]:
    f = torch.nn.functional
    rows, width, vocabulary = 16384, 768, 50257

    def norm(columns: int, n: int) -> Buffers:
        return {
            "a": randn(n * columns), "b": randn(n * columns), "x": randn(n * columns), "dy": randn(n * columns),
            "weight": randn(columns), "bias": randn(columns), "mean": randn(n, F32), "rstd": randn(n, F32),
            "out": randn(n * columns), "sum": randn(n * columns), "dx": randn(n * columns),
        }  # fmt: skip

    def layer(b: Buffers, c: int) -> object:
        a = b["a"].view(-1, c)
        return torch.ops.aten.native_layer_norm(a, (c,), b["weight"], b["bias"], 1e-5)

    def residual(b: Buffers, c: int) -> object:
        a = b["a"].view(-1, c) + b["b"].view(-1, c)
        return a, torch.ops.aten.native_layer_norm(a, (c,), b["weight"], b["bias"], 1e-5)

    def backward(b: Buffers, c: int) -> object:
        dy, x = b["dy"].view(-1, c), b["x"].view(-1, c)
        mean, rstd = b["mean"].view(-1, 1), b["rstd"].view(-1, 1)
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(dy, x, (c,), mean, rstd, b["weight"], None, mask)[0]

    def cross(b: Buffers) -> object:
        a = b["a"].view(-1, vocabulary).float()
        lse = torch.logsumexp(a, 1)
        return lse - a.gather(1, b["target"][:, None])[:, 0], lse

    def embed(b: Buffers) -> object:
        ids = torch.where(b["ids"] < 0, b["ids"] + vocabulary, b["ids"])
        return b["table"].view(-1, width)[ids] + b["position"].view(-1, width)

    n = rows * 3072
    ids = torch.randint(0, vocabulary, (rows,), device="cuda")
    image = 64 * 256 * 3136
    return [
        ("bias_gelu 16384x3072 bf16", s.bias_gelu(rows, 3072), {"a": randn(n), "bias": randn(3072), "out": randn(n)},
         lambda b: f.gelu(b["a"].view(-1, 3072) + b["bias"])),
        ("add_relu 50M bf16", s.add_relu(n), {"a": randn(n), "b": randn(n), "out": randn(n)},
         lambda b: torch.relu(b["a"] + b["b"])),
        ("add_relu 256K bf16", s.add_relu(1 << 18), {x: randn(1 << 18) for x in ("a", "b", "out")},
         lambda b: torch.relu(b["a"] + b["b"])),
        ("transpose 8192x8192 f32", s.transpose(8192, 8192), {"a": randn(1 << 26, F32), "out": randn(1 << 26, F32)},
         lambda b: (2 * b["a"].view(8192, 8192)).t().contiguous()),
        ("NCHW to NHWC 64x256x56x56 bf16", s.transpose(256, 3136, BF16, 64), {"a": randn(image), "out": randn(image)},
         lambda b: (2 * b["a"].view(64, 256, 3136)).transpose(1, 2).contiguous()),
        ("layer_norm 16384x768", s.layer_norm(rows, 768), norm(768, rows), lambda b: layer(b, 768)),
        ("add + layer_norm 16384x1024", s.layer_norm(rows, 1024, residual=True), norm(1024, rows),
         lambda b: residual(b, 1024)),
        ("add + layer_norm 8192x4096", s.layer_norm(8192, 4096, residual=True), norm(4096, 8192),
         lambda b: residual(b, 4096)),
        ("layer_norm backward 16384x1024", s.layer_norm_backward(rows, 1024), norm(1024, rows),
         lambda b: backward(b, 1024)),
        ("softmax 65536x512 bf16", s.softmax(65536, 512), {"a": randn(1 << 25), "out": randn(1 << 25)},
         lambda b: f.softmax(b["a"].view(-1, 512), 1)),
        ("softmax 4096x8192 bf16", s.softmax(4096, 8192), {"a": randn(1 << 25), "out": randn(1 << 25)},
         lambda b: f.softmax(b["a"].view(-1, 8192), 1)),
        ("cross_entropy 8192x50257 bf16", s.cross_entropy(8192, vocabulary),
         {"a": randn(8192 * vocabulary), "target": ids[:8192].clone(), "loss": randn(8192, F32),
          "lse": randn(8192, F32)}, cross),
        ("bias gradient 16384x3072 bf16", s.column_sum(rows, 3072), {"a": randn(n), "out": randn(3072)},
         lambda b: b["a"].view(-1, 3072).sum(0, dtype=F32).to(BF16)),
        ("batch norm statistics 64x256x56x56 bf16", s.batch_norm_statistics(64, 256, 3136, BF16),
         {"a": randn(image), **{x: randn(256, F32) for x in ("mean", "variance", "running")}},
         lambda b: torch.var_mean(b["a"].view(64, 256, 3136).float(), (0, 2), correction=0)),
        ("embedding 16384x768 bf16", s.embedding(rows, width, vocabulary),
         {"ids": ids, "table": randn(vocabulary * width), "position": randn(rows * width), "out": randn(rows * width)},
         embed),
        ("dropout 50M bf16", s.dropout(n),
         {"seed": torch.tensor([42], device="cuda"), "a": randn(n), "out": randn(n),
          "mask": torch.zeros(n, dtype=torch.bool, device="cuda")},
         lambda b: f.dropout(b["a"], 0.25)),
    ]  # fmt: skip


def milliseconds(run: Callable[[], object]) -> float:
    """Median device time of a call, the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=40, return_mode="median"))


def pieces(kernel: Kernel, buffers: Buffers) -> list[CanonicalKernel]:
    """The kernel, or the two that it is split into, with the partial results' buffers made."""
    found = split(KernelOp("op", kernel, "cuda:0"), {}, least_elements=0)
    if found is None:
        return [canonicalize(kernel)]
    first, second, made = found
    buffers.update((b.name, torch.empty(b.nbytes // b.dtype.itemsize, dtype=b.dtype, device="cuda")) for b in made)
    return [canonicalize(first.kernel), canonicalize(second.kernel)]


def compare(
    case: Case, parts: list[tuple[CanonicalKernel, TritonKernel]], built: dict[Build, Compiled], inductor: bool
) -> tuple[str, tuple[float, float]]:
    """A line of the table, and our time over Inductor's by rule and tuned."""
    name, kernel, buffers, function = case
    stream = torch.cuda.current_stream().cuda_stream
    ruled, chosen, sizes = [], [], []
    for canonical, emitted in parts:
        launchers = [make_launcher(emitted, built[Build.of(emitted, config)]) for config in emitted.configs]
        arguments = [buffers[b].data_ptr() for b in canonical.buffers]
        best = tune(launchers, lambda arguments=arguments: arguments, stream, repeats=20)
        ruled.append((launchers[0].bound(), arguments))
        chosen.append((launchers[best].bound(), arguments))
        config = emitted.configs[best]
        sizes.append(f"{'x'.join(str(n) for _, n in config.blocks)} w{config.num_warps} ({best}/{len(launchers)})")

    def run(steps: list[tuple[Callable[..., None], list[int]]]) -> float:
        return milliseconds(lambda: [launch(stream, *arguments) for launch, arguments in steps])

    first, tuned = run(ruled), run(chosen)
    nbytes = moved(canonicalize(kernel), buffers)
    line = f"{name:40}{nbytes / first / 1e6:7.0f}{nbytes / tuned / 1e6:7.0f}"
    ratio = (1.0, 1.0)
    if inductor:
        torch._dynamo.reset()
        compiled = torch.compile(function)
        compiled(buffers)
        theirs = milliseconds(lambda: compiled(buffers))
        ratio = (first / theirs, tuned / theirs)
        line += f"{nbytes / theirs / 1e6:9.0f}{ratio[0]:15.2f}{ratio[1]:7.2f}"
    return f"{line}  {', '.join(sizes)}", ratio


def speed(inductor: bool) -> None:
    cases = speed_cases()
    parts = [
        [(c, emit_triton(c, name="kernel", hints={})) for c in pieces(kernel, buffers)]
        for _, kernel, buffers, _ in cases
    ]
    built = build_all([e for part in parts for _, e in part])
    ratios: list[tuple[float, float]] = []
    print(f"{'kernel':40}{'GB/s':>7}{'tuned':>7}{'Inductor':>9}{'time/Inductor':>15}{'tuned':>7}  best configuration")
    for case, part in zip(cases, parts, strict=True):
        line, ratio = compare(case, part, built, inductor)
        ratios.append(ratio)
        print(line, flush=True)
    if inductor:
        mean = torch.tensor(ratios).log().mean(0).exp().tolist()
        print(f"geometric mean of time over Inductor's: {mean[0]:.3f} by rule, {mean[1]:.3f} tuned")


def launch_overhead() -> None:
    kernel = s.add_relu(1024)
    canonical = canonicalize(kernel)
    emitted = emit_triton(canonical, name="kernel", hints={})
    built = build_all([emitted])
    launcher = make_launcher(emitted, built[Build.of(emitted, emitted.configs[0])])
    buffers = [randn(1024) for _ in canonical.buffers]
    pointers = [b.data_ptr() for b in buffers]
    stream = torch.cuda.current_stream().cuda_stream
    for name, call in (("launcher", launcher), ("bound", launcher.bound())):
        for _ in range(200):
            call(stream, *pointers)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(1000):
            call(stream, *pointers)
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        print(f"launch through {name}: {spent * 1e3:.2f} us a call on the host")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-inductor", action="store_true", help="leave out the comparison")
    options = parser.parse_args()
    import triton

    begin = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    failures = correctness()
    launch_overhead()
    speed(not options.no_inductor)
    print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
