"""The wrapper's text, and that it holds no byte longer than the plan says."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan.codegen.python_wrapper import literal, print_python
from memplan.codegen.wrapper_lines import End, Forget, Free, FreePool, wrapper_lines
from memplan.ir.plan import Plan
from memplan.ir.program import EXTERNAL_KINDS, Contract, Program, TensorInput
from memplan.passes.inplace import decide_in_place
from memplan.passes.pools import choose_pools
from memplan.passes.schedule import lifetimes, make_plan, storages
from memplan.runtime.python_runtime import laid_out, namespace, reinterpret_as
from tests.programs import ProgramBuilder


def chain() -> Program:
    """A product, one in place of it, a pair that lies in a pool, and a result whose name the printer uses itself."""
    p = ProgramBuilder()
    x, w, d = p.input("x", (16, 16)), p.input("w", (16, 16)), p.input("d", (16, 16), donated=True)
    a = p.extern("a", "aten.mm.out", (x, w), (16, 16), contract=Contract.OUT)
    b = p.extern("b", "aten.addmm.out", (a, d, w), (16, 16), contract=Contract.OUT)
    c = p.extern("c", "aten.mm.out", (b, w), (16, 16), contract=Contract.OUT)
    e = p.extern("e", "aten.relu.default", (c,), (16, 16))
    return p.program(p.extern("out", "aten.mm.out", (e, w), (16, 16), contract=Contract.OUT))


def planned(program: Program, *, in_place: bool = True, pools: bool = False) -> Plan:
    order = [op.name for op in program.operations]
    pairs = decide_in_place(program, order) if in_place else {}
    stores = storages(program, lifetimes(program, order), pairs)
    pooled = choose_pools(program, order, stores, native=None, always=True) if pools else None
    return make_plan(
        program, order, in_place=pairs, pools=pooled.pools if pooled else (), offsets=pooled.offsets if pooled else None
    )


def wrapper(plan: Plan, *, poison: bool = False) -> tuple[str, Callable[[list[object]], Sequence[Tensor]]]:
    printed = print_python(wrapper_lines(plan, {}), poison=poison)
    names = namespace(printed.operators, {}, {}, {})
    exec(compile(printed.source, "<wrapper>", "exec"), names)
    return printed.source, names["call"]  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["plain", "in_place", "pool", "poison"])
def test_text(kind: str, golden: Callable[[str, str], None]) -> None:
    plan = planned(chain(), in_place=kind != "plain", pools=kind in ("pool", "poison"))
    source, _ = wrapper(plan, poison=kind == "poison")
    assert wrapper(plan, poison=kind == "poison")[0] == source
    golden(f"{kind}.py.txt", source)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_numbers(in_place: bool, pools: bool, poison: bool) -> None:
    _, call = wrapper(planned(chain(), in_place=in_place, pools=pools), poison=poison)
    x, w, d = (torch.randn(16, 16) for _ in range(3))
    expected = torch.relu(torch.addmm(x @ w, d, w) @ w) @ w
    torch.testing.assert_close(call([x, w, d.clone()])[0], expected)


@pytest.mark.parametrize("pools", [False, True])
def test_every_name_that_is_born_ends(pools: bool) -> None:
    plan = planned(chain(), pools=pools)
    lines = wrapper_lines(plan, {}).lines
    ended = [line.buffer.name for line in lines if isinstance(line, (Free, Forget, End))]
    leaving = plan.program.output_buffers
    born = {n for n, life in plan.lifetimes.items() if n not in leaving and n not in ("x", "w")}
    assert sorted(ended) == sorted(born)
    assert len([line for line in lines if isinstance(line, FreePool)]) == len(plan.pools)


def test_a_donated_input_dies_with_its_last_reader_and_the_list_is_emptied() -> None:
    source, call = wrapper(planned(chain(), in_place=False))
    x, w = torch.randn(16, 16), torch.randn(16, 16)
    args: list[object] = [x, w, torch.randn(16, 16)]
    given = weakref.ref(args[2])  # type: ignore[arg-type]
    call(args)
    assert args == []
    assert given() is None
    lines = [line.strip() for line in source.splitlines()]
    assert lines.index("del d") < next(
        k for k, line in enumerate(lines) if line.startswith("aten_mm") and "out=c" in line
    )


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Sizes of the CPU allocator's events inside the block, in order; releases are negative."""
    found: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    found.extend(e.nbytes() for e in memory)


def measured_peak(events: Sequence[int]) -> int:
    live = peak = 0
    for n in events:
        live += n
        peak = max(peak, live)
    return peak


def run_alone(plan: Plan, call: Callable[[list[object]], object], inputs: Sequence[Tensor]) -> int:
    """The peak of allocations while a wrapper runs, donated inputs counted as the plan does.

    Inputs are made inside, since the profiler sees no release of what was there before it; the caller's are taken off.
    """
    buffers = plan.program.buffers.values()
    callers = sum(
        -(-plan.program.nbytes(b.name) // 64) * 64 for b in buffers if b.kind in EXTERNAL_KINDS and not b.donated
    )
    with allocations() as events:
        kept = [t.clone() for t in inputs]
        given: list[object] = list(kept)
        for k, i in enumerate(plan.program.inputs):
            if isinstance(i, TensorInput) and plan.program.buffers[i.view.buffer].donated:
                kept[k] = torch.empty(0)
        out = call(given)
    del out
    return measured_peak(events) - callers


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_peak_is_the_plans(in_place: bool, pools: bool) -> None:
    """Large enough that what the library keeps for itself does not show."""
    p = ProgramBuilder()
    n = 256
    x, d = p.input("x", (n, n)), p.input("d", (n, n), donated=True)
    a = p.extern("a", "aten.mm.out", (x, d), (n, n), contract=Contract.OUT)
    b = p.extern("b", "aten.relu.default", (a,), (n, n))
    c = p.extern("c", "aten.mm.out", (b, x), (n, n), contract=Contract.OUT)
    e = p.extern("e", "aten.tanh.out", (c,), (n, n), contract=Contract.OUT)
    row = p.extern("row", "aten.sum.dim_IntList", (e, [0]), (n,))
    program = p.program(p.extern("out", "aten.neg.default", (row,), (n,)))
    plan = planned(program, in_place=in_place, pools=pools)
    _, call = wrapper(plan)
    inputs = [torch.randn(n, n), torch.randn(n, n)]
    call([t.clone() for t in inputs])
    found = run_alone(plan, call, inputs)
    assert found == pytest.approx(max(plan.timeline), rel=0.01)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).log_softmax(1)
        return out


class Gpt2Block(nn.Module):
    """One block of GPT-2 as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=1, n_embd=64, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0
        )
        config._attn_implementation = "sdpa"
        self.block = transformers.models.gpt2.modeling_gpt2.GPT2Block(config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model", "shape"), [(Mlp, (256, 128)), (Gpt2Block, (4, 128, 64))], ids=["mlp", "gpt2 block"])
def test_the_peak_of_a_model_is_the_plans(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    module = model().requires_grad_(False).eval()
    function = torch.compile(module, backend="memplan", dynamic=False)
    x = torch.randn(shape)
    with memplan.record() as recorded:
        function(x)
    (plan,) = recorded.plans
    function(x)
    with allocations() as events:
        out = function(x)
    del out
    assert measured_peak(events) == pytest.approx(plan.certificate.placed_peak, rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "float('nan')"), (float("-inf"), "-float('inf')"), (torch.device("cpu"), "torch.device('cpu')"),
        (torch.float32, "torch.float32"), ("a'b", '"a\'b"'), (1.5, "1.5"), (None, "None"), (2 + 3j, "(2+3j)"),
        (torch.channels_last, "torch.channels_last"), (torch.strided, "torch.strided"),
    ],
)  # fmt: skip
def test_literals(value: object, text: str) -> None:
    assert literal(value) == text
    again = eval(text, {"torch": torch})
    assert again == value or value != value


def test_results_are_laid_out_as_planned() -> None:
    t = torch.randn(3, 4)
    assert laid_out(t, (3, 4), (4, 1)) is t
    turned = laid_out(t, (3, 4), (1, 3))
    assert turned.stride() == (1, 3)
    assert torch.equal(turned, t)
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) where \(4, 3\)"):
        laid_out(t, (4, 3), (3, 1))


def test_a_storage_seen_in_another_dtype() -> None:
    t = torch.arange(8.0)[2:]
    assert torch.equal(reinterpret_as(t, torch.int32, (2,), (1,), 8), t.view(torch.int32)[2:4])
