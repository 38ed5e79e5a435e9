"""A backward whose graph is kept computes what the plain one does, bit for bit: it runs the same kernels and calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memplan
import memplan.kernels
import memplan.region
from memplan.compilation import CompiledProgram
from memplan.ir.loops import Kernel
from memplan.ir.plan import Plan
from memplan.ir.program import Extern, Phase
from memplan.ir.verify import verify_program
from memplan.ir.verify_plan import verify_plan
from memplan.kernels import collect
from tests.fake_gpu import make_fake_gpu
from tests.models.blocks import FeedForward


class ConvNet(nn.Module):
    """Convolutions with batch norm, a residual, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x)).mean((2, 3)))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """Causal attention and a feed-forward, as in GPT-2, over embeddings."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.feed_forward(x + self.out(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class _AddedToSaved(torch.autograd.Function):
    """Its backward adds to rows of what was saved: clone elimination lets it write over a donated input."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: Tensor) -> Tensor:
        made = x.exp()
        ctx.save_for_backward(made, rows)
        return made.sin()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        made, rows = ctx.saved_tensors  # type: ignore[attr-defined]
        return made.index_add(0, rows, grads[0][: len(rows)]).cumsum(1), None


class Scatters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("rows", torch.tensor([3, 1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return _AddedToSaved.apply(self.linear(x), self.rows)  # type: ignore[no-any-return, no-untyped-call]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(FeedForward(24), FeedForward(24), nn.LayerNorm(24)), (8, 24)),
    "conv": (ConvNet, (4, 3, 8, 8)),
    "decoder": (lambda: nn.Sequential(DecoderBlock(), DecoderBlock()), (2, 8, 32)),
    "scatter": (Scatters, (8, 16)),
}


class Compiled:
    """A model compiled in poison mode, and its backward as it was compiled."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
        make, sizes = MODELS[name]
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model, self.x = make(), torch.randn(sizes)
        self.programs: list[CompiledProgram] = []
        real = memplan.region.compile_program

        def compile_program(*args: object) -> CompiledProgram:
            self.programs.append(real(*args))  # type: ignore[arg-type]
            return self.programs[-1]

        monkeypatch.setattr(memplan.region, "compile_program", compile_program)
        self.call = torch.compile(self.model, backend="memplan", options={"poison": True, **options})
        self.plain = self.gradients(self.loss())

    def loss(self) -> Tensor:
        return self.call(self.x).float().square().mean()  # type: ignore[no-any-return]

    def gradients(self, loss: Tensor, *, retain: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=retain)

    @property
    def backward(self) -> CompiledProgram:
        (found,) = (p for p in self.programs if p.plan.program.phase is Phase.BACKWARD)
        return found

    @property
    def plans(self) -> tuple[Plan, Plan]:
        """Of the plain backward and of that which keeps its graph."""
        return self.backward.plan, self.backward.keeping().plan

    def check_gradients(self) -> None:
        loss = self.loss()
        for retain in (True, True, False):
            for a, b in zip(self.gradients(loss, retain=retain), self.plain, strict=True):
                assert torch.equal(a, b), f"retain_graph={retain}"


def refuse_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memplan.kernels, "build", lambda *_: pytest.fail("kernels are built again"))


def changed(plan: Plan) -> set[str]:
    """Inputs that the plan's program changes, or that something takes the place of."""
    program = plan.program
    inputs = {n for n, b in program.buffers.items() if b.kind.value == "input"}
    return {plan.storage_of(b) for op in program.operations for b in (*op.writes, *op.mutates)} & inputs


def kernels(plan: Plan) -> dict[str, tuple[str, Kernel]]:
    """By name the device and the kernel: all that its source is printed from."""
    return {n: (device, k.kernel) for n, (device, k) in collect(plan.program).sources.items()}


def calls(plan: Plan) -> list[tuple[str, str]]:
    return [(op.name, op.target) for op in plan.program.operations if isinstance(op, Extern)]


def check_plans(plain: Plan, kept: Plan) -> None:
    for plan in (plain, kept):
        verify_program(plan.program)
        verify_plan(plan)
    assert kernels(plain) == kernels(kept)
    assert calls(plain) == calls(kept)
    assert any(b.donated for b in plain.program.buffers.values())
    assert not any(b.donated for b in kept.program.buffers.values())
    assert changed(plain)
    assert not changed(kept)


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_graph_gives_the_same_bits(name: str, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(name, monkeypatch, wrapper=wrapper)
    refuse_builds(monkeypatch)
    compiled.check_gradients()
    check_plans(*compiled.plans)


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_runs_the_same_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make_fake_gpu(monkeypatch)
    compiled = Compiled(name, monkeypatch, pools="always")
    refuse_builds(monkeypatch)
    runs = []
    loss = compiled.loss()
    for retain in (True, True, False):
        fake.reset()
        found = compiled.gradients(loss, retain=retain)
        assert all(torch.equal(a, b) for a, b in zip(found, compiled.plain, strict=True)), f"retain_graph={retain}"
        runs.append(sorted((launch.kernel, launch.grid, launch.block) for launch in fake.launches()))
    assert runs[0]
    assert runs[0] == runs[1] == runs[2]
    check_plans(*compiled.plans)


def test_what_memory_decides_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusion is not asked again for a kept graph: there, nothing that it spares the plain one would be spared."""
    compiled = Compiled("mlp", monkeypatch)
    monkeypatch.setattr("memplan.compilation.run_pipeline", lambda *_, **__: pytest.fail("passes run again"))
    compiled.check_gradients()


def test_a_plan_from_the_cache_has_its_kept_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Compiled("mlp", monkeypatch, plan_cache=True, cache_dir=str(tmp_path))
    refuse_builds(monkeypatch)
    second = Compiled("mlp", monkeypatch, plan_cache=True, cache_dir=str(tmp_path))
    second.check_gradients()
    for a, b in zip(first.plain, second.plain, strict=True):
        assert torch.equal(a, b)
    check_plans(*second.plans)


def test_hooks_get_the_variant_that_leaves_what_they_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled("scatter", monkeypatch)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = compiled.loss()
    for a, b in zip(compiled.gradients(loss), compiled.plain, strict=True):
        assert torch.equal(a, b)
