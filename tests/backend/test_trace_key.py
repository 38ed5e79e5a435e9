"""What decides a trace: misses for what differs, and what is traced each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import memplan
from memplan import backend, plan_cache, trace_cache
from memplan.ir.config import Config
from memplan.trace_key import UntoldError, _inputs, switched_off
from tests.backend.again import TRAINING, Function, Moved, Options, check, entries, two


def test_a_range_of_sizes_is_not_forgotten(options: Options, traced: list[str]) -> None:
    def sized(x: Tensor) -> Tensor:
        return x.sin() if x.shape[0] <= 16 else x.cos()

    for most in (16, None):
        torch._dynamo.reset()
        compiled = torch.compile(sized, backend="memplan", options=options)
        x = torch.randn(5)
        torch._dynamo.mark_dynamic(x, 0, **({"min": 2, "max": most} if most else {}))
        torch.testing.assert_close(compiled(x), x.sin())
        y = torch.randn(20)
        torch.testing.assert_close(compiled(y), y.cos())


# -- what makes a miss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"recompute_time": 0.0},
        {"disable": ["rematerialize"]},
        {"pools": "always"},
        {"loss_chunk": 0},
        {"verify": False},
    ],
)
def test_other_options_miss(options: Options, traced: list[str], change: Options) -> None:
    check(options)
    check({**options, **change})
    assert traced == TRAINING * 2


def test_other_lines_miss(options: Options, traced: list[str]) -> None:
    check(options)
    with memplan.record() as recording:
        check(options, Moved)
    assert traced == TRAINING * 2
    lines = {o.line for g in recording.graphs for op in g.plan.program.operations for o in op.origins}
    first = Moved.forward.__code__.co_firstlineno
    assert lines & set(range(first, first + 6))


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: (torch.randn(6, 8, requires_grad=True),),
        lambda: (torch.randn(5, 8),),
        lambda: (torch.randn(8, 5).t().requires_grad_(),),
        lambda: (torch.randn(6, 8)[1:].requires_grad_(),),
    ],
    ids=["rows", "gradient", "strides", "offset"],
)
def test_other_inputs_miss(options: Options, traced: list[str], inputs: Callable[[], Any]) -> None:
    check(options)
    check(options, inputs=inputs)
    assert traced == TRAINING * 2


def test_other_types_miss(options: Options, traced: list[str]) -> None:
    check(options, lambda: torch.sin, lambda: (torch.randn(4),), backward=False)
    check(options, lambda: torch.sin, lambda: (torch.randn(4).double(),), backward=False)
    assert traced == ["inference"] * 2


def test_memory_that_inputs_share_is_not_forgotten(options: Options, traced: list[str]) -> None:
    def changed(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y * 2

    def apart() -> tuple[Tensor, Tensor]:
        return torch.randn(12)[0:8], torch.randn(12)[2:10]

    def shared() -> tuple[Tensor, Tensor]:
        base = torch.randn(12)
        return base[0:8], base[2:10]

    def same() -> tuple[Tensor, Tensor]:
        base = torch.randn(12)[0:8]
        return base, base

    for inputs in (apart, shared, same, apart, shared, same):
        for dynamic in (False, True):
            check(options, lambda: changed, inputs, backward=False, dynamic=dynamic)


SWITCHES: dict[str, Callable[[bool], object]] = {
    "deterministic": torch.use_deterministic_algorithms,
    "flash": lambda on: torch.backends.cuda.enable_flash_sdp(not on),
    "math": lambda on: torch.backends.cuda.enable_math_sdp(not on),
    "matmul": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    "mkldnn": lambda on: torch._C._set_mkldnn_enabled(not on),
    "cudnn": torch._C._set_cudnn_deterministic,  # (torch.testing forbids the flag itself to be set)
}


@pytest.mark.parametrize("name", SWITCHES)
def test_other_switches_miss(options: Options, traced: list[str], name: str) -> None:
    check(options)
    SWITCHES[name](True)
    try:
        check(options)
    finally:
        SWITCHES[name](False)
    assert traced == TRAINING * 2
    check(options)
    assert traced == TRAINING * 2


def test_autocast_and_other_modes_miss(options: Options, traced: list[str]) -> None:
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.t()

    check(options, lambda: product, two)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            check(options, lambda: product, two)
    assert traced == TRAINING * 3
    with torch.no_grad():
        check(options, lambda: product, two, backward=False)
    assert traced == [*TRAINING * 3, "inference"]


def test_other_source_or_figures_miss(options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check(options)
    with monkeypatch.context() as patch:
        plan_cache.versions.cache_clear()
        patch.setattr(plan_cache, "source_digest", lambda: "another")
        check(options)
        plan_cache.versions.cache_clear()
    assert traced == TRAINING * 2
    figures = backend.figures_for
    monkeypatch.setattr(backend, "figures_for", lambda *a, **k: replace(figures(*a, **k), launch=77.0))
    check(options)
    assert traced == TRAINING * 3


# -- what is traced each time ----------------------------------------------------------------------------------------


def with_operator(factor: int) -> Function:
    """A function that calls an operator of the user's, defined anew."""

    @torch.library.custom_op("memplan_trace_test::scaled", mutates_args=())
    def scaled(x: Tensor) -> Tensor:
        return x * factor

    @scaled.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    scaled.register_autograd(lambda ctx, grad: grad * factor)
    return lambda x, y: torch.ops.memplan_trace_test.scaled(x) + y


def test_an_operator_whose_source_has_changed(options: Options, traced: list[str]) -> None:
    for factor in (2, 3):
        check(options, lambda: with_operator(factor), two)  # noqa: B023 (called at once)
    assert traced == TRAINING * 2
    assert entries(options) == []


class Doubled(torch.autograd.Function):
    factor = 2

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin() * Doubled.factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * Doubled.factor


def test_a_function_of_autograd_that_has_changed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (2, 3):
        monkeypatch.setattr(Doubled, "factor", factor)
        torch._dynamo.reset()
        x = torch.randn(4, requires_grad=True)
        compiled = torch.compile(lambda x: Doubled.apply(x) + x, backend="memplan", options=options)
        out = compiled(x)
        torch.testing.assert_close(out, x.sin() * factor + x)
        out.sum().backward()
        torch.testing.assert_close(x.grad, torch.full((4,), factor + 1.0))


def test_implementations_that_somebody_registered(options: Options, traced: list[str]) -> None:
    def hyper(x: Tensor, y: Tensor) -> Tensor:
        return torch.special.entr(x.abs()) + y

    check(options, lambda: hyper, two)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("special_entr", lambda x: x * 3, "Autograd")
        assert "aten/special_entr/Autograd" in str(switched_off(Config(), ()))
    assert switched_off(Config(), ()) is None


def test_what_torch_registers_for_vmap_is_its_own() -> None:
    torch.vmap(torch.sin)(torch.randn(2, 3))
    assert "aten/addr/FuncTorchBatched" in torch.library._impls
    assert switched_off(Config(), ()) is None
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("special_entr", lambda x: x * 3, "FuncTorchBatched")
        assert "aten/special_entr/FuncTorchBatched" in str(switched_off(Config(), ()))


class Wrapped(Tensor):
    """A tensor that holds another."""

    @staticmethod
    def __new__(cls, a: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["a"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: object, size: object, stride: object) -> Wrapped:
        return Wrapped(inner["a"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(v: Any) -> Any:
            return v.a if isinstance(v, Wrapped) else v

        def wrap(v: Any) -> Any:
            return Wrapped(v) if isinstance(v, Tensor) else v

        tree = torch.utils._pytree.tree_map
        return tree(wrap, func(*tree(plain, args), **tree(plain, kwargs or {})))


def test_subclasses_are_traced() -> None:
    inputs: list[object] = [torch.zeros(2)]
    _inputs(inputs)
    for odd in (Wrapped(torch.zeros(2)), torch.eye(2).to_sparse(), object(), torch.Generator()):
        with pytest.raises(UntoldError, match="an input is a"):
            _inputs([*inputs, odd])


def test_sizes_of_data_are_traced(options: Options, traced: list[str]) -> None:
    def chosen(x: Tensor) -> Tensor:
        return x[x > 0] * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for _ in range(2):
            check(options, lambda: chosen, lambda: (torch.randn(20),), backward=False)
    assert traced == ["inference"] * 2


def test_large_constants_are_traced(options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_cache, "_MOST_CONSTANTS", 16)
    for _ in range(2):
        check(options)
    assert traced == TRAINING * 2
    assert entries(options) == []


@pytest.mark.parametrize(
    "given", [{"dump": "x"}, {"plan_only": True}, {"cuda_graphs": True}, {"plan_cache": False}, {"trace_cache": False}]
)
def test_where_the_traced_graph_is_needed(given: dict[str, Any]) -> None:
    assert switched_off(replace(Config(), **given), ()) is not None


def test_where_something_else_wants_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switched_off(Config(), ()) is None
    with torch.compiler.config.patch(force_disable_caches=True):
        assert switched_off(Config(), ()) is not None
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert switched_off(Config(), ()) is not None
    with torch._dynamo.config.patch(caching_precompile=True):
        assert switched_off(Config(), ()) is not None
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        assert switched_off(Config(), ()) is not None
    assert switched_off(Config(), ([torch.zeros(1)],)) is not None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert switched_off(Config(), ()) is not None
