"""Label smoothing by slices of tokens: as near to float64 as eager is, and left whole where its form is another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss

import memplan.capture.loss_rewriting as loss_rewriting
from tests.capture.test_chunked_loss import (
    FEATURES,
    ROWS,
    SLICE,
    TOKENS,
    VOCABULARY,
    WIDE,
    assert_sliced,
    assert_whole,
    compare,
    evaluate_rows,
    evaluated,
    inputs,
    small_slices,  # noqa: F401
)
from tests.capture.tracing import traced


@pytest.mark.parametrize("smoothing", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_float64(reduction: str, bias: bool, smoothing: float) -> None:
    def function(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        logits = linear(h, w, b if bias else None)
        return cross_entropy(logits, t, reduction=reduction, label_smoothing=smoothing)

    hidden, weight, b, target = inputs(ignored=0.2)
    found = compare(function, (hidden, weight, b if bias else b.detach(), target))
    assert_sliced(found)
    assert max(evaluate_rows(found)) <= ROWS


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bfloat16(reduction: str) -> None:
    def function(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(linear(h, w, b).to(WIDE[h.dtype]), t, reduction=reduction, label_smoothing=0.1)

    assert_sliced(compare(function, inputs(torch.bfloat16, ignored=0.2)))


def test_bfloat16_to_the_end() -> None:
    """The loss itself is bfloat16."""
    found = compare(
        lambda h, w, t: cross_entropy(h @ w.t(), t, label_smoothing=0.1),
        (*inputs(torch.bfloat16)[:2], inputs(ignored=0.2)[3]),
    )
    assert_sliced(found)


def test_float64_keeps_its_digits() -> None:
    found = compare(
        lambda h, w, b, t: cross_entropy(linear(h, w, b), t, label_smoothing=0.3), inputs(torch.float64, ignored=0.2)
    )
    assert_sliced(found, 2 * TOKENS * VOCABULARY * 4)


def test_an_ignored_index_inside_the_vocabulary() -> None:
    hidden, weight, _, target = inputs()
    target[::3] = 5
    found = compare(
        lambda h, w, t: cross_entropy(h @ w.t(), t, ignore_index=5, label_smoothing=0.1), (hidden, weight, target)
    )
    assert_sliced(found)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_token_ignored(reduction: str) -> None:
    """The mean of nothing is not a number; its gradients are zero, as eager's are."""

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t(), t, reduction=reduction, label_smoothing=0.1)

    hidden, weight, _, target = inputs(ignored=2.0)
    compiled, found = traced(function, loss_chunk=SLICE)
    ours = evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
    assert bool(ours[0].isnan()) == (reduction == "mean")
    for a, b in zip(ours, evaluated(function, (hidden, weight, target)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_sliced(found)


def test_infinite_logits_of_ignored_tokens_do_no_harm_to_the_loss() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t(), t, label_smoothing=0.1)

    hidden, weight, _, target = inputs()
    with torch.no_grad():
        hidden[4] = float("inf")
    target[4] = -100
    compiled, found = traced(function, loss_chunk=SLICE)
    ours = evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
    assert ours[0].isfinite()
    torch.testing.assert_close(ours[0], evaluated(function, (hidden, weight, target))[0])
    assert_sliced(found)


def test_large_logits() -> None:
    """Probabilities that are zero in float32 have their part in the loss."""
    hidden, weight, _, target = inputs()
    found = compare(
        lambda h, w, t: cross_entropy(h * 100 @ w.t(), t, label_smoothing=0.1), (hidden, weight, target), allowance=8.0
    )
    assert_sliced(found)


def test_tied_weights() -> None:
    _, weight, _, target = inputs(ignored=0.2)
    ids = torch.randint(0, VOCABULARY, (TOKENS,))

    def function(w: Tensor, i: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(nn.functional.embedding(i, w).tanh() @ w.t(), t, label_smoothing=0.1)

    assert_sliced(compare(function, (weight, ids, target)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_window_of_a_shifted_loss(reduction: str) -> None:
    hidden, weight, _, target = inputs(ignored=0.2)

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = (h @ w.t()).view(4, TOKENS // 4, VOCABULARY)[:, :-1].reshape(-1, VOCABULARY)
        labels = t.view(4, TOKENS // 4)[:, 1:].reshape(-1)
        return cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.2)

    assert_sliced(compare(function, (hidden, weight, target)))


@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_only_one_gradient(which: str) -> None:
    hidden, weight, bias, target = inputs(ignored=0.2)
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    arguments = tuple(t if name == which else t.detach() for name, t in given.items())
    found = compare(lambda h, w, b, t: cross_entropy(linear(h, w, b), t, label_smoothing=0.1), (*arguments, target))
    if which != "bias":
        assert_sliced(found)


def test_two_losses_and_factors_inside_the_graph() -> None:
    hidden, weight, _, target = inputs(ignored=0.2)

    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        first = cross_entropy(h @ w.t(), t, label_smoothing=0.1) * 3
        return first.exp() * 1e-3 + cross_entropy((h * 2) @ w.t(), t, label_smoothing=0.4, reduction="sum")

    assert_sliced(compare(function, (hidden, weight, target), allowance=16.0))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padded_vocabulary(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    """Padding is no word: no part in the sum of all words, no gradient."""
    monkeypatch.setattr(loss_rewriting, "PADDED_PRODUCTS", ("cpu",))

    def function(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(linear(h, w, b), t, reduction=reduction, label_smoothing=0.1)

    found = compare(function, inputs(ignored=0.2), allowance=8.0)
    nodes = [n for n in found.forward.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert any(n.meta["val"].shape[-1] == VOCABULARY + 3 for n in nodes)


def test_the_backward_has_no_matrix_product() -> None:
    compiled, found = traced(lambda h, w, t: cross_entropy(h @ w.t(), t, label_smoothing=0.1), loss_chunk=SLICE)
    hidden, weight, _, target = inputs()
    evaluated(compiled, (hidden, weight, target))  # type: ignore[arg-type]
    assert not [n.target for n in found.backward.graph.nodes if n.op == "call_function" and "mm" in str(n.target)]
    assert found.saved_bytes <= 4 * (TOKENS * FEATURES + VOCABULARY * FEATURES) + 64


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights(reduction: str) -> None:
    hidden, weight, _, target = inputs(ignored=0.2)
    classes = torch.rand(VOCABULARY)
    found = compare(
        lambda h, w, c, t: cross_entropy(h @ w.t(), t, weight=c, reduction=reduction, label_smoothing=0.1),
        (hidden, weight, classes, target),
    )
    assert_sliced(found)


def _own(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, their loss, and the sum of all words' that smoothing takes."""
    found = log_softmax(h @ w.t(), 1)
    return found, nll_loss(found, t), (-found.sum(1)).masked_fill(t == -100, 0.0).sum() / (~(t == -100)).sum()


def test_terms_of_another_form() -> None:
    """Near to label smoothing, each with one difference that a formula for it would get wrong."""

    def another_mask(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), 1)
        loss = nll_loss(found, t) * 0.9
        return loss + (-found.sum(1)).masked_fill(t == 3, 0.0).sum() / (~(t == -100)).sum() * 0.1

    def another_count(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), 1)
        return nll_loss(found, t) * 0.9 + (-found.sum(1)).masked_fill(t == -100, 0.0).sum() / (~(t == 3)).sum() * 0.1

    def without_gradient(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        _, loss, smooth = _own(h, w, t)
        return loss * 0.9 + smooth.detach() * 0.1

    def a_tangent_of_its_own(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        _, loss, smooth = _own(h, w, t)
        return loss * 0.9 + smooth.square() * 0.1

    def two_tangents(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        _, loss, smooth = _own(h, w, t)
        return (loss * 0.9).sigmoid() + smooth * 0.1

    def a_third_reader(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found, loss, smooth = _own(h, w, t)
        return loss * 0.9 + smooth * 0.1 + found.square().mean()

    def two_sums(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found, loss, smooth = _own(h, w, t)
        return loss * 0.9 + smooth * 0.1 + found.sum(1).square().mean()

    def positive(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), 1)
        return nll_loss(found, t) * 0.9 + found.sum(1).masked_fill(t == -100, 0.0).sum() * 0.1

    # whose gradient takes what all tokens gave together
    whole = (a_tangent_of_its_own, two_tangents)
    for function in (
        another_mask,
        another_count,
        without_gradient,
        *whole,
        a_third_reader,
        two_sums,
        positive,
    ):
        torch._dynamo.reset()
        hidden, weight, _, target = inputs(ignored=0.2)
        found = compare(function, (hidden, weight, target), allowance=8.0)
        (assert_whole if function in whole else assert_sliced)(found)


def test_class_weights_of_one_term_alone() -> None:
    """The likelihood has class weights, some zero, and the sum of all words has none."""
    hidden, weight, _, target = inputs(ignored=0.2)
    classes = torch.rand(VOCABULARY)
    classes[::2] = 0.0

    def function(h: Tensor, w: Tensor, c: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), 1)
        loss = nll_loss(found, t, weight=c) * 0.9
        return loss + (-found.sum(1)).masked_fill(t == -100, 0.0).sum() / (~(t == -100)).sum() * 0.1

    assert_sliced(compare(function, (hidden, weight, classes, target)))


def test_the_term_written_out_is_right() -> None:
    """In the form of `cross_entropy`, with weights that do not sum to one, and before the loss itself."""

    def after(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        _, loss, smooth = _own(h, w, t)
        return loss * 0.7 + smooth * 0.25

    def before(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), 1)
        smooth = (-found.sum(1)).masked_fill(t == -100, 0.0).sum() / (~(t == -100)).sum() * 0.25
        return smooth + nll_loss(found, t) * 0.7

    hidden, weight, _, target = inputs(ignored=0.2)
    assert_sliced(compare(after, (hidden, weight, target)))
    torch._dynamo.reset()
    assert_sliced(compare(before, (hidden, weight, target)))
