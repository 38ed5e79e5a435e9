"""The C++ wrapper on a GPU: the bytes, the allocations and the peak of the Python wrapper, call by call.

    python -m tests.gpu.check_cpp_wrapper [--device cuda] [--only NAME]

Needs one NVIDIA GPU (a second one is used if it is there); 1 to 2 minutes. ``--device cpu`` tries the script itself.
Small models of every kind are trained and run with both wrappers. A check that fails is printed with its traceback, and
the others go on; the exit status is the number of failed checks.
"""

from __future__ import annotations

import argparse
import copy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and options of the compiler."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]  # for a batch of this size
    sizes: tuple[int, ...] = (8,)
    options: dict[str, object] = field(default_factory=dict)
    dynamic: bool = False
    exact: bool = True  # atomic additions of floats have no fixed order


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 64), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).log_softmax(1)
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.silu(self.second(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer of a decoder, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(128), nn.LayerNorm(128)
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)
        self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        parts = [t.unflatten(2, (4, 32)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2)]
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.last(x))))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """An embedding, tied to the output; the loss is a cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(1000, 64), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.table(ids)))
        return F.cross_entropy(F.linear(x, self.table.weight).flatten(0, 1), ids.flatten())


class Operators(nn.Module):
    """What has no C function, a running count, results of several kinds, a view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen += 1
        y = self.first(x)
        return y.cumsum(0), y.sort(1).values * x.softmax(1), x.transpose(0, 1)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(F.relu(self.first(x)), 0.3))  # type: ignore[no-any-return]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Inputs]:
    return lambda n: (torch.randn(n, *shape, dtype=dtype),)


def ids(n: int) -> Inputs:
    return (torch.randint(0, 1000, (n, 16)),)


CASES = [
    Case("perceptron", Perceptron, floats(256)),
    Case("perceptron, pools", Perceptron, floats(256), options={"pools": "always"}),
    Case("perceptron, poison", Perceptron, floats(256), options={"poison": True}),
    Case("perceptron, dynamic", Perceptron, floats(256), sizes=(8, 32, 5), dynamic=True),
    Case("convolutions", Convolutions, floats(3, 16, 16)),
    Case("decoder block", Block, floats(32, 128, dtype=torch.bfloat16)),
    Case("decoder block, dynamic", Block, floats(32, 128, dtype=torch.bfloat16), sizes=(4, 12), dynamic=True),
    Case("tokens", Tokens, ids, exact=False),
    Case("operators", Operators, floats(32)),
    Case("dropout", Dropped, floats(64)),
]


@dataclass
class Measured:
    """One run: every result and gradient, and what was allocated for it."""

    tensors: list[Tensor]
    allocations: int = 0
    peak: int = 0
    micros: float = 0.0


def tensors_of(out: object) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]  # type: ignore[attr-defined]


def step(compiled: Callable[..., object], given: Inputs, train: bool) -> list[Tensor]:
    leaves = tuple(t.clone().requires_grad_(train and t.is_floating_point()) for t in given)
    if not train:
        with torch.no_grad():
            return [t.clone() for t in tensors_of(compiled(*leaves))]
    outs = tensors_of(compiled(*leaves))
    sum(o.float().square().mean() for o in outs if o.requires_grad).backward()  # type: ignore[union-attr]
    return [o.detach().clone() for o in outs] + [t.grad.clone() for t in leaves if t.grad is not None]


def measure(case: Case, wrapper: str, train: bool, device: str) -> Measured:
    """Compile, warm up, then count one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.make().to(device).train(train)
    options = {"wrapper": wrapper, **case.options}
    compiled = torch.compile(model, backend="memplan", dynamic=case.dynamic, options=options)
    found = Measured([])
    for size in case.sizes:
        given = tuple(t.to(device) for t in case.inputs(size))
        for _ in range(2):
            step(compiled, given, train)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        begin, before = start_counting(device)
        found.tensors += step(compiled, given, train)
        allocations, peak = counted(device, begin)
        found.allocations, found.peak = found.allocations + allocations, max(found.peak, peak - before)
        found.tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    found.tensors += [b.clone() for b in model.buffers()]
    found.micros = micros(lambda: step(compiled, given, train), device)
    return found


def start_counting(device: str) -> tuple[int, int]:
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_allocated()


def counted(device: str, begin: int) -> tuple[int, int]:
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - begin, torch.cuda.max_memory_allocated()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def micros(run: Callable[[], object], device: str, repeats: int = 20) -> float:
    """The best of five averages."""
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best * 1e6


def compare(case: Case, train: bool, device: str) -> str:
    """A row of the table.

    Raises
    ------
    AssertionError
        Where the two differ.
    """
    python, cpp = (measure(case, w, train, device) for w in ("python", "cpp"))
    assert len(python.tensors) == len(cpp.tensors)
    for k, (a, b) in enumerate(zip(python.tensors, cpp.tensors, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), f"tensor {k}: another layout"
        if case.exact:
            assert torch.equal(a, b), f"tensor {k} differs by up to {(a.double() - b.double()).abs().max().item()}"
        else:
            torch.testing.assert_close(a, b)
    assert (python.allocations, python.peak) == (cpp.allocations, cpp.peak), (
        f"allocations {python.allocations} and {cpp.allocations}, peak {python.peak} and {cpp.peak}"
    )
    return f"{cpp.allocations:>6}{cpp.peak / 1024:>10.1f}{python.micros:>10.0f}{cpp.micros:>10.0f}"


def compiled_pair(function: Callable[..., object], **options: object) -> list[Callable[..., object]]:
    out: list[Callable[..., object]] = []
    for wrapper in ("python", "cpp"):
        torch._dynamo.reset()
        out.append(torch.compile(copy.copy(function), backend="memplan", options={"wrapper": wrapper, **options}))
    return out


def pointwise(x: Tensor, y: Tensor) -> Tensor:
    y += 1
    return (x * 2).relu() + x.sum(1, keepdim=True)


def misaligned(device: str) -> str:
    for wrapper in ("python", "cpp"):
        torch._dynamo.reset()
        compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": wrapper})
        store = torch.randn(100, device=device)
        x, y = store[1:65].view(8, 8), store[70:78]
        before = y.clone()
        torch.testing.assert_close(compiled(x, y), (x * 2).relu() + x.sum(1, keepdim=True))
        assert torch.equal(y, before + 1), "the input itself has to change"
    return ""


def in_a_new_thread(device: str) -> str:
    """A thread that has not used the GPU has no context of its own."""
    torch._dynamo.reset()
    compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": "cpp"})
    x, y = torch.randn(8, 8, device=device), torch.randn(8, device=device)
    expected, seen = compiled(x, y), list[object]()

    def run() -> None:
        try:
            seen.append(compiled(x, y))
        except Exception as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert isinstance(seen[0], Tensor), seen
    assert torch.equal(seen[0], expected)  # type: ignore[arg-type]
    return ""


def on_another_gpu(device: str) -> str:
    if device == "cpu" or torch.cuda.device_count() < 2:
        return "no second GPU"
    for wrapper in ("python", "cpp"):
        torch._dynamo.reset()
        compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": wrapper})
        x, y = torch.randn(8, 8, device="cuda:1"), torch.randn(8, device="cuda:1")
        torch.testing.assert_close(compiled(x, y), (x * 2).relu() + x.sum(1, keepdim=True))
        assert torch.cuda.current_device() == 0
    return ""


def on_another_stream(device: str) -> str:
    if device == "cpu":
        return "a GPU's"
    torch._dynamo.reset()
    compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": "cpp"})
    x, y = torch.randn(2048, 2048, device=device), torch.zeros(2048, device=device)
    compiled(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.ones_like(x)
        for _ in range(50):
            late = late @ x * 1e-3  # the stream is busy: a launch on another one would come too early
        out = compiled(late, y)
        expected = (late * 2).relu() + late.sum(1, keepdim=True)
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)
    return ""


def captured_by_hand(device: str) -> str:
    """``torch.cuda.graph`` around a call, replayed with other numbers."""
    if device == "cpu":
        return "a GPU's"
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Perceptron().to(device).requires_grad_(False)
    compiled = torch.compile(model, backend="memplan", options={"wrapper": "cpp"})
    x = torch.randn(8, 256, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compiled(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, compiled(x))
    return ""


def recorded(device: str) -> str:
    """``cuda_graphs=True``, trained: both wrappers, recorded and replayed, give the same."""
    if device == "cpu":
        return "a GPU's"
    case = Case("recorded", Perceptron, floats(256), options={"cuda_graphs": True})
    python, cpp = (measure(case, w, True, device) for w in ("python", "cpp"))
    for a, b in zip(python.tensors, cpp.tensors, strict=True):
        assert torch.equal(a, b)
    return f"{'':>16}{python.micros:>10.0f}{cpp.micros:>10.0f}"


def error_of(run: Callable[[], object]) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


def after_an_error(device: str) -> str:
    """What an operator refuses is its own error, and the next call works."""
    torch._dynamo.reset()
    # the operator itself checks; where the check is one of its own, AOTAutograd of torch 2.11 drops it for any compiler
    compiled = torch.compile(lambda x: torch.linalg.eigh(x)[0] * 2 + 1, backend="memplan", options={"wrapper": "cpp"})
    good, expected = torch.eye(3, device=device) * 4, torch.full((3,), 9.0, device=device)
    torch.testing.assert_close(compiled(good), expected)
    refused = error_of(lambda: compiled(good * float("nan")))
    assert isinstance(refused, torch.linalg.LinAlgError), repr(refused)
    assert "linalg.eigh" in str(refused), str(refused)
    torch.testing.assert_close(compiled(good), expected)
    return ""


def out_of_memory(device: str) -> str:
    """torch's own error, with the plan at the step that ran."""
    if device == "cpu":
        return "a GPU's"
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: (x[:, None] + x[None, :]).sort(0).values.sum(0) * 2, backend="memplan", options={"wrapper": "cpp"}
    )
    total = torch.cuda.get_device_properties(0).total_memory
    refused = error_of(lambda: compiled(torch.randn(int(total**0.5), device=device)))
    assert isinstance(refused, torch.OutOfMemoryError), repr(refused)
    assert "step" in str(refused), str(refused)[-300:]
    torch.cuda.empty_cache()
    return ""


CHECKS: list[Callable[[str], str]] = [
    misaligned,
    in_a_new_thread,
    on_another_stream,
    on_another_gpu,
    captured_by_hand,
    recorded,
    after_an_error,
    out_of_memory,
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="only checks whose name has this text")
    given = parser.parse_args(arguments)
    torch.backends.cudnn.deterministic = True  # its quickest gradients of weights add in no fixed order
    where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}")
    print(f"{'check':<40}{'':>6}{'allocs':>6}{'peak KiB':>10}{'python us':>10}{'cpp us':>10}{'s':>6}")
    jobs: list[tuple[str, Callable[[], str]]] = []
    for case in CASES:
        for train in (True, False):
            name = f"{case.name}, {'training' if train else 'inference'}"
            jobs.append((name, lambda case=case, train=train: compare(case, train, given.device)))  # type: ignore[misc]
    jobs += [(check.__name__.replace("_", " "), lambda check=check: check(given.device)) for check in CHECKS]  # type: ignore[misc]
    failed = 0
    begin = time.perf_counter()
    for name, job in jobs:
        if given.only not in name:
            continue
        started = time.perf_counter()
        try:
            text, row = "ok", job()
        except Exception:
            failed += 1
            text, row = "WRONG", "\n" + traceback.format_exc(limit=-6)
        print(f"{name:<40}{text:>6}{row:<36}{time.perf_counter() - started:>6.1f}", flush=True)
    print(f"{failed} failed, {time.perf_counter() - begin:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
