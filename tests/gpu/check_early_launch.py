"""Kernels that are started early give the same bits, a thousand times. ``python -m tests.gpu.check_early_launch``.

Needs one NVIDIA GPU of compute capability 9.0 or more; under a minute. Three parts:

``chains``: kernels that read what other instances of the one before them wrote, some of them slowed down, in random
order over a few buffers, with fills, copies, ATen's kernels and work on a second stream in between; every buffer is
compared with that of the same chain launched in the ordinary way, launched one by one and as a recorded CUDA graph.
The same with the wait left out must differ, or the chains would show nothing.

``templates``: products with partial sums and counters in shared workspaces, one straight after the other.

``models``: compiled programs of many small kernels in place, with the library's calls in between, under both wrappers
and recorded, against the same with option ``early_launch="never"``.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from memplan.codegen.triton_product import emit_launches
from memplan.codegen.triton_source import module_source
from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.template import Method, ProductConfig
from memplan.runtime.triton_build import Build, Target, compile_one
from memplan.runtime.triton_launch import Launcher
from memplan.template_tuning import launches
from tests.templates.products import product

EARLY = (EarlyLaunch.WAIT, EarlyLaunch.START, EarlyLaunch.END)
#: what a kernel of a chain does: reads backwards, so that every instance needs another one's results; the first
#: instances of a slow one take some microseconds, and their results show that they did
_BODY = """\
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + (N - 1 - i)) * 3 + 1
    if SLOW:
        spent = program
        if program < 4:
            for k in range(500):
                spent = (spent * 1664525 + k) % 65521
        value += spent
    tl.store(y + i, value)
"""
_PARAMETERS = ("x", "y", "N: tl.constexpr", "BLOCK: tl.constexpr", "SLOW: tl.constexpr")
Launch = Callable[[int, int, int], None]


def kernel(early: EarlyLaunch, count: int, slow: bool, waits: bool = True) -> Launch:
    """``launch(stream, x, y)``; without ``waits`` it is started early all the same, which is wrong."""
    block = 256
    source = module_source("link", _PARAMETERS, (), _BODY, early)
    source = source if waits else source.replace("    gdc_wait()\n", "")
    arguments = (("x", "*i32"), ("y", "*i32"))
    build = Build("link", source, arguments, (True, True), (("N", count), ("BLOCK", block), ("SLOW", int(slow))), 4, 1)
    compiled = compile_one(build, Target.current())
    assert compiled.early == (waits and early is not EarlyLaunch.NEVER)
    return Launcher(replace(compiled, early=early is not EarlyLaunch.NEVER), count // block, 2).bound()


@dataclass(frozen=True)
class Step:
    """``kind``: kernel, slow, fill, copy, aten or side; from one buffer to another."""

    kind: str
    source: int
    target: int


def steps(seed: int, count: int) -> list[Step]:
    rng = random.Random(seed)
    kinds = ["kernel"] * 10 + ["slow"] * 3 + ["fill", "copy", "aten", "side"]
    found = []
    for _ in range(count):
        source, target = rng.sample(range(4), 2)
        found.append(Step(rng.choice(kinds), source, target))
    return found


class Chain:
    """The steps over four buffers of as many numbers."""

    def __init__(self, early: EarlyLaunch, count: int, program: Sequence[Step], waits: bool = True) -> None:
        self.program, self.count = program, count
        self.links = {s: kernel(early, count, s == "slow", waits) for s in ("kernel", "slow")}
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.start = torch.randint(-(2**31), 2**31 - 1, (4, count), dtype=torch.int32, device="cuda")
        self.buffers = self.start.clone()

    def run(self) -> None:
        main = torch.cuda.current_stream()
        self.buffers.copy_(self.start)
        for step in self.program:
            x, y = self.buffers[step.source], self.buffers[step.target]
            match step.kind:
                case "fill":
                    self._driver("cuMemsetD32Async", y.data_ptr(), 7, self.count // 2, main)
                case "copy":
                    self._driver("cuMemcpyDtoDAsync_v2", y.data_ptr(), x.data_ptr(), 2 * self.count, main)
                case "aten":
                    y.add_(x)
                case "side":
                    self.side.wait_stream(main)
                    with torch.cuda.stream(self.side):
                        self.links["slow"](self.side.cuda_stream, x.data_ptr(), y.data_ptr())
                    main.wait_stream(self.side)
                case kind:
                    self.links[kind](main.cuda_stream, x.data_ptr(), y.data_ptr())

    def _driver(self, name: str, where: int, what: int, count: int, stream: torch.cuda.Stream) -> None:
        number = ctypes.c_uint if name.startswith("cuMemset") else ctypes.c_uint64
        given = (ctypes.c_uint64(where), number(what), ctypes.c_size_t(count), ctypes.c_void_p(stream.cuda_stream))
        status = getattr(self.driver, name)(*given)
        if status:
            raise RuntimeError(f"{name} failed with error {status} of the CUDA driver")


def differing(run: Callable[[], object], result: Callable[[], Tensor], wanted: Tensor, repeats: int) -> int:
    """How many of the runs gave another result; nothing waits in between."""
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(repeats):
        run()
        wrong += (result() != wanted).any()
    return int(wrong)


def recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def chains(repeats: int) -> list[str]:
    failed = []
    for count, seed in ((256, 1), (256 * 132, 2), (256 * 4096, 3)):
        program = steps(seed, 60)
        torch.manual_seed(seed)
        plain = Chain(EarlyLaunch.NEVER, count, program)
        plain.run()
        wanted = plain.buffers.clone()
        for early in EARLY:
            chain = Chain(early, count, program)
            chain.start = plain.start
            one_by_one = differing(chain.run, lambda c=chain: c.buffers, wanted, repeats // 4)  # type: ignore[misc]
            graph = recorded(chain.run)
            replayed = differing(graph.replay, lambda c=chain: c.buffers, wanted, repeats)  # type: ignore[misc]
            print(f"chains of {count}, {early.value}: {one_by_one} and, replayed, {replayed} differ", flush=True)
            if one_by_one or replayed:
                failed.append(f"chain of {count}, {early.value}")
    program = [Step("slow", k % 2, 1 - k % 2) for k in range(60)]
    control = Chain(EarlyLaunch.START, 256 * 132, program, waits=False)
    right = Chain(EarlyLaunch.NEVER, 256 * 132, program)
    right.start = control.start
    right.run()
    graph = recorded(control.run)
    found = differing(graph.replay, lambda: control.buffers, right.buffers.clone(), 100)
    print(f"control without the wait: {found} of 100 differ")
    return failed if found else [*failed, "the control without the wait gave the right answers"]


def templates(repeats: int) -> list[str]:
    failed = []
    sizes = (1, 64, 256, 4096)
    configs = {
        "split": ProductConfig(32, 64, 64, Method.SPLIT, parts=8, warps=4, stages=3),
        "bunches": ProductConfig(32, 64, 64, Method.SPLIT, parts=32, warps=4, stages=3, bunch=8),
        "two launches": ProductConfig(32, 64, 64, Method.STAGED, parts=16, warps=4, stages=3, slice=2),
        "stream": ProductConfig(64, 64, 64, Method.STREAM, parts=100, warps=4, stages=3),
    }
    for name, config in configs.items():
        p = product(sizes, config, transposed=(False, True), bias=True, epilogue="residual")
        wanted: Tensor | None = None
        for early in (EarlyLaunch.NEVER, *EARLY):
            emitted = emit_launches(p, name="product", early=early)
            (launch,) = launches([emitted])
            assert launch is not None
            # two products of other factors share the workspaces
            pair = [[_argument(a, kind, seed) for a, kind in emitted[0].arguments] for seed in (1, 2)]
            shared = len(p.workspaces())
            pair[1][-shared:] = pair[0][-shared:]
            place = [a for a, _ in emitted[0].arguments].index(p.epilogue.stores[0].buffer)
            run = partial(in_turn, launch, pair)
            results = partial(torch.stack, [made[place] for made in pair])
            run()
            found = results()
            wanted = found if wanted is None else wanted
            wrong = differing(recorded(run).replay, results, wanted, repeats // 10)
            print(f"product by {name}, {early.value}: {wrong} differ", flush=True)
            if wrong or not torch.equal(found, wanted) or torch.equal(*found) or not torch.isfinite(found).all():
                failed.append(f"product by {name}, {early.value}")
    return failed


def in_turn(launch: Callable[..., None], made: Sequence[Sequence[Tensor]]) -> None:
    for k in range(20):
        launch(torch.cuda.current_stream().cuda_stream, *(t.data_ptr() for t in made[k % 2]))


def _argument(name: str, kind: str, seed: int) -> Tensor:
    """Random numbers that are the same for a name and a seed in every call, as many as any argument has; counters are
    zeros."""
    dtype = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}[kind]
    if dtype is torch.int32:
        return torch.zeros(1 << 16, dtype=dtype, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1000 * seed + sum(map(ord, name)))
    return (torch.randn(1 << 20, device="cuda", generator=generator) * 0.1).to(dtype)


def mixed(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Softmaxes, norms, products, sums over columns, a sort, random numbers, an update in place."""
    total = torch.zeros_like(x[0])
    for k in range(6):
        x = torch.softmax(x * 1.5, k % 2)
        x = functional.layer_norm(x, x.shape[-1:])
        total = total + x.flip(0).cumsum(0).amax(0)
        x = torch.mm(x, w) if k % 3 else x + x.sort(0).values
        x = functional.dropout(x, 0.1)
        w = torch.roll(w, k + 1, 1)
    return x, total


def models(repeats: int) -> list[str]:
    failed = []
    torch.manual_seed(0)
    given = torch.randn(64, 256, device="cuda"), torch.randn(256, 256, device="cuda") / 16
    wanted: tuple[Tensor, ...] | None = None
    for policy in (EarlyLaunch.NEVER, EarlyLaunch.START, EarlyLaunch.END):
        for wrapper, graphs in (("python", False), ("cpp", False), ("cpp", True)):
            torch._dynamo.reset()
            options = {"wrapper": wrapper, "early_launch": policy.value, "cuda_graphs": graphs}
            call = partial(seeded, torch.compile(mixed, backend="memplan", options=options), given)
            for _ in range(4):  # recorded after a few calls
                found = tuple(t.clone() for t in call())
            wanted = found if wanted is None else wanted
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(repeats // 2):
                for a, b in zip(call(), wanted, strict=True):
                    wrong += (a != b).any()
            kind = f"{policy.value}, {wrapper}{', recorded' if graphs else ''}"
            print(f"model, {kind}: {int(wrong)} differ", flush=True)
            if int(wrong):
                failed.append(f"model, {kind}")
    return failed


def seeded(call: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return call(*given)


PARTS = {"chains": chains, "templates": templates, "models": models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    given = parser.parse_args()
    failed: list[str] = []
    with torch.no_grad():
        for name in given.only:
            begin = time.perf_counter()
            try:
                failed += PARTS[name](given.repeats)
            except Exception:
                traceback.print_exc(limit=-6)
                failed.append(f"{name} ended with an error")
            print(f"{name}: {time.perf_counter() - begin:.1f} s")
    print("FAILED: " + "; ".join(failed) if failed else "all the same bits")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
