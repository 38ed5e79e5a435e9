"""On a GPU: training steps whose traces come from the cache, in a new process. ``python -m tests.gpu.check_traces``.

Each row is one model with its options, first cold, then warm, each in a process of its own: against eager, the second
without a graph handed over by AOTAutograd, at the same memory. The whole takes about two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import memplan


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Without dropout."""
    from benchmarks.compile_time import make
    from benchmarks.models import tokens

    return make("gpt2", 4)().cuda().eval(), tuple(t.cuda() for t in tokens(512, 2, 32)())


def convolutions() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(6)]
    return nn.Sequential(nn.Conv2d(3, 32, 3), *layers).cuda(), (torch.randn(16, 3, 64, 64, device="cuda"),)


def dropout() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2).cuda(), (torch.randn(8, 64, 128, device="cuda"),)


Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
CASES: dict[str, tuple[Make, dict[str, object]]] = {
    "gpt2": (gpt2, {}),
    "gpt2 slabs": (gpt2, {"pools": "always"}),
    "convolutions": (convolutions, {}),
    "convolutions budget": (convolutions, {"budget": "90MiB"}),
    "convolutions offload": (convolutions, {"budget": "90MiB", "offload": True}),
    "dropout as eager": (dropout, {"random": "eager"}),
    "gpt2 graphs": (gpt2, {"cuda_graphs": True}),
}


def step(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(3)
    out = model(*inputs)
    loss: Tensor = out if out.dim() == 0 else out.square().mean()
    loss.backward()
    return loss.detach()


def run(name: str) -> dict[str, object]:
    """One process: first and later steps against eager; graphs traced, bytes, seconds."""
    from memplan.region import Region

    traced: list[str] = []
    for phase in ("forward", "backward", "inference"):
        original = getattr(Region, f"compile_{phase}")

        def watched(self: object, *given: object, phase: str = phase, original: Any = original) -> object:
            traced.append(phase)
            return original(self, *given)

        setattr(Region, f"compile_{phase}", watched)
    make, options = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = step(model, inputs)
    grads = [p.grad for p in model.parameters()]
    compiled = torch.compile(model, backend="memplan", options=options)
    begin = time.perf_counter()
    with memplan.record() as recording:
        for turn in range(3):
            model.load_state_dict(state)
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = step(compiled, inputs)
            torch.cuda.synchronize()
            if turn == 0:
                seconds = time.perf_counter() - begin
            torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-4)
            for p, g in zip(model.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, g, rtol=1e-2, atol=1e-3)
    peak = torch.cuda.max_memory_allocated() - before
    predicted = [max(p.timeline) for p in recording.plans]
    return {"traced": traced, "peak": peak, "predicted": predicted, "seconds": round(seconds, 2)}


def main() -> int:
    if len(sys.argv) == 2:
        print(json.dumps(run(sys.argv[1])))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MEMPLAN_CACHE_DIR": f"{folder}/cache", "MEMPLAN_PLAN_CACHE": "1"}
        for name in CASES:
            rows = []
            for _ in range(2):
                command = [sys.executable, "-m", "tests.gpu.check_traces", name]
                done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
                if done.returncode:
                    print(done.stderr[-3000:])
                    break
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            again = "graphs" in name  # recordings need the traced graph
            good = len(rows) == 2 and bool(rows[1]["traced"]) == again and rows[0]["traced"]
            good = good and all(rows[0][k] == rows[1][k] for k in ("peak", "predicted"))
            failed += not good
            print(f"{name:22} {'ok' if good else 'WRONG':6} {rows}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
