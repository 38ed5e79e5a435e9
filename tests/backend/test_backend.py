"""The backend as users drive it: hooks, retained graphs, threads, poison, pools, options; against eager."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan.ir.plan import InPool
from memplan.ir.program import Phase
from memplan.passes.donation import without_donation
from memplan.recompute_prices import cheap_again
from tests.models.against_eager import check
from tests.tolerances import assert_near


class Block(nn.Module):
    """Matrix products, a reduction and pointwise work."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


def compiled(function: Callable[..., object], **options: object) -> Callable[..., Tensor]:
    return torch.compile(function, backend="memplan", options=options or None)  # type: ignore[return-value]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def test_a_graph_that_is_retained_gives_the_same_gradients_each_time() -> None:
    model, x = Block(), leaf(3, 12)
    expected = gradients(model, x)
    loss = compiled(model)(x).square().sum()
    for retain in (True, True, False):
        found = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=retain)
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b, f"retain_graph={retain}")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("first", ["plain", "hooked"])
def test_hooks_that_keep_what_they_are_given(first: str) -> None:
    """What a hook holds is neither overwritten nor freed by the backward, whichever way the model ran before."""
    model, x = Block(), leaf(3, 12)
    expected = gradients(model, x)
    function = compiled(model)
    if first == "plain":
        torch.autograd.grad(function(x).square().sum(), x)
    held: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        held.append((t, t.detach().clone()))
        return t

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = function(x).square().sum()
        found = torch.autograd.grad(loss, [x, *model.parameters()])
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b)
    assert held
    for t, before in held:
        assert torch.equal(t, before), "a tensor that a hook holds was written"


def test_offload_to_the_cpu() -> None:
    model, x = Block(), leaf(3, 12)
    function = compiled(model)
    with torch.autograd.graph.save_on_cpu():
        loss = function(x).square().sum()
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    for a, b in zip(found, gradients(model, x), strict=True):
        assert_near(a, b)


def test_threads_that_train() -> None:
    model = Block()
    function = compiled(model)
    inputs = [leaf(3, 12) for _ in range(4)]
    expected = [torch.autograd.grad(model(x).square().sum(), x)[0] for x in inputs]
    torch.autograd.grad(function(inputs[0]).square().sum(), inputs[0])
    found: dict[int, Tensor] = {}

    def run(k: int) -> None:
        for _ in range(5):
            found[k] = torch.autograd.grad(function(inputs[k]).square().sum(), inputs[k])[0]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k, b in enumerate(expected):
        assert_near(found[k], b, f"thread {k}")


@pytest.mark.parametrize(
    "options", [{"poison": True}, {"poison": True, "pools": "always"}, {"pools": "never"}], ids=str
)
def test_poisoned_and_pooled_plans_give_eagers_numbers(options: dict[str, object]) -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(12, 5), nn.LogSoftmax(1))
    with memplan.record() as recorded:
        check(model, [leaf(6, 12)], **options)
    pooled = [p for plan in recorded.plans for p in plan.placements.values() if isinstance(p, InPool)]
    assert bool(pooled) == (options.get("pools") == "always") or options == {"poison": True}


@pytest.mark.parametrize("lazy", ["negated", "conjugated", "both transposed"])
def test_inputs_whose_memory_is_not_what_they_say(lazy: str) -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    x = {"negated": z.conj().imag, "conjugated": z.conj(), "both transposed": z.conj().imag.t()}[lazy]
    function: Callable[[Tensor], Tensor] = lambda a: (a * 2 + 1).t()  # noqa: E731
    assert x.is_neg() or x.is_conj()
    assert_near(compiled(function)(x), function(x).resolve_conj().resolve_neg())


def test_a_negated_input_that_is_changed() -> None:
    def function(a: Tensor) -> Tensor:
        a.add_(1)
        return a * 2

    ours = torch.randn(3, 4, dtype=torch.complex64)
    theirs = ours.clone()
    assert_near(compiled(function)(ours.conj().imag), function(theirs.conj().imag))
    assert_near(ours, theirs, "the input")


def test_plans_are_recorded_with_their_joins() -> None:
    model, x = Block(), leaf(3, 12)
    with memplan.record() as recorded:
        compiled(model)(x).sum().backward()
    assert [p.program.phase for p in recorded.plans] == [Phase.FORWARD, Phase.BACKWARD]
    forward, backward = recorded.graphs
    assert forward.group == backward.group
    assert backward.joins
    for ours, theirs in backward.joins:
        assert ours in forward.plan.program.buffers
        assert theirs in backward.plan.program.buffers
        assert forward.plan.program.nbytes(ours) == backward.plan.program.nbytes(theirs)
    donated = {n for n, b in backward.plan.program.buffers.items() if b.donated}
    assert donated
    assert donated <= {b for _, b in backward.joins}
    assert not any(b.donated for b in without_donation(backward.plan.program).buffers.values())


@pytest.mark.parametrize(
    ("target", "cheap"),
    [
        ("aten.add.Tensor", True), ("aten.mm.default", False), ("aten.exp.default", True),
        ("memplan.rand.default", True),
        ("aten._scaled_dot_product_flash_attention_for_cpu.default", False), ("aten.convolution.default", False),
        ("mylib.op.default", False), ("aten._fft_r2c.default", False), ("aten.sum.dim_IntList", True),
    ],
)  # fmt: skip
def test_what_is_cheap_to_compute_again(target: str, cheap: bool) -> None:
    assert cheap_again(target) is cheap
