"""Losses as training code writes them, in slices: as near to float64 as eager is, or left whole with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax, softmax

import memplan.capture.loss_rewriting as loss_rewriting
from tests.capture.test_chunked_loss import (
    FEATURES,
    SLICE,
    TOKENS,
    VOCABULARY,
    WIDE,
    assert_sliced,
    assert_whole,
    compare,
    evaluated,
    inputs,
    left_whole,
    small_slices,  # noqa: F401
)
from tests.capture.tracing import traced

BATCH, LENGTH = 4, TOKENS // 4
MASK = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) > 0.3
PROBABILITIES = torch.rand(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1)).softmax(-1)
CLASSES = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(2))
OLD = -torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)) - 3
Form = Callable[[Tensor, Tensor], Tensor]


def mean(values: Tensor) -> Tensor:
    """Of the tokens that count."""
    mask = MASK.to(values.dtype).view(values.shape)
    return (values * mask).sum() / mask.sum()


def z_loss(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + 1e-2 * torch.logsumexp(logits, -1).pow(2).mean()


def z_loss_of_counted_tokens(logits: Tensor, target: Tensor) -> Tensor:
    """As OLMo has it: the ignored have no part in either term."""
    valid = (target != -100).to(logits.dtype)
    z = (logits.logsumexp(-1).pow(2) * valid).sum() / valid.sum()
    return cross_entropy(logits, target) + 1e-2 * z


def fused_z_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The norm once for both terms, written out."""
    largest = logits.detach().amax(-1, keepdim=True)
    norm = (logits - largest).exp().sum(-1).log() + largest.squeeze(-1)
    valid = target != -100
    picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((norm - picked + 1e-2 * norm.square()) * valid).sum() / valid.sum()


def per_token(logits: Tensor, target: Tensor) -> Tensor:
    return mean(cross_entropy(logits, target, reduction="none"))


def per_token_of_sequences(logits: Tensor, target: Tensor) -> Tensor:
    """Each sequence has its own mean."""
    losses = cross_entropy(logits, target, reduction="none").view(BATCH, LENGTH)
    mask = MASK.to(losses.dtype).view(BATCH, LENGTH)
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def per_token_class_weights(logits: Tensor, target: Tensor) -> Tensor:
    return mean(cross_entropy(logits, target, weight=CLASSES.to(logits.dtype), reduction="none", label_smoothing=0.1))


def selected_log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """As TRL's `selective_log_softmax`."""
    logits, labels = logits.view(BATCH, LENGTH, VOCABULARY), target.clamp(min=0).view(BATCH, LENGTH)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -mean(picked - logits.logsumexp(-1))


def gathered_log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    return -mean(log_softmax(logits, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1))


def policy_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """PPO's clipped objective, with an entropy bonus and an estimate of the divergence (GRPO's)."""
    found = log_softmax(logits / 0.7, -1)
    taken = found.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    old = OLD.to(logits.dtype)
    ratio, advantage = (taken - old).exp(), old + 3.5
    surrogate = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    entropy = -(softmax(logits, -1) * log_softmax(logits, -1)).sum(-1)
    divergence = (old - taken).exp() - (old - taken) - 1
    return mean(surrogate - 0.01 * entropy + 0.04 * divergence)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    loss = cross_entropy(logits, target, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def soft_targets(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, PROBABILITIES.to(logits.dtype))


def soft_targets_smoothed_and_weighted(logits: Tensor, target: Tensor) -> Tensor:
    given = PROBABILITIES.to(logits.dtype)
    return cross_entropy(logits, given, weight=CLASSES.to(logits.dtype), label_smoothing=0.1, reduction="sum")


def distilled(logits: Tensor, target: Tensor) -> Tensor:
    found = log_softmax(logits / 2, -1)
    return kl_div(found, PROBABILITIES.to(logits.dtype), reduction="batchmean") * 4 + cross_entropy(logits, target)


def capped(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(5 * torch.tanh(logits / 5), target)


def smoothed_and_weighted(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, weight=CLASSES.to(logits.dtype), label_smoothing=0.1)


def window_per_token(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.view(BATCH, LENGTH, VOCABULARY)[:, :-1]
    labels = target.clamp(min=0).view(BATCH, LENGTH)[:, 1:]
    picked = log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = MASK.to(picked.dtype).view(BATCH, LENGTH)[:, 1:]
    return -(picked * mask).sum() / mask.sum() + 1e-3 * logits.logsumexp(-1).square().mean()


FORMS: tuple[Form, ...] = (
    z_loss,
    z_loss_of_counted_tokens,
    fused_z_loss,
    per_token,
    per_token_of_sequences,
    per_token_class_weights,
    selected_log_probabilities,
    gathered_log_probabilities,
    policy_gradient,
    focal,
    soft_targets,
    soft_targets_smoothed_and_weighted,
    distilled,
    capped,
    smoothed_and_weighted,
    window_per_token,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_against_float64(form: Form) -> None:
    hidden, weight, bias, target = inputs(ignored=0.2)
    found = compare(lambda h, w, b, t: form(linear(h, w, b), t), (hidden, weight, bias, target), allowance=16.0)
    assert_sliced(found)
    assert found.saved_bytes <= 4 * (TOKENS * FEATURES + VOCABULARY * (FEATURES + 1)) + 64 + 8 * TOKENS


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_padded_vocabulary(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is no word: no part in any sum, no gradient."""
    monkeypatch.setattr(loss_rewriting, "PADDED_PRODUCTS", ("cpu",))
    hidden, weight, bias, target = inputs(ignored=0.2)
    found = compare(lambda h, w, b, t: form(linear(h, w, b), t), (hidden, weight, bias, target), allowance=16.0)
    nodes = [n for n in found.forward.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert any(n.meta["val"].shape[-1] == VOCABULARY + 3 for n in nodes)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_bfloat16(form: Form) -> None:
    hidden, weight, bias, target = inputs(torch.bfloat16, ignored=0.2)
    found = compare(
        lambda h, w, b, t: form(linear(h, w, b).to(WIDE[h.dtype]), t), (hidden, weight, bias, target), allowance=8.0
    )
    assert_sliced(found)


def test_the_accuracy_beside_the_loss() -> None:
    hidden, weight, _, target = inputs(ignored=0.2)

    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.t()
        return cross_entropy(logits, t), (logits.argmax(-1) == t).float().mean()

    compiled, found = traced(function, loss_chunk=SLICE)
    seen: list[Tensor] = []

    def run(call: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        def loss(*arguments: Tensor) -> Tensor:
            out = call(*arguments)
            seen.append(out[1])
            return out[0]

        return evaluated(loss, (hidden, weight, target))

    for a, b in zip(run(compiled), run(function), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert seen[0] == seen[1] > 0
    assert_sliced(found)


def test_losses_of_tokens_that_are_logged() -> None:
    """Returned without their gradient, as trainers do that write them down."""
    hidden, weight, _, target = inputs(ignored=0.2)

    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(h @ w.t(), t, reduction="none")
        return mean(losses), losses.detach()

    compiled, found = traced(function, loss_chunk=SLICE)
    torch.testing.assert_close(compiled(hidden, weight, target)[1], function(hidden, weight, target)[1])  # type: ignore[index]
    assert_sliced(found)


def test_what_needs_logits_whole_leaves_them_whole() -> None:
    """One reason each, that is said."""

    def sorted_logits(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = h @ w.t()
        return cross_entropy(logits, t) + logits.sort(-1).values[:, -1].mean()

    def across_tokens(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = h @ w.t()
        return cross_entropy(logits - logits.mean(0), t)

    def scaled_by_the_loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        losses = cross_entropy(h @ w.t(), t, reduction="none")
        return (losses * losses.mean()).sum()

    def learned_temperature(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(h @ w.t() * w.mean().exp(), t)

    def used_as_an_embedding(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = h @ w.t()
        return cross_entropy(logits, t) + (softmax(logits, -1) @ w).square().mean()

    def two_windows(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits, labels = (h @ w.t()).view(BATCH, LENGTH, VOCABULARY), t.view(BATCH, LENGTH)
        first = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return first + cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())

    def several_words(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = log_softmax(h @ w.t(), -1)
        return -found.gather(-1, t.unsqueeze(-1).expand(-1, 2)).mean() - found.amax(-1).mean()

    cases = {
        sorted_logits: "aten.sort",
        across_tokens: "aten.mean.dim",
        scaled_by_the_loss: "not one number times",
        learned_temperature: "another gradient",
        used_as_an_embedding: "reads them",
        two_windows: "aten.slice",
        several_words: "aten.gather",
    }
    for function, why in cases.items():
        torch._dynamo.reset()
        left_whole(function, lambda out: out, why)  # type: ignore[arg-type, return-value]


def test_two_tangents_stay_whole() -> None:
    """The two terms are returned one by one: what the backward is given for each is not known."""

    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.t()
        return cross_entropy(logits, t), logits.logsumexp(-1).square().mean()

    left_whole(function, lambda out: out[0] + 0.1 * out[1], "not one number times")  # type: ignore[index]


def test_float16_stays_whole() -> None:
    hidden, weight, bias, target = inputs(torch.float16)
    found = compare(lambda h, w, b, t: z_loss(linear(h, w, b).to(WIDE[h.dtype]), t), (hidden, weight, bias, target))
    assert_whole(found, TOKENS * VOCABULARY * 2)


def test_a_layer_of_a_network_is_no_loss() -> None:
    """A product followed by another one is left as it is, and nothing is said of it."""
    hidden, weight, _, _ = inputs()

    def function(h: Tensor, w: Tensor) -> Tensor:
        return (torch.tanh(h @ w.t()) @ w).square().mean()

    compiled, found = traced(function, loss_chunk=SLICE)
    evaluated(compiled, (hidden, weight))  # type: ignore[arg-type]
    assert_whole(found)
    assert found.partitioned.whole_logits == ()
