"""Kernels that cannot be built, and no compiler at all: one warning each, and the model runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import sympy
import torch
from torch import Tensor, nn

from memplan import kernels as kernel_sets
from memplan.codegen import cpp_kernel
from memplan.codegen.triton_kernel import TritonKernel
from memplan.fallback import FallbackWarning, with_fallback
from memplan.ir.canonical import canonicalize
from memplan.ir.config import Config
from memplan.ir.errors import CompilerError, LoweringError, UnsupportedError
from memplan.ir.loops import Call
from memplan.ir.program import Phase, Program
from memplan.lowering import call_site
from memplan.runtime.build import build_library
from memplan.runtime.triton_build import Target
from memplan.runtime.triton_launch import IndexLimitError, widening
from tests.models.against_eager import check
from tests.sample_kernels import add_relu


class Sines(nn.Module):
    """Two kernels that a matmul keeps apart: one with a sine, one with a hyperbolic tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.sin(x) + 1.5
        out: Tensor = torch.tanh(self.linear(first)) * 2.0
        return out


def fallback_warnings(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


def inputs() -> list[object]:
    return [torch.randn(4, 16, requires_grad=True)]


def refuse_kernels_with(monkeypatch: pytest.MonkeyPatch, operation: str, error: Exception) -> None:
    """The C++ emitter fails on kernels that call ``operation``."""
    emit = cpp_kernel.emit_cpp

    def broken(kernel: object, **options: object) -> str:
        nodes = kernel.kernel.nodes  # type: ignore[attr-defined]
        if any(isinstance(n, Call) and n.op == operation for n in nodes):
            raise error
        return emit(kernel, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cpp_kernel, "emit_cpp", broken)
    monkeypatch.setattr(kernel_sets, "emit_cpp", broken)


@pytest.mark.parametrize("error", [UnsupportedError("no sines"), LoweringError("no sines"), KeyError("no sines")])
def test_a_kernel_that_cannot_be_emitted_runs_as_calls(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    refuse_kernels_with(monkeypatch, "sin", error)
    told = fallback_warnings(lambda: check(Sines(), inputs(), training=False))
    assert len(told) == 1
    assert "aten.sin.default" in told[0]
    assert "no sines" in told[0]
    assert f"{__file__}:" in told[0]
    assert "torch.sin(x)" in told[0]


def test_what_is_left_as_calls_is_only_the_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_kernels_with(monkeypatch, "sin", UnsupportedError("no sines"))
    built: list[str] = []
    collect = kernel_sets.collect

    def watched(program: Program) -> object:
        built.extend(found := list(collect(program).sources))
        return found and collect(program)

    monkeypatch.setattr(kernel_sets, "collect", watched)
    fallback_warnings(lambda: check(Sines(), inputs(), training=False))
    assert sum("tanh" in name for name in built) == 2  # in both rounds
    assert sum("sin" in name for name in built) == 1  # in the first one only


def test_a_kernel_that_the_compiler_refuses_runs_as_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: each library has one function that does not compile."""
    emit = cpp_kernel.emit_cpp

    def broken(kernel: object, **options: object) -> str:
        text = emit(kernel, **options)  # type: ignore[arg-type]
        nodes = kernel.kernel.nodes  # type: ignore[attr-defined]
        bad = any(isinstance(n, Call) and n.op in ("sin", "cos") for n in nodes)
        return text + "this is no C++;\n" if bad else text

    monkeypatch.setattr(cpp_kernel, "emit_cpp", broken)
    told = fallback_warnings(lambda: check(Sines(), inputs()))
    assert len(told) == 2
    assert "aten.sin.default" in told[0]
    assert "aten.cos.default" in told[1]
    assert all("the C++ compiler refused" in t and "torch.sin(x)" in t for t in told), told


def test_everything_broken_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kernel: object, **options: object) -> str:
        raise AssertionError("broken on purpose")

    monkeypatch.setattr(cpp_kernel, "emit_cpp", broken)
    monkeypatch.setattr(kernel_sets, "emit_cpp", broken)
    told = fallback_warnings(lambda: check(Sines(), inputs()))
    assert told
    assert all("broken on purpose" in t for t in told)


def test_a_lowering_that_fails_leaves_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(site: object) -> None:
        raise KeyError("broken on purpose")

    monkeypatch.setitem(call_site.LOWERINGS, "aten.tanh.default", broken)
    told = fallback_warnings(lambda: check(Sines(), inputs(), training=False))
    assert len(told) == 1
    assert "aten.tanh.default" in told[0]
    assert "broken on purpose" in told[0]
    assert "torch.tanh" in told[0]


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_without_a_compiler_everything_is_a_call(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.delenv("MEMPLAN_WRAPPER", raising=False)  # C++ that is asked for by name cannot do without
    told = fallback_warnings(lambda: check(Sines(), inputs(), training=False))
    assert len(told) == 1
    assert "apt install g++" in told[0]
    assert compiler in told[0]


def test_training_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers, norms, losses and in-place changes of buffers: all of it as torch's calls."""
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.delenv("MEMPLAN_WRAPPER", raising=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten())
    model.extend((nn.Linear(144, 5), nn.LayerNorm(5), nn.Dropout(0.5)))
    told = fallback_warnings(lambda: check(model, [torch.randn(2, 3, 8, 8, requires_grad=True)], random="eager"))
    assert 1 <= len(told) <= 2  # forward and backward


def test_an_attempt_that_never_succeeds_ends() -> None:
    """Not one warning after the other for ever: the error itself, once there is nothing left to leave alone."""
    program = Program("p", Phase.INFERENCE, {}, (), (), ())
    attempts = 0

    def attempt(kept: object) -> None:
        nonlocal attempts
        attempts += 1
        raise LoweringError("always", operation="nothing")

    with pytest.raises(LoweringError, match="always"):
        with_fallback(program, attempt)
    assert attempts <= 2


def test_a_missing_tool_in_the_middle_is_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that passes the probe and then refuses every library."""

    def refuse(*arguments: object, **options: object) -> object:
        raise CompilerError("the disk is on fire")

    assert kernel_sets.build_library is build_library
    monkeypatch.setattr(kernel_sets, "build_library", refuse)
    told = fallback_warnings(lambda: check(Sines(), inputs(), training=False))
    assert 1 <= len(told) <= 3
    assert all("on fire" in t for t in told)


def test_sizes_beyond_32_bits_get_a_kernel_that_counts_in_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first such launch builds it; smaller ones still use the quick one."""
    launched: list[tuple[str, int]] = []

    class Recorder:
        def __init__(self, kernel: TritonKernel, compiled: object, device: int) -> None:
            self.kind = "wide" if "tl.int64" in kernel.source else "narrow"

        def __call__(self, stream: int, *arguments: int) -> None:
            launched.append((self.kind, arguments[-1]))

    class Narrow:
        def __call__(self, stream: int, *arguments: int) -> None:
            if arguments[-1] >= 2**31:
                raise IndexLimitError("too large")
            launched.append(("narrow", arguments[-1]))

    monkeypatch.setattr(kernel_sets, "make_launcher", Recorder)
    monkeypatch.setattr(Target, "current", staticmethod(Target))
    size = sympy.Symbol("s0", integer=True, positive=True)
    canonical = canonicalize(add_relu(size))
    wide = partial(kernel_sets.build_wide, "cuda:0", canonical, "k", {size: 64}, False, Config())
    launch = widening(Narrow(), wide)  # type: ignore[arg-type]
    for n in (64, 2**31, 128, 2**32):
        launch(0, 0, 0, 0, n)
    assert launched == [("narrow", 64), ("wide", 2**31), ("narrow", 128), ("wide", 2**32)]


def test_a_saved_value_that_is_itself_a_gradient_outlives_the_backward() -> None:
    """Of no bytes, the zeros cost nothing to keep: the backward returns its own donated input."""
    x, y = torch.randn(0, 1, 3, requires_grad=True), torch.randn(0, 10, 3, requires_grad=True)
    torch.compile(torch.nextafter, backend="memplan")(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert y.grad is not None
    assert y.grad.shape == y.shape


def test_zeros_without_storage_are_ordinary_ones() -> None:
    """Second derivatives meet them: no kernel may write over them, and poison has nothing to fill."""

    class Hessian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.hessian(lambda y: (torch.sin(y @ self.weight) ** 2).sum())(x)

    check(Hessian(), (torch.randn(4, requires_grad=True),), fullgraph=False, poison=True)


def test_a_sparse_gradient_is_refused_before_anything_runs() -> None:
    table = torch.compile(nn.Embedding(20, 6, sparse=True), backend="memplan")
    with pytest.raises(Exception, match=r"layout torch.sparse_coo .*sparse=False") as caught:
        table(torch.randint(0, 20, (3, 5)))
    reasons = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(r, UnsupportedError) for r in reasons)


def _scaled_and_clamped(x: torch.Tensor) -> object:
    number = x.abs().max().item()
    return x * number, torch.pow(x.abs(), number), x.clamp(max=number / 2), number


def _computed_of_a_number(x: torch.Tensor) -> object:
    number = x.sum().item()
    return x * (number * 2.5 + 1), torch.full((3,), number), torch.add(x, x, alpha=number)


def _truth_and_whole_numbers(x: torch.Tensor) -> object:
    return x + (x > 0).any().item(), x * int(x.abs().sum().item())


@pytest.mark.filterwarnings("error::memplan.fallback.FallbackWarning")
@pytest.mark.parametrize("function", [_scaled_and_clamped, _computed_of_a_number, _truth_and_whole_numbers])
@pytest.mark.parametrize("wrapper", ["auto", "python"])
def test_numbers_taken_out_of_tensors_inside_of_a_graph(function: Callable[..., object], wrapper: str) -> None:
    """Floats and truth values are no sizes, and no arguments of kernels."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, backend="memplan", fullgraph=True, options={"wrapper": wrapper})
        for x in (torch.tensor([[1.5, -0.25, 3.125]]), torch.tensor([[-1.75, 0.25, 0.125]]), -torch.ones(1, 3)):
            torch.testing.assert_close(compiled(x), function(x))


class RaisesAfterCounting(nn.Module):
    """Running statistics, counters, an operator that may raise, and more of them after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        out: Tensor = self.second(_at_most_100(self.first(x) + x))
        return out


@torch.library.custom_op("memplan_tests::at_most_100", mutates_args=())
def _at_most_100(x: Tensor) -> Tensor:
    if bool((x > 100).any()):
        raise ValueError("more than 100")
    return x.clone()


_at_most_100.register_fake(torch.empty_like)
_at_most_100.register_autograd(lambda ctx, grad: grad)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_an_operator_that_raises_leaves_whole_buffers(wrapper: str, training: bool) -> None:
    """Each as it was before the call, or as eager leaves it; and the next step goes on from there."""
    torch._dynamo.reset()
    eager, ours = RaisesAfterCounting(), RaisesAfterCounting()
    ours.load_state_dict(eager.state_dict())
    compiled = torch.compile(ours, backend="memplan", options={"wrapper": wrapper})
    x = torch.randn(4, 3)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), eager(x))
        before = {name: b.clone() for name, b in ours.named_buffers()}
        for function in (compiled, eager):
            with pytest.raises(ValueError, match="more than 100"):
                function(x + 500)
        after = dict(eager.named_buffers())
        for name, found in ours.named_buffers():
            assert torch.equal(found, before[name]) or torch.allclose(found, after[name]), name
        eager.load_state_dict(ours.state_dict())
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(ours.state_dict(), eager.state_dict())
