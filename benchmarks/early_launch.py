"""What starting kernels early is worth: chains of dependent kernels under every value of option ``early_launch``.

    python -m benchmarks.early_launch [--only TEXT] [--policies never start end] [--seconds 60] [--write]

For each chain and policy: microseconds a kernel when the chain is replayed as a CUDA graph, and a launch when it is
called through its wrapper (C++ for tiny kernels and decode). Rounds of the policies are interleaved, the best
average of each counts, and all answers are compared bit for bit with those of the first policy. The chains: launches
alone (softmax over 16 x 16), LayerNorm and pointwise kernels of 64 KB to 64 MB each way, where kernels are long enough
that starting the next one early could take something from them, and the decode step of a transformer, where products
of the library stand between our kernels, or templates. Needs one NVIDIA GPU of compute capability 9.0 or more.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.launch_overhead import alone, launched, norms, once, recorded
from memplan.ir.early_launch import EARLY_LAUNCHES

RESULTS = Path(__file__).parent / "results"
POLICIES = tuple(EARLY_LAUNCHES)
Call = Callable[[Tensor], Tensor]


def layer_norms(links: int) -> Call:
    """LayerNorm over rows of 1024 and 2048 in turn: each kernel needs all of the one before it."""

    def run(x: Tensor) -> Tensor:
        for k in range(links):
            width = 1024 << k % 2
            x = functional.layer_norm(x.view(-1, width), (width,))
        return x

    return alone(run)


def pointwise(links: int) -> Call:
    """Cosines of cosines, a kernel each."""

    def run(x: Tensor) -> Tensor:
        for _ in range(links):
            x = x.cos()
        return x

    return alone(run)


class Layer(nn.Module):
    """A layer of a transformer without its attention: norms, products, a gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.tanh(q * k) + v)
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def decode(layers: int) -> Call:
    """Tokens through layers of the width of a model of a billion parameters."""
    model = nn.Sequential(*(Layer(2048, 5632) for _ in range(layers))).to("cuda", torch.bfloat16).eval()
    return alone(lambda x: model(x))


@dataclass(frozen=True)
class Chain:
    """``make`` gives the function; ``input`` its argument; ``disabled``: passes that would make one kernel of it;
    ``wrapper``: where kernels are long Python's launches them as fast, and compiles faster; ``tuned``: with templates
    of products where they are faster."""

    name: str
    make: Callable[[], Call]
    input: Callable[[], Tensor]
    disabled: tuple[str, ...] = ()
    wrapper: str = "python"
    tuned: bool = False


def floats(nbytes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(nbytes // 4, device="cuda")


def _chains(links: int) -> list[Chain]:
    found = [Chain("launches alone", lambda: norms(200, "cuda"), lambda: torch.randn(16, 16, device="cuda"), (), "cpp")]
    for text, size in {"64 KB": 1 << 16, "1 MB": 1 << 20, "8 MB": 8 << 20, "64 MB": 64 << 20}.items():
        count = links if size < 16 << 20 else links // 2
        found.append(Chain(f"LayerNorm, {text}", lambda n=count: layer_norms(n), floats(size)))  # type: ignore[misc]
        found.append(
            Chain(f"pointwise, {text}", lambda n=count: pointwise(n), floats(size), ("fusion",))  # type: ignore[misc]
        )
    for rows, tuned in ((1, False), (16, False), (16, True)):
        name = f"decode of {rows}, 8 layers{', templates' if tuned else ''}"
        tokens = partial(torch.randn, rows, 2048, device="cuda", dtype=torch.bfloat16)
        found.append(Chain(name, lambda: decode(8), tokens, (), "cpp", tuned))
    return found


@dataclass
class Run:
    """A chain under one policy; times in microseconds, of a whole call."""

    policy: str
    call: Call
    graph: torch.cuda.CUDAGraph
    launches: int
    wanted: Tensor
    wrong: bool
    replayed: float = math.inf
    called: float = math.inf


@dataclass
class Measured:
    """``failed``: policies that could not be run, or whose answers differ."""

    chain: str
    runs: list[Run]
    failed: list[str] = field(default_factory=list)


def measure(chain: Chain, policies: Sequence[str], rounds: int, repeats: int) -> Measured:
    """All policies of a chain, in turns."""
    torch.manual_seed(0)
    x = chain.input()
    wanted: Tensor | None = None
    out = Measured(chain.name, [])
    for policy in policies:
        try:
            torch.manual_seed(0)
            options = {"wrapper": chain.wrapper, "early_launch": policy}
            options |= {"disable": list(chain.disabled), "max_autotune": chain.tuned}
            call = torch.compile(chain.make(), backend="memplan", options=options)
            answer = call(x)
            wanted = answer if wanted is None or chain.tuned else wanted  # tuned kernels may be others
            graph = recorded(call, x)
            run = Run(policy, call, graph, launched(graph), wanted.clone(), not torch.equal(answer, wanted))
        except Exception:
            traceback.print_exc(limit=-6)
            out.failed.append(policy)
            continue
        out.runs.append(run)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for run in out.runs:
            run.replayed = min(run.replayed, once(run.graph.replay, "cuda", repeats))
            run.called = min(run.called, once(lambda run=run: run.call(x), "cuda", repeats))  # type: ignore[misc]
    gc.enable()
    for run in out.runs:  # once more after many calls, which did not wait for one another
        if run.wrong or not torch.equal(run.call(x), run.wanted):
            out.failed.append(f"{run.policy} gives other answers")
    return out


def line(found: Measured, policies: Sequence[str]) -> str:
    """A row: kernels under the first policy, then for each the time by that number, replayed and called."""
    cells = []
    kernels = found.runs[0].launches if found.runs else 0
    for policy in policies:
        run = next((r for r in found.runs if r.policy == policy), None)
        cells += ["", ""] if run is None else [f"{t / max(1, kernels):.2f}" for t in (run.replayed, run.called)]
    return f"| {found.chain} | {kernels} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="chains whose name contains this")
    parser.add_argument("--policies", nargs="+", default=["never", "wait", "start", "end"], choices=POLICIES)
    parser.add_argument("--links", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600, help="no further chain after this long")
    parser.add_argument("--write", action="store_true", help="keep the table in results/early_launch.md")
    given = parser.parse_args(arguments)
    policies, end = given.policies, time.perf_counter() + given.seconds
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    heads = " | ".join(f"{p}, replayed | {p}, called" for p in policies)
    lines = [
        f"# Dependent kernels in a chain, started early or not: us a kernel ({where})",
        "",
        f"| chain | kernels | {heads} |",
        "|---" * (2 + 2 * len(policies)) + "|",
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    with torch.no_grad():
        for chain in _chains(given.links):
            if given.only not in chain.name:
                continue
            if time.perf_counter() > end:
                print(f"no time for {chain.name}")
                failed += 1
                continue
            found = measure(chain, policies, given.rounds, given.repeats)
            lines.append(line(found, policies))
            print(lines[-1], *(f"FAILED: {f}" for f in found.failed), flush=True)
            failed += len(found.failed)
            torch._dynamo.reset()
    if given.write and not failed and not given.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "early_launch.md").write_text("\n".join(lines) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
