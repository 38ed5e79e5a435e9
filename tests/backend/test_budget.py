"""A budget in bytes: kept to, monotone, right to the bit, and what is said where it cannot be met."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import memplan
import memplan.backend
import memplan.capture.chunked_loss
import memplan.capture.partition
from memplan.budget import RUNGS, Budget, Modules, Planned
from memplan.ir.activation import Fate
from memplan.ir.errors import OptionError
from memplan.ir.program import BufferKind
from memplan.passes.step_peak import step_peak
from memplan.recording import CompiledGraph
from memplan.reports import terminal
from memplan.reports.target import report_from

WIDTH, ROWS, BLOCKS = 32, 256, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@cache
def model() -> tuple[Stack, Tensor]:
    torch.manual_seed(0)
    return Stack(), torch.randn(ROWS, WIDTH)


def peak_of(graphs: tuple[CompiledGraph, ...] | list[CompiledGraph]) -> int:
    joins = {later: earlier for g in graphs for earlier, later in g.joins}
    return step_peak([g.plan for g in graphs], joins).nbytes


@cache
def planned(budget: int | str | None = None, **options: object) -> int:
    """Predicted peak of the stack's step."""
    torch._dynamo.reset()
    stack, x = model()
    given = dict(options) if budget is None else {**options, "budget": budget}
    return peak_of(memplan.analyze(stack, (x,), options=given))


@cache
def least() -> int:
    """The least bytes, as the error says."""
    with pytest.raises(Exception, match="above what was there before it") as found:
        planned(1000)
    text = str(found.value)
    assert "cannot be met" in text
    assert "test_budget.py" in text, "names no line of the user's"
    return int(text.partition("before it (")[2].partition(" bytes")[0])


def gradients(budget: str | int | None, **options: object) -> tuple[list[Tensor], int]:
    """Loss and gradients as compiled with a budget, and the predicted peak."""
    torch._dynamo.reset()
    stack, x = model()
    given = dict(options) if budget is None else {**options, "budget": budget}
    with memplan.record() as recorded:
        loss = torch.compile(stack, backend="memplan", options=given)(x)
        found = torch.autograd.grad(loss, list(stack.parameters()))
    return [loss.detach(), *found], peak_of(recorded.graphs)


def test_twenty_budgets_give_rising_peaks_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each budget is searched for as if it were the only one; what was planned for another is not planned again."""
    found: list[tuple[int, int]] = []

    class Many(Budget):
        def search(self) -> tuple[Modules, Planned]:
            most, low = self.peak(RUNGS), self.peak(0)
            for k in range(21):
                self.limit = low + (most - low) * k // 20
                taken = super().search()
                found.append((self.limit, taken[1].peak.nbytes))
            return taken

    monkeypatch.setattr(memplan.backend, "Budget", Many)
    torch._dynamo.reset()
    stack, x = model()
    memplan.analyze(stack, (x,), options={"budget": "1GB"})
    peaks = [p for _, p in found]
    assert all(p <= limit for limit, p in found)
    assert peaks == sorted(peaks)
    assert len(set(peaks)) >= 6
    assert peaks[0] < 0.6 * peaks[-1]


class Words(nn.Module):
    """Blocks and a loss over a vocabulary, whose logits are the largest tensor by far."""

    def __init__(self, vocabulary: int = 2000) -> None:
        super().__init__()
        self.stack = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.stack:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), target)


def least_said(net: nn.Module, batch: tuple[Tensor, ...], **options: object) -> int:
    """The least bytes that the error under a tiny budget says."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be met") as found:
        memplan.analyze(net, batch, options={**options, "budget": 1000})
    return int(str(found.value).partition("before it (")[2].partition(" bytes")[0])


def test_a_small_budget_computes_the_loss_in_smaller_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memplan.capture.chunked_loss, "MIN_ROWS", 16)
    torch.manual_seed(0)
    net, batch = Words(), (torch.randn(ROWS, WIDTH), torch.randint(0, 2000, (ROWS,)))
    half = {"loss_chunk": ROWS // 2 * 2000 * 4}
    least = least_said(net, batch, **half)
    with monkeypatch.context() as patch:
        patch.setattr(memplan.capture.partition, "chunk_sizes", lambda graph, largest: (largest,))
        assert least < 0.8 * least_said(net, batch, **half)
    torch._dynamo.reset()
    free = peak_of(memplan.analyze(net, batch, options={**half, "budget": "1GB"}))
    wanted = torch.autograd.grad(net(*batch), list(net.parameters()))
    peaks = []
    for budget in (least, (least + free) // 2, free):
        torch._dynamo.reset()
        with memplan.record() as recorded:
            loss = torch.compile(net, backend="memplan", options={**half, "budget": budget, "poison": True})(*batch)
            gradients = torch.autograd.grad(loss, list(net.parameters()))
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b)
        peaks.append(peak_of(recorded.graphs))
        assert peaks[-1] <= budget
    assert peaks == sorted(peaks)
    assert peaks[0] == least


def test_the_report_accounts_for_all_that_is_kept() -> None:
    torch._dynamo.reset()
    stack, x = model()
    forward, backward = memplan.analyze(stack, (x,))
    kept = [a for a in backward.activations if a.fate is not Fate.RECOMPUTED]
    program = forward.plan.program
    assert sum(a.nbytes for a in kept) == sum(
        program.nbytes(b.name) for b in program.buffers.values() if b.kind is BufferKind.SAVED
    )
    again = [a for a in backward.activations if a.fate is Fate.RECOMPUTED]
    assert again
    assert all(a.microseconds is not None for a in again)
    assert all(a.origin.location.startswith(__file__) for a in (*kept, *again))
    saved = report_from((forward, backward))
    assert len(saved.activations) == len(backward.activations)
    assert "recomputed" in terminal.rendered(terminal.summary(saved))


@pytest.mark.parametrize("poison", [False, True])
def test_gradients_are_those_without_rematerialisation_to_the_bit(poison: bool) -> None:
    expected, _ = gradients(None, disable=["rematerialize"])
    budget = (least() * 3 + planned("4GB")) // 4
    found, peak = gradients(budget, poison=poison)
    assert peak <= budget
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_retain_graph_and_double_backward_of_a_budgeted_step() -> None:
    torch._dynamo.reset()
    stack, x = model()
    loss = torch.compile(stack, backend="memplan", options={"budget": least() + 1})(x)
    first = torch.autograd.grad(loss, list(stack.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(stack.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    again = torch.compile(stack, backend="memplan", options={"budget": "4GB"})(x.clone().requires_grad_())
    (g, *_) = torch.autograd.grad(again, list(stack.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("budget", [0, -1, "-2GiB", "12 apples", "", "0GB", True, 1.5])
def test_what_is_no_budget_is_refused(budget: object) -> None:
    with pytest.raises(OptionError, match="number of bytes"):
        memplan.analyze(nn.Linear(2, 2), (torch.randn(1, 2),), options={"budget": budget})


def test_a_budget_beyond_the_machine_is_refused() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="larger than the memory of cpu"):
        memplan.analyze(nn.Linear(2, 2), (torch.randn(1, 2),), options={"budget": "1000000GiB"})
    options = {"budget": "1GiB", "disable": ["rematerialize"]}
    with pytest.raises(Exception, match="leave 'rematerialize' out of 'disable'"):
        memplan.analyze(nn.Linear(2, 2), (torch.randn(1, 2),), options=options)


def test_a_model_without_backward_fits_or_says_what_it_needs() -> None:
    torch._dynamo.reset()
    stack, x = model()
    (graph,) = memplan.analyze(stack, (x,), backward=False, options={"budget": "1GB"})
    need = peak_of([graph])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be met"):
        memplan.analyze(stack, (x,), backward=False, options={"budget": need - 1})


def test_frozen_parameters_and_a_loss_that_is_not_last() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    stack = Stack()
    for p in stack.blocks[:2].parameters():
        p.requires_grad_(False)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = stack(x)
        return loss, (x * 2).sin().sum() + loss.detach()

    x = torch.randn(ROWS, WIDTH)
    free = peak_of(memplan.analyze(function, (x,), options={"budget": "1GB"}))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="memplan", options={"budget": int(0.8 * free)})
    wanted = [p for p in stack.parameters() if p.requires_grad]
    found = torch.autograd.grad(compiled(x)[0], wanted)
    for a, b in zip(found, torch.autograd.grad(function(x)[0], wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_user_saves_is_saved_under_a_budget() -> None:
    """Products that a checkpoint policy saves are not done twice, however small the budget."""

    def policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> object:
        return create_selective_checkpoint_contexts(policy)

    stack, x = model()

    def function(x: Tensor) -> Tensor:
        for block in stack.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[assignment]
        return x.square().mean()

    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be met") as found:
        memplan.analyze(function, (x,), options={"budget": 1000})
    need = int(str(found.value).partition("before it (")[2].partition(" bytes")[0])
    assert need >= 4 * ROWS * 4 * WIDTH * BLOCKS  # what `up` gives, of every block


class Expanding(nn.Module):
    """1x1 convolutions from few channels to many and back: what is wide is large and cheap to make again."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.ModuleList(nn.Conv2d(8, 96, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(96) for _ in range(5))
        self.narrow = nn.ModuleList(nn.Conv2d(96, 8, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for widen, norm, narrow in zip(self.widen, self.norms, self.narrow, strict=True):
            x = narrow(norm(widen(x)).relu()).relu()
        return x.mean()


@pytest.mark.parametrize("poison", [False, True])
def test_products_are_done_again_within_their_share_of_time(poison: bool) -> None:
    torch.manual_seed(0)
    net, x = Expanding(), torch.randn(4, 8, 16, 16)
    found: list[tuple[list[Tensor], int, int]] = []
    for share in (0.0, 0.5):
        options = {"recompute_time": 10, "recompute_products": share, "poison": poison}
        torch._dynamo.reset()
        for norm in net.norms:
            norm.reset_running_stats()
        with memplan.record() as recorded:
            loss = torch.compile(net, backend="memplan", options=options)(x)
            gradients = torch.autograd.grad(loss, list(net.parameters()))
        kept = sum(a.nbytes for g in recorded.graphs for a in g.activations if a.fate is not Fate.RECOMPUTED)
        found.append(([loss.detach(), *gradients], kept, peak_of(recorded.graphs)))
    (expected, most, high), (again, least_kept, low) = found
    assert least_kept < 0.6 * most
    assert low < high
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


def test_a_share_of_products_that_is_no_number_is_refused() -> None:
    with pytest.raises(OptionError, match="'recompute_products' takes a number from 0 to 10"):
        memplan.analyze(nn.Linear(2, 2), (torch.randn(1, 2),), options={"recompute_products": -0.1})


def test_the_graph_is_read_once_for_all_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what torch's partitioner does whatever is kept is done once; every cut starts from the same graph."""
    partition = memplan.capture.partition
    limit = (least() + planned("1GB")) // 2
    read: list[object] = []
    shared: list[object] = []
    cut: list[object] = []

    def counting(name: str, calls: list[object]) -> None:
        original = getattr(partition, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(original(*args, **kwargs))
            return calls[-1]

        monkeypatch.setattr(partition, name, call)

    counting("joint_graph", read)
    counting("fx_graph_cse", shared)
    counting("min_cut_rematerialization_partition", cut)
    stack, x = model()
    torch._dynamo.reset()
    memplan.analyze(stack, (x,), options={"budget": limit})
    assert len(cut) > 2
    assert len(read) == len(shared) == 1
