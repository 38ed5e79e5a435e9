"""The loss by slices of tokens: as near to float64 as eager is, logits never whole, and left alone where it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import memplan.capture.chunked_loss as chunked_loss
import memplan.capture.loss_rewriting as loss_rewriting
import memplan.capture.partition as partition
from memplan.ir.joint import JointGraph, Side
from tests.capture.tracing import Traced, traced

TOKENS, FEATURES, VOCABULARY = 96, 8, 65
ROWS = 16
LOGITS = TOKENS * VOCABULARY * 4
SLICE = ROWS * VOCABULARY * 4

# models compute their loss in float32; the judge stays in float64
WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "MIN_ROWS", ROWS)


def inputs(dtype: torch.dtype = torch.float32, *, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, bias and targets; the part ``ignored`` of the targets is -100."""
    hidden = torch.randn(TOKENS, FEATURES).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    target = torch.randint(0, VOCABULARY, (TOKENS,))
    target[torch.rand(TOKENS) < ignored] = -100
    return hidden, weight, bias, target


def evaluated(function: Loss, arguments: tuple[Tensor, ...], scale: float = 3.0) -> list[Tensor]:
    """The loss and the gradients of what requires them, with a tangent that is not 1."""
    leaves = [t for t in arguments if t.requires_grad]
    loss = function(*arguments)
    gradients = torch.autograd.grad(loss * scale, leaves)
    return [loss.detach(), *gradients]


def compare(function: Loss, arguments: tuple[Tensor, ...], *, allowance: float = 4.0) -> Traced:
    """Compiled, eager and float64: compiled must not be further off than eager, but for ``allowance`` roundings."""
    compiled, found = traced(function, loss_chunk=SLICE)
    ours = evaluated(compiled, arguments)  # type: ignore[arg-type]
    eager = evaluated(function, arguments)
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in arguments]
    judge = evaluated(function, tuple(wide))
    for k, (a, b, true) in enumerate(zip(ours, eager, judge, strict=True)):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        scale = float(true.abs().max().nan_to_num(1.0))
        allowed = 2 * float((b.double() - true).abs().nan_to_num(0.0).max())
        allowed += allowance * torch.finfo(b.dtype).eps * scale
        torch.testing.assert_close(
            a.double(), true, rtol=0, atol=allowed, equal_nan=True, msg=lambda m, k=k: f"{k}: {m}"
        )
    return found


def assert_sliced(found: Traced, whole: int = LOGITS) -> None:
    assert found.largest_buffer < whole / 2, "the logits exist whole"


def assert_whole(found: Traced, whole: int = LOGITS) -> None:
    assert found.largest_buffer >= whole, "the logits were sliced"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_float64(reduction: str, bias: bool) -> None:
    def function(hidden: Tensor, weight: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(nn.functional.linear(hidden, weight, b if bias else None), target, reduction=reduction)

    hidden, weight, b, target = inputs(ignored=0.2)
    found = compare(function, (hidden, weight, b if bias else b.detach(), target))
    assert_sliced(found)
    assert max(evaluate_rows(found)) <= ROWS


def evaluate_rows(found: Traced) -> list[int]:
    """Rows of every matrix with a column for each word of the vocabulary."""
    programs = found.programs.values()
    views = [v for p in programs for op in p.operations for v in getattr(op, "results", ()) if v is not None]
    return [int(v.sizes[0]) for v in views if len(v.sizes) == 2 and v.sizes[1] == VOCABULARY and v.sizes[0] != FEATURES]


@pytest.mark.parametrize(
    ("tokens", "most", "rows"),
    [
        (8192, 4384, 4096),  # two even slices of BERT's, where 4352 and 3840 would be
        (16384, 2670, 2432),
        (8192, 8192, None),
        (8192, 8191, 4096),
        (8192, 100, 1024),
        (2047, 100, None),
        (2100, 2100, None),
        (2100, 2099, 1152),
    ],
)
def test_rows_of_a_slice(tokens: int, most: int, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No slice is larger than asked for, but for the fewest rows; they are even, in multiples of a tile."""
    monkeypatch.setattr(chunked_loss, "MIN_ROWS", 1024)
    logits = torch.empty(tokens, 1000, dtype=torch.bfloat16, device="meta")
    assert chunked_loss._rows(logits, most * 2000) == rows


def test_the_backward_has_no_matrix_product() -> None:
    compiled, found = traced(lambda h, w, t: cross_entropy(h @ w.t(), t), loss_chunk=SLICE)
    hidden, weight, _, target = inputs()
    evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
    assert not [n.target for n in found.backward.graph.nodes if n.op == "call_function" and "mm" in str(n.target)]
    # what is kept: the two gradients
    assert found.saved_bytes <= 4 * (TOKENS * FEATURES + VOCABULARY * FEATURES) + 64


def test_slices_that_do_not_divide_the_tokens() -> None:
    hidden, weight, _, target = inputs()
    found = compare(
        lambda h, w, t: cross_entropy((h @ w.t())[:], t), (hidden[:90].detach().requires_grad_(), weight, target[:90])
    )
    assert_sliced(found, 90 * VOCABULARY * 4)


def test_bfloat16() -> None:
    hidden, weight, bias, target = inputs(torch.bfloat16)
    found = compare(
        lambda h, w, b, t: cross_entropy(nn.functional.linear(h, w, b).to(WIDE[h.dtype]), t),
        (hidden, weight, bias, target),
    )
    assert_sliced(found)


def test_float64_keeps_its_digits() -> None:
    hidden, weight, bias, target = inputs(torch.float64)
    compare(lambda h, w, b, t: cross_entropy(nn.functional.linear(h, w, b), t), (hidden, weight, bias, target))


def test_float16_is_not_sliced() -> None:
    hidden, weight, bias, target = inputs(torch.float16)
    found = compare(
        lambda h, w, b, t: cross_entropy(nn.functional.linear(h, w, b).to(WIDE[h.dtype]), t),
        (hidden, weight, bias, target),
    )
    assert_whole(found, LOGITS // 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights(reduction: str) -> None:
    hidden, weight, _, target = inputs(ignored=0.3)
    classes = torch.rand(VOCABULARY)
    classes[3] = 0.0

    def function(h: Tensor, w: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t(), t, weight=c, reduction=reduction)

    assert_sliced(compare(function, (hidden, weight, classes, target)))


def test_an_ignored_index_inside_the_vocabulary() -> None:
    hidden, weight, _, target = inputs()
    target[::3] = 5
    assert_sliced(compare(lambda h, w, t: cross_entropy(h @ w.t(), t, ignore_index=5), (hidden, weight, target)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_token_ignored(reduction: str) -> None:
    """The mean of nothing is not a number; its gradients are zero, as eager's are."""
    hidden, weight, _, target = inputs()
    target.fill_(-100)
    compiled, found = traced(lambda h, w, t: cross_entropy(h @ w.t(), t, reduction=reduction), loss_chunk=SLICE)
    arguments = (hidden, weight, target)
    ours = evaluated(compiled, arguments)  # type: ignore[arg-type]
    eager = evaluated(lambda h, w, t: cross_entropy(h @ w.t(), t, reduction=reduction), arguments)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_sliced(found)


def test_infinite_logits_of_ignored_tokens_do_no_harm() -> None:
    hidden, weight, _, target = inputs()
    with torch.no_grad():
        hidden[4] = float("inf")
        weight[0] = 0.0
    target[4] = -100
    function = lambda h, w, t: cross_entropy(h @ w.t(), t)  # noqa: E731
    compiled, _ = traced(function, loss_chunk=SLICE)
    ours, eager = evaluated(compiled, (hidden, weight, target)), evaluated(function, (hidden, weight, target))  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-5, atol=1e-5)


def test_tied_weights() -> None:
    """The embedding is the output's weight: its gradient is the sum of both uses."""
    _, weight, _, target = inputs()
    ids = torch.randint(0, VOCABULARY, (TOKENS,))

    def function(w: Tensor, i: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(nn.functional.embedding(i, w).tanh() @ w.t(), t)

    assert_sliced(compare(function, (weight, ids, target)))


def test_the_window_of_a_shifted_loss() -> None:
    """Next-token prediction: the last position has no target."""
    hidden, weight, _, target = inputs()
    batch, length = 4, TOKENS // 4

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = (h @ w.t()).view(batch, length, VOCABULARY)
        labels = t.view(batch, length)
        return cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))

    assert_sliced(compare(function, (hidden, weight, target)))


def test_a_window_that_starts_late() -> None:
    hidden, weight, _, target = inputs(ignored=0.2)
    batch, length = 3, TOKENS // 3

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = nn.functional.linear(h.view(batch, length, FEATURES), w).to(WIDE[h.dtype])
        return cross_entropy(logits[:, 5:].flatten(0, 1), t.view(batch, length)[:, 5:].flatten(), reduction="sum")

    assert_sliced(compare(function, (hidden, weight, target)))


@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_only_one_gradient(which: str) -> None:
    hidden, weight, bias, target = inputs()
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    arguments = tuple(t if name == which else t.detach() for name, t in given.items())
    compare(lambda h, w, b, t: cross_entropy(nn.functional.linear(h, w, b), t), (*arguments, target))


def test_the_hidden_states_are_used_elsewhere_too() -> None:
    hidden, weight, _, target = inputs()

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t(), t) + h.square().mean() + w.abs().sum() * 0.1

    assert_sliced(compare(function, (hidden, weight, target)))


def left_whole(function: Callable[..., object], loss: Callable[[object], Tensor], why: str) -> None:
    """The function is not sliced, and right; and it is said why."""
    hidden, weight, _, target = inputs()
    compiled, found = traced(function, loss_chunk=SLICE)
    ours = evaluated(lambda *a: loss(compiled(*a)), (hidden, weight, target))
    eager = evaluated(lambda *a: loss(function(*a)), (hidden, weight, target))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_whole(found)
    ((_, said),) = found.partitioned.whole_logits
    assert why in said, said


def test_logits_that_are_returned_stay_whole() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.t()
        return cross_entropy(logits, t), logits

    left_whole(function, lambda out: out[0] + out[1].square().mean(), "leave the compiled function")  # type: ignore[index]


def test_logits_that_are_returned_without_a_gradient_stay_whole() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.t()
        return cross_entropy(logits, t), logits.detach()

    left_whole(function, lambda out: out[0], "leave the compiled function")  # type: ignore[index]


def test_two_losses_of_the_same_logits() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = h @ w.t()
        return cross_entropy(logits, t) + cross_entropy(logits, t.flip(0), reduction="sum")

    hidden, weight, _, target = inputs()
    assert_sliced(compare(function, (hidden, weight, target)))


def test_a_loss_for_each_token_that_is_returned_stays_whole() -> None:
    """Its tangents are known in the backward alone."""
    left_whole(
        lambda h, w, t: cross_entropy(h @ w.t(), t, reduction="none"),
        lambda out: out.square().sum(),  # type: ignore[attr-defined]
        "not one number times",
    )


def test_two_losses_of_their_own_are_both_sliced() -> None:
    hidden, weight, _, target = inputs()

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t(), t) + cross_entropy((h * 2) @ w.t(), t.flip(0), reduction="sum")

    assert_sliced(compare(function, (hidden, weight, target)))


def test_small_logits_and_a_switched_off_pass_stay_whole() -> None:
    function = lambda h, w, t: cross_entropy(h @ w.t(), t)  # noqa: E731
    hidden, weight, _, target = inputs()
    for options in ({"loss_chunk": LOGITS}, {"loss_chunk": 0}, {"loss_chunk": SLICE, "disable": ["chunked_loss"]}):
        torch._dynamo.reset()
        compiled, found = traced(function, **options)
        evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
        assert_whole(found)


def test_an_evaluation_without_gradients_is_right() -> None:
    hidden, weight, _, target = inputs()
    compiled, _ = traced(lambda h, w, t: cross_entropy(h @ w.t(), t), loss_chunk=SLICE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, target), cross_entropy(hidden @ weight.t(), target))


def test_padded_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the vocabulary is padded to whole vectors: no part in the softmax, no gradient."""
    monkeypatch.setattr(loss_rewriting, "PADDED_PRODUCTS", ("cpu",))
    torch.manual_seed(0)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(nn.functional.linear(hidden, weight, bias), target)

    found = compare(function, inputs(ignored=0.2), allowance=8.0)
    nodes = [n for n in found.forward.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert any(n.meta["val"].shape[-1] == VOCABULARY + 3 for n in nodes)


def test_what_a_sliced_loss_makes_its_gradients_of_belongs_to_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward runs it for the sake of gradients that are saved, and a budget counts it there."""
    seen: list[JointGraph] = []
    original = partition.joint_graph

    def joint_graph(*args: object) -> JointGraph:
        seen.append(original(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(partition, "joint_graph", joint_graph)
    hidden, weight, _, target = inputs()
    compiled, _ = traced(lambda h, w, t: cross_entropy(h @ w.t(), t), loss_chunk=SLICE)
    evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
    products = [n for n in seen[0].nodes if n.name.startswith("mm_default") or n.name.startswith("addmm_default")]
    assert len(products) == 3 * TOKENS // ROWS
    assert all(n.side is Side.FORWARD for n in products)
