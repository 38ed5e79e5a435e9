"""On a GPU: plans and kernels from the cache in a new process, and saved models. ``python -m tests.gpu.check_saved``.

Each check is a process of its own and prints one row; the whole takes about a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import memplan
from tests.saving.models import Counter, tied


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def training(folder: Path) -> str:
    """One step against eager; says how many programs were planned."""
    from memplan import compilation

    planned = []
    plan = compilation.plan_program
    compilation.plan_program = lambda *given: (planned.append(1), plan(*given))[1]
    torch.manual_seed(0)
    model = Model().cuda()
    x = torch.randn(4, 32, 64, device="cuda")
    expected = model(x)
    expected.square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    begin = time.perf_counter()
    out = torch.compile(model, backend="memplan")(x)
    out.square().mean().backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=2e-3, atol=2e-4)
    return f"planned {len(planned)} programs, first step {seconds:.1f} s"


def warm(folder: Path) -> str:
    text = training(folder)
    assert "planned 0 programs" in text, text
    return text


class Doubling(nn.Module):
    """A user's Triton kernel between kernels of ours."""

    def forward(self, x: Tensor) -> Tensor:
        from tests.user_kernels.own_kernels import doubled, incremented

        y = doubled(torch.cos(x))
        incremented(y)  # of two configurations, one of which is chosen when it is saved
        return torch.sin(y)


def save(folder: Path) -> str:
    """Save a model of fixed and one of dynamic sizes, and one with a user's kernel, with what they give."""
    model, args, kwargs = tied()
    model, args = model.cuda(), tuple(a.cuda() for a in args)
    kwargs = {k: v.cuda() for k, v in kwargs.items()}
    shapes = {"tokens": {1: torch.export.Dim("tokens", min=2, max=30)}, "scale": None, "shift": None}
    memplan.save(torch.export.export(model, args, kwargs, dynamic_shapes=shapes), folder / "tied.memplan")
    given = [((torch.randint(0, 32, (2, n), device="cuda"),), kwargs) for n in (8, 2, 30)]
    with torch.no_grad():
        torch.save([(a, k, model(*a, **k)) for a, k in given], folder / "tied.pt")
    counter, x = Counter().cuda(), torch.randn(5, 6, device="cuda")
    memplan.save(torch.export.export(counter, (x, torch.ones(6, device="cuda"))), folder / "counter.memplan")
    with torch.no_grad():
        torch.save((x, [counter(x, torch.ones(6, device="cuda")) for _ in range(2)]), folder / "counter.pt")
    rows = torch.randn(7, 30, device="cuda")
    memplan.save(torch.export.export(Doubling(), (rows,)), folder / "doubling.memplan")
    torch.save((rows, Doubling()(rows)), folder / "doubling.pt")
    return f"{(folder / 'tied.memplan').stat().st_size} bytes"


def load(folder: Path) -> str:
    """Nothing may be compiled: no program is started, and neither Dynamo nor Triton can be imported."""

    def refused(*given: object, **more: object) -> None:
        raise AssertionError(f"something is run: {given}")

    subprocess.Popen.__init__ = refused  # type: ignore[assignment, method-assign]
    sys.modules["triton"] = None  # type: ignore[assignment]
    begin = time.perf_counter()
    model = memplan.load(folder / "tied.memplan")
    seconds = time.perf_counter() - begin
    for args, kwargs, expected in torch.load(folder / "tied.pt"):
        torch.testing.assert_close(model(*args, **kwargs), expected, rtol=1e-3, atol=1e-4)
    counter = memplan.load(folder / "counter.memplan")
    x, expected = torch.load(folder / "counter.pt")
    for wanted in expected:
        torch.testing.assert_close(counter(x, torch.ones(6, device="cuda")), wanted, rtol=1e-4, atol=1e-5)
    rows, wanted = torch.load(folder / "doubling.pt")
    torch.testing.assert_close(memplan.load(folder / "doubling.memplan")(rows), wanted, rtol=1e-4, atol=1e-5)
    return f"loaded in {seconds:.2f} s"


def elsewhere(folder: Path) -> str:
    """On the second GPU while the first is the current one: a saved model, and both wrappers of a compiled one."""
    if torch.cuda.device_count() < 2:
        return "skipped: there is one GPU"
    model = memplan.load(folder / "tied.memplan", device="cuda:1")
    for args, kwargs, expected in torch.load(folder / "tied.pt", map_location="cuda:1"):
        found = model(*args, **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    layers, x = Model().to("cuda:1"), torch.randn(4, 32, 64, device="cuda:1")
    wanted = layers(x)
    for wrapper in ("python", "cpp"):
        torch._dynamo.reset()
        layers.zero_grad()
        out = torch.compile(layers, backend="memplan", options={"wrapper": wrapper})(x)
        out.square().mean().backward()
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
        assert all(p.grad is not None and p.grad.device == x.device == out.device for p in layers.parameters())
    assert torch.cuda.memory_allocated(0) == 0, torch.cuda.memory_allocated(0)
    return "on cuda:1, nothing on cuda:0"


CHECKS: tuple[Callable[[Path], str], ...] = (training, warm, save, load, elsewhere)


def main() -> int:
    if len(sys.argv) == 3:
        found = next(c for c in CHECKS if c.__name__ == sys.argv[1])
        print(found(Path(sys.argv[2])))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MEMPLAN_CACHE_DIR": f"{folder}/cache", "MEMPLAN_PLAN_CACHE": "1"}
        for check in CHECKS:
            begin = time.perf_counter()
            command = [sys.executable, "-m", "tests.gpu.check_saved", check.__name__, folder]
            try:
                done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
                good, text = done.returncode == 0, (done.stdout.strip() or done.stderr)
                text = text if good else done.stderr[-3000:]
            except subprocess.TimeoutExpired:
                good, text = False, "took more than 150 s"
            failed += not good
            verdict = "ok" if good else "WRONG"
            print(f"{check.__name__:10} {verdict:6} {time.perf_counter() - begin:5.1f} s  {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
