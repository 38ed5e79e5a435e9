"""Traces from the cache: right answers whatever was traced before, hits for what is equal, misses for what is not."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan import backend, plan_cache, trace_cache
from memplan.ir.config import Config
from memplan.ir.program import Phase
from memplan.region import Region
from memplan.runtime.cache import CacheWarning
from memplan.trace_key import UntoldError, _inputs, switched_off

Options = dict[str, object]
Function = Callable[..., Any]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return {"plan_cache": True, "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that AOTAutograd hands over, and so has traced."""
    found: list[str] = []
    for phase in Phase:
        name = f"compile_{phase.value}"
        original = getattr(Region, name)

        def watched(self, module, inputs, phase=phase, original=original):  # type: ignore[no-untyped-def]
            found.append(phase.value)
            return original(self, module, inputs)

        monkeypatch.setattr(Region, name, watched)
    return found


class Block(nn.Module):
    """A constant, saved values, dropout's place, a kernel and products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(self.norm(x) * scale)))
        return out


class Moved(Block):
    """The same graph from other lines."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(self.norm(x) * scale)))
        return out


def leaves(value: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def ran(function: Function, inputs: Sequence[object], backward: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of what takes part: parameters, inputs; then the inputs, which may have been changed."""
    torch.manual_seed(1)
    out = function(*inputs)
    results = [t.detach().clone() for t in leaves(out)]
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    wanted = [t for t in leaves(out) if t.requires_grad]
    if backward and wanted:
        torch.stack([t.abs().square().sum() for t in wanted]).sum().backward()
    grads = [t.grad.clone() for t in (*parameters, *leaves(inputs)) if t.is_leaf and t.grad is not None]
    return results, grads + [t.detach().clone() for t in leaves(inputs)]


def check(
    options: Options,
    make: Callable[[], Function] = Block,
    inputs: Callable[[], Sequence[object]] = lambda: (torch.randn(5, 8, requires_grad=True),),
    *,
    backward: bool = True,
    dynamic: bool | None = False,
) -> None:
    """A compiled function against eager, in what is a new process to Dynamo."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function = make()
    torch.manual_seed(0)
    given = inputs()
    torch.manual_seed(0)
    again = inputs()
    twin = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    expected = ran(function, given, backward)
    compiled = torch.compile(twin, backend="memplan", options=options, dynamic=dynamic)
    found = ran(compiled, again, backward)
    for e, f in zip(expected, found, strict=True):
        assert len(e) == len(f)
        for a, b in zip(e, f, strict=True):
            torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)


def entries(options: Options, suffix: str = ".trace") -> list[Path]:
    return sorted(Path(str(options["cache_dir"])).rglob(f"*{suffix}"))


TRAINING = ["forward", "backward"]


def test_what_was_traced_is_not_traced_again(options: Options, traced: list[str]) -> None:
    check(options)
    assert traced == TRAINING
    assert len(entries(options)) == 1
    check(options)
    assert traced == TRAINING
    check({**options, "trace_cache": False})
    assert traced == TRAINING * 2
    check({**options, "plan_cache": False})
    assert traced == TRAINING * 3


SCRIPT = """
import hashlib, json, sys, torch
import memplan
from memplan.region import Region
traced = []
for phase in ("forward", "backward", "inference"):
    def watched(self, module, inputs, phase=phase, original=getattr(Region, f"compile_{phase}")):
        traced.append(phase)
        return original(self, module, inputs)
    setattr(Region, f"compile_{phase}", watched)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)
)
x = torch.randn(4, 8, requires_grad=True)
digest = hashlib.sha256()
with memplan.record() as recording:
    compiled = torch.compile(model, backend="memplan")
    for _ in range(3):
        torch.manual_seed(3)
        out = compiled(x)
        out.square().sum().backward()
        for t in (out, x.grad, *(p.grad for p in model.parameters())):
            digest.update(t.detach().numpy().tobytes())
    with torch.no_grad():
        digest.update(compiled.eval()(x).numpy().tobytes())
report = hashlib.sha256(memplan.report(recording).json().encode()).hexdigest()
print(json.dumps([digest.hexdigest(), report, max(max(p.timeline) for p in recording.plans), traced]))
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    told = {"MEMPLAN_CACHE_DIR": str(folder), "MEMPLAN_PLAN_CACHE": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **told, **environment}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return list(json.loads(out.splitlines()[-1]))


def test_another_process_has_the_same_bits_and_the_same_report(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]  # at once: one may have what the other has just kept
    *first, traced = finished(both[0])
    *second, also_traced = finished(both[1])
    everything = ["forward", "backward", "inference"]
    assert first == second
    assert {*traced, *also_traced} == set(everything)
    assert finished(start(tmp_path)) == [*first, []]
    assert finished(start(tmp_path, MEMPLAN_TRACE_CACHE="0")) == [*first, everything]


def test_a_recording_is_the_same(options: Options, traced: list[str]) -> None:
    with memplan.record() as first:
        check(options)
    with memplan.record() as again:
        check(options)
    assert traced == TRAINING
    for a, b in zip(first.graphs, again.graphs, strict=True):
        assert (a.plan.order, a.plan.timeline, a.plan.placements) == (b.plan.order, b.plan.timeline, b.plan.placements)
        assert [op.origins for op in a.plan.program.operations] == [op.origins for op in b.plan.program.operations]
        assert (a.joins, a.waterfall, a.activations, a.eager) == (b.joins, b.waterfall, b.activations, b.eager)
    numbered = re.compile(r"(forward|backward)\d+")  # regions count up in a process
    told = [numbered.sub(r"\1", memplan.report(r).json()) for r in (first, again)]
    assert told[0] == told[1]


# -- what a hit has to do --------------------------------------------------------------------------------------------


def changed_input(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2).add_(y.sin())
    return x * y


def aliases(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = y.exp()
    return x, x[1:], z, z.t(), z[0], y.view(-1)


def nothing_and_more(x: Tensor, y: Tensor) -> tuple[object, ...]:
    return None, 3, x.sin().detach(), (y * 2, {"k": x + y})


def broken(x: Tensor, y: Tensor) -> Tensor:
    z = x.sin() * y
    torch._dynamo.graph_break()
    w = z.cos() + x
    torch._dynamo.graph_break()
    return w * z


def checkpointed(x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = torch.utils.checkpoint.checkpoint(lambda a, b: (a @ b.t()).sin() @ b, x, y, use_reentrant=False)
    return out


class Normalised(nn.Module):
    """Buffers that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8).requires_grad_(), torch.randn(6, 8)


def plain_two() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8), torch.randn(6, 8).requires_grad_()


def conjugated() -> tuple[Tensor, Tensor]:
    return torch.randn(4, dtype=torch.cfloat).conj(), torch.randn(4).requires_grad_()


def with_complex(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).real


def plain(x: Tensor, y: Tensor) -> Tensor:
    return x.sin() * y


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: changed_input, plain_two),
        (lambda: aliases, two),
        (lambda: nothing_and_more, two),
        (lambda: broken, two),
        (lambda: checkpointed, two),
        (Normalised, lambda: (torch.randn(2, 3, 9, 9),)),
        (lambda: with_complex, conjugated),
        (lambda: plain, lambda: (torch.randn(4), torch.randn(4))),
    ],
    ids=["changed", "aliases", "nothing", "breaks", "checkpoint", "buffers", "conj", "inference"],
)
def test_a_hit_does_as_eager(
    options: Options, traced: list[str], make: Callable[[], Function], inputs: Callable[[], Any]
) -> None:
    check(options, make, inputs)
    cold = list(traced)
    assert cold
    check(options, make, inputs)
    assert traced == cold


@pytest.mark.parametrize(
    "given", [{"pools": "always"}, {"budget": "40 KB"}, {"random": "eager"}, {"wrapper": "python"}]
)
def test_a_hit_goes_with_options(options: Options, traced: list[str], given: Options) -> None:
    def dropping() -> nn.Module:
        return (
            nn.Sequential(Block(), nn.Dropout(0.5), Block()) if "random" in given else nn.Sequential(Block(), Block())
        )

    for _ in range(2):
        check({**options, **given}, dropping, lambda: (torch.randn(64, 8, requires_grad=True),))
    assert traced == TRAINING


def test_graphs_that_are_kept_and_hooks_go_with_a_hit(options: Options, traced: list[str]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Block()
        x = torch.randn(5, 8)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        compiled = torch.compile(model, backend="memplan", options={**options, "pools": "always"})
        loss = compiled(x).square().sum()
        for keep in (True, True, False):
            found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep)
            torch.testing.assert_close(found, expected)
        ahead = [compiled(x).square().sum() for _ in range(2)]
        for loss in ahead:
            torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = compiled(x).square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
    assert traced == TRAINING


def test_sizes_that_vary(options: Options, traced: list[str]) -> None:
    def sized(x: Tensor) -> Tensor:
        return (x.softmax(0) * x.shape[0] if x.shape[0] > 3 else x.cos()) * x.shape[1]

    def of(rows: int) -> None:
        check(options, lambda: sized, lambda: (torch.randn(rows, 7, requires_grad=True),), dynamic=True)

    of(5)
    assert traced == TRAINING
    of(5)
    assert traced == TRAINING
    of(6)  # the plan is made for the sizes that are seen first
    assert traced == TRAINING * 2
    of(2)
    assert traced == TRAINING * 3
    torch._dynamo.reset()
    compiled = torch.compile(sized, backend="memplan", options=options, dynamic=True)
    for rows in (5, 9, 3, 2, 6):  # what a hit was guarded by is guarded by again
        x = torch.randn(rows, 7)
        torch.testing.assert_close(compiled(x.clone().requires_grad_()), sized(x), check_dtype=False)
    assert "inference" not in traced


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


# -- what may be wrong with an entry ---------------------------------------------------------------------------------


def damage(path: Path, change: Callable[[bytes], bytes], *, honest: bool) -> None:
    """Other bytes in an entry; ``honest``: under the name that they have."""
    data = change(path.read_bytes())
    path.unlink()
    name = path.name if not honest else f"{path.name[:64]}-{hashlib.sha256(data).hexdigest()}.trace"
    (path.parent / name).write_bytes(data)
    (path.parent / name).chmod(0o600)


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize(
    "change", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * 400], ids=["none", "half", "other"]
)
def test_a_damaged_entry_is_made_again(
    options: Options, traced: list[str], change: Callable[[bytes], bytes], honest: bool
) -> None:
    check(options)
    damage(entries(options)[0], change, honest=honest)
    check(options)
    assert traced == TRAINING * 2
    check(options)
    assert traced == TRAINING * 2


def test_what_others_may_write_is_not_read(options: Options, traced: list[str]) -> None:
    check(options)
    entries(options)[0].chmod(0o666)
    check(options)
    assert traced == TRAINING * 2


def test_without_plans_and_libraries_a_trace_still_serves(options: Options, traced: list[str]) -> None:
    check(options)
    for path in (*entries(options, ".plan"), *entries(options, ".so")):
        path.unlink()
    check(options)
    assert traced == TRAINING
    assert len(entries(options, ".plan")) == 2


def test_an_entry_that_cannot_be_used_is_traced(
    options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check(options)

    def fails(self: object, *given: object) -> object:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Region, "restored", lambda self, step: fails)
        check(options)
    assert traced == TRAINING * 2
    assert "a kept trace cannot be used" in caplog.text


def test_a_directory_that_cannot_be_written(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning):
        check({**options, "cache_dir": str(tmp_path / "file")})


@pytest.mark.parametrize("missing", ["make_entry", "save", "_lookup", "evaluate_guards"])
def test_a_torch_with_another_interface(
    options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    assert trace_cache.interface() is not None
    monkeypatch.setattr(AOTAutogradCache, missing, staticmethod(lambda other: None))
    assert trace_cache.interface() is None
    for _ in range(2):
        check(options)
    assert traced == TRAINING * 2


def test_other_threads_have_torchs_own() -> None:
    """An autograd thread may be compiling for Inductor meanwhile."""
    seen: list[object] = []

    class Owner:
        @staticmethod
        def save(key: str) -> str:
            return f"torch's {key}"

    before = vars(Owner)["save"]
    with trace_cache._replaced(Owner, {"save": lambda key: f"ours {key}"}):
        seen.append(Owner.save("a"))
        thread = threading.Thread(target=lambda: seen.append(Owner.save("b")))
        thread.start()
        thread.join()
    assert seen == ["ours a", "torch's b"]
    assert vars(Owner)["save"] is before


def test_a_backward_that_is_traced_into_a_larger_one(options: Options, traced: list[str]) -> None:
    """Compiled autograd takes the backward's graph, which an entry has."""
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Block(), torch.randn(5, 8)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        loss = torch.compile(model, backend="memplan", options=options)(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert traced == TRAINING


def test_torchs_own_cache_is_as_before(options: Options) -> None:
    import torch._functorch._aot_autograd.autograd_cache as found

    before = (found.autograd_cache_key, dict(vars(found.AOTAutogradCache)))
    check(options)
    assert (found.autograd_cache_key, dict(vars(found.AOTAutogradCache))) == before


def test_a_budget_that_cannot_be_met_is_refused_warm_too(options: Options) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="the budget of 100 B cannot be met"):
            check({**options, "budget": 100})
